"""Pre-training at the starter's shape on packed windows against Transformers' Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from metier.training.loop import trapezoid
from training import bench
from training.bench import OURS, Bench, Outcome, Run, Variant
from training.figures import Goal
from training.material import recipe

# Our side compiles, which takes it a minute, in trainings of at least 5,000,000 tokens.
_LONG = 6_000_000
_PEER = "Transformers Trainer"
_START: Variant = {
    "micro": 2,
    "attention": "sdpa",
    "autocast": True,
    "compile": False,
    "checkpointing": False,
}


class Pretraining:
    """The public function on our side, up to the last step that is measured.

    The peer gets the same windows and weights, and our optimisers: the figure is that of the
    trainer, not of Muon.
    """

    def __init__(self, where: Bench) -> None:
        self._bench, steps = where, where.settings.steps
        parts = where.settings.parts
        step_tokens = recipe(where.data, _LONG, parts).step_tokens
        tokens = _LONG if where.settings.tries else steps * step_tokens
        config = recipe(where.data, tokens, parts)
        self._run = where.processes.work / "pretrain"
        self._windows = where.processes.work / f"windows-{steps}-{parts}"
        planned = math.ceil(tokens / step_tokens)
        factor = trapezoid(planned, config.warmup_steps, round(planned * config.decay))
        shape = config.shape
        self._ours = {
            "kind": "pretrain",
            "data": str(where.data),
            "run": str(self._run),
            "tokens": tokens,
            "parts": parts,
            "steps": steps,
        }
        self._theirs = {
            "kind": "pretrain",
            "windows": str(self._windows / "windows.npy"),
            "steps": steps,
            "step_rows": step_tokens // config.step_lengths[0],
            "seed": config.seed,
            "learning_rate": config.learning_rate,
            "weight_decay": config.weight_decay,
            "factors": [factor(step) for step in range(steps)],
            "config": {
                "vocab_size": shape.vocabulary,
                "hidden_size": shape.hidden,
                "num_hidden_layers": shape.layers,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": shape.heads,
                "intermediate_size": shape.intermediate,
                "max_position_embeddings": shape.context,
                "tie_word_embeddings": True,
                "rms_norm_eps": 1e-6,
            },
        }

    def ours(self, profile: bool = False) -> Run:
        """Run our side once."""
        return self._bench.processes.ours(self._ours | self._bench.watched(profile))

    def _peer(self, variant: Variant, **changes: Any) -> Run:
        return self._bench.processes.peer(self._theirs | {"variant": variant} | changes)

    def compare(self) -> Outcome:
        """Measure both sides and judge."""
        if not Path(self._windows).exists():
            target = {"kind": "windows", "windows": str(self._windows)}
            self._bench.processes.ours(self._ours | target)
        choices = {"micro": [4, 8], "attention": ["eager"], "compile": [True]}
        best, tried = bench.choose(
            self._bench, lambda variant, n: self._peer(variant, steps=n), _START, choices
        )
        found = self._bench.rounds({OURS: self.ours, _PEER: lambda: self._peer(best)})
        other = "eager" if best["attention"] == "sdpa" else "sdpa"
        variants = [best | {"attention": other}, best | {"micro": 1}]
        band = [self._peer(v) | {"side": "band", "round": n} for n, v in enumerate(variants)]
        outcome = Outcome(variants={_PEER: best, "tried": tried})
        outcome.runs = [run for runs in (*found.values(), band) for run in runs]
        gate = bench.judged(found[OURS], found[_PEER], [*found[_PEER], *band])
        outcome.gates[_PEER] = gate
        pairs = bench.speed_pairs(found[OURS], found[_PEER], self._bench.settings.warmup)
        name = f"pre-training, starter shape, packed, {self._bench.processes.threads} cores"
        goal, figure = Goal(1.3, 2), "tokens per second"
        outcome.rows.append(bench.row(name, _PEER, figure, goal, pairs, gate))
        return outcome
