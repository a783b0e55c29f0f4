"""LoRA and full fine-tuning against TRL: tokens per second, memory, and the processor's ceiling."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metier.task import Training
from metier.training.loop import cosine
from training import bench
from training.bench import OURS, Bench, Outcome, Run, Variant
from training.ceiling import lora_operations
from training.figures import Goal
from training.material import STEP_ROWS

# Extra seeds that make the band of the peer's losses.
_BAND_SEEDS = (1, 2)
_RATES = {"lora": 1e-3, "full": 2e-4}
_CEILING_SECONDS = 1.0
_SPEED = "real tokens per second"


TUNED: Variant = {
    "micro": 8,
    "attention": "sdpa",
    "padding_free": False,
    "autocast": True,
    "compile": False,
    "dtype": "bfloat16",
    "grouped": True,
    "checkpointing": False,
}
DEFAULT = TUNED | {"dtype": "float32", "grouped": False, "checkpointing": True}
"""TRL's own defaults: float32 base under autocast, eight rows at a time, checkpointing."""


class FineTuning:
    """LoRA or full fine-tuning at the shape of SmolLM2-135M on Dolly rows, loss on answers only."""

    def __init__(self, where: Bench, method: str) -> None:
        self._bench, self._method, steps = where, method, where.settings.steps
        rows = where.material("rows", steps)
        training = Training(epochs=1, batch_size=STEP_ROWS)
        factor = cosine(steps, training.warmup)
        self._spec = {
            "kind": "train",
            "method": method,
            "base": str(rows.parent / "base"),
            "rows": str(rows / "rows.json"),
            "steps": steps,
            "step_rows": STEP_ROWS,
            "seed": 0,
            "learning_rate": _RATES[method],
            "weight_decay": training.weight_decay,
            "factors": [factor(step) for step in range(steps)],
            "lora": training.lora.model_dump(),
            "adapter": str(rows.parent / "base" / "adapter") if method == "lora" else "",
        }
        kind = "LoRA r16" if method == "lora" else "full fine-tuning"
        self._name = f"{kind}, {where.shape}, Dolly rows, {where.processes.threads} cores"

    def ours(self, profile: bool = False) -> Run:
        """Run our side once."""
        return self._bench.processes.ours(self._spec | self._bench.watched(profile))

    def _peer(self, variant: Variant, **changes: Any) -> Run:
        return self._bench.processes.peer(self._spec | {"variant": variant} | changes)

    def compare(self) -> Outcome:
        """Measure both sides and judge."""
        lora = self._method == "lora"
        start = TUNED if lora else TUNED | {"dtype": "float32"}
        choices = {
            "micro": [4, 16],
            "attention": ["eager"],
            "padding_free": [True],
            **({"autocast": [False]} if lora else {}),
            "compile": [True],
        }
        best, tried = bench.choose(
            self._bench, lambda variant, n: self._peer(variant, steps=n), start, choices
        )
        found = self._bench.rounds(self._sides(best))
        band = self._band(best)
        outcome = Outcome(variants={"TRL tuned": best, "TRL default": DEFAULT, "tried": tried})
        outcome.runs = [run for runs in (*found.values(), band) for run in runs]
        everyone = [*found["TRL tuned"], *band]
        for peer in ("TRL tuned", "TRL default")[: 2 if lora else 1]:
            outcome.gates[peer] = bench.judged(found[OURS], found[peer], everyone)
        goals = {"TRL default": Goal(6, 8), "TRL tuned": Goal(3, 4)}
        for peer, goal in goals.items() if lora else [("TRL tuned", Goal(1.8))]:
            pairs = bench.speed_pairs(found[OURS], found[peer], self._bench.settings.warmup)
            outcome.rows.append(
                bench.row(self._name, peer, _SPEED, goal, pairs, outcome.gates[peer])
            )
        if lora:
            outcome.rows += [self._memory(found, outcome), self._share_of_ceiling(found)]
        return outcome

    def _sides(self, best: Variant) -> dict[str, Callable[[], Run]]:
        sides: dict[str, Callable[[], Run]] = {
            OURS: self.ours,
            "TRL tuned": lambda: self._peer(best),
        }
        if self._method == "lora":
            ceiling = {"kind": "ceiling", "seconds": _CEILING_SECONDS}
            sides["TRL default"] = lambda: self._peer(DEFAULT)
            sides["ceiling"] = lambda: self._bench.processes.ours(ceiling)
        return sides

    def _band(self, best: Variant) -> list[Run]:
        """The peer from other adapters; where none is drawn, in other orders of summing."""
        if self._method == "lora":
            changes = [{"adapter": "", "seed": seed} for seed in _BAND_SEEDS]
            runs = [self._peer(best, **change) for change in changes]
        else:
            other = "eager" if best["attention"] == "sdpa" else "sdpa"
            variants = [best | {"attention": other}, best | {"micro": 2}]
            runs = [self._peer(variant) for variant in variants]
        return [run | {"side": "TRL band", "round": number} for number, run in enumerate(runs)]

    def _memory(self, found: dict[str, list[Run]], outcome: Outcome) -> dict[str, Any]:
        pairs = [
            ([ours["peak_memory"]], [theirs["peak_memory"]])
            for ours, theirs in zip(found[OURS], found["TRL tuned"], strict=False)
        ]
        goal, gate = Goal(0.5, at_most=True), outcome.gates["TRL tuned"]
        return bench.row(self._name, "TRL tuned", "peak memory", goal, pairs, gate)

    def _share_of_ceiling(self, found: dict[str, list[Run]]) -> dict[str, Any]:
        operations, pairs = self._operations(), []
        for ours, ceiling in zip(found[OURS], found["ceiling"], strict=False):
            seconds = self._measured(ours["seconds"])
            rates = [n / s for n, s in zip(operations, seconds, strict=True)]
            pairs.append((rates, [ceiling["operations_per_second"]] * len(rates)))
        figure = "operations per second by formula"
        return bench.row(self._name, "bf16 products, same cores", figure, Goal(0.5), pairs, [])

    def _operations(self) -> list[float]:
        """Of every measured step."""
        rows = json.loads(Path(self._spec["rows"]).read_text("utf-8"))
        config = json.loads((Path(self._spec["base"]) / "config.json").read_text("utf-8"))
        found = []
        for step in self._measured(rows["steps"]):
            lengths = [len(rows["ids"][place]) - 1 for place in step]
            trained = sum(sum(rows["trained"][place]) for place in step)
            rank = self._spec["lora"]["rank"]
            found.append(lora_operations(config, rank, lengths, trained))
        return found

    def _measured(self, values: Sequence[Any]) -> Sequence[Any]:
        return values[self._bench.settings.warmup :]
