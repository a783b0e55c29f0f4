"""Greedy answers against Transformers' generate, with a shared prefix and without one."""

from __future__ import annotations

import json
from typing import Any

from metier.model.load import starter_path
from training import bench, gates
from training.bench import OURS, Bench, Outcome, Run, Variant
from training.figures import Goal

_PEER = "Transformers generate"
_BATCHES = (16, 32, 64, 128, 256)
# In float32 both sides must write the same; two tokens this near are a matter of rounding.
_FLOAT32_TIE = 1e-3
_KINDS = {
    "prefix": ("with a shared prefix of 400 tokens", Goal(6)),
    "plain": ("without a shared prefix", Goal(1.5)),
}


class Answering:
    """The same prompts as ids on both sides; what is written is compared."""

    def __init__(self, where: Bench) -> None:
        self._bench, settings = where, where.settings
        path = where.material("prompts", settings.prompts)
        self._prompts: dict[str, Any] = json.loads((path / "prompts.json").read_text("utf-8"))
        self._spec = {
            "kind": "generate",
            "base": str(path.parent / "base"),
            "new_tokens": settings.new_tokens,
            "dtype": "",
            "warm": 4,
        }

    def ours(self, profile: bool = False) -> Run:
        """Run our side once, with a shared prefix."""
        return self._ask("prefix")

    def _ask(self, kind: str, **changes: Any) -> Run:
        spec = self._spec | {"prompts": self._prompts[kind]} | changes
        run = self._bench.processes.peer if "variant" in spec else self._bench.processes.ours
        return run(spec)

    def compare(self) -> Outcome:
        """Measure both sides and judge."""
        outcome = Outcome()
        small = {"base": str(starter_path()), "dtype": "float32"}
        outcome.gates["float32"] = self._differences(
            self._ask("starter", **small),
            self._ask("starter", variant={"batch": 16}, **small),
            "starter",
            small["base"],
            _FLOAT32_TIE,
        )
        for kind in _KINDS:
            self._measure(kind, outcome)
        return outcome

    def _measure(self, kind: str, outcome: Outcome) -> None:
        batch, tried = self._best_batch(kind)
        found = self._bench.rounds(
            {
                OURS: lambda: self._ask(kind),
                _PEER: lambda: self._ask(kind, variant=batch),
            }
        )
        gate = [*outcome.gates["float32"], *gates.same_torch([*found[OURS], *found[_PEER]])]
        if not found[_PEER]:
            gate.append("the peer gave no result")
        for ours, theirs in zip(found[OURS][:1], found[_PEER][:1], strict=False):
            gate += self._differences(ours, theirs, kind, self._spec["base"], gates.TIE)
            same = sum(a == b for a, b in zip(ours["texts"], theirs["texts"], strict=True))
            outcome.variants[kind] = {"batch": batch, "tried": tried, "same texts": same}
        outcome.gates[kind] = gate
        described, goal = _KINDS[kind]
        count = len(self._prompts[kind])
        name = f"{count} greedy answers {described}, {self._bench.processes.threads} cores"
        pairs = [
            ([1 / ours["seconds"]], [1 / theirs["seconds"]])
            for ours, theirs in zip(found[OURS], found[_PEER], strict=False)
        ]
        outcome.rows.append(bench.row(name, _PEER, "answers per second", goal, pairs, gate))
        outcome.runs += [
            {key: value for key, value in run.items() if key != "texts"} | {"prompts": kind}
            for runs in found.values()
            for run in runs
        ]

    def _best_batch(self, kind: str) -> tuple[Variant, list[Variant]]:
        start: Variant = {"batch": _BATCHES[1]}
        if not self._bench.settings.tries:
            return start, []
        count = len(self._prompts[kind])
        return bench.search(
            lambda variant: count / float(self._ask(kind, variant=variant)["seconds"]),
            start,
            {"batch": _BATCHES},
        )

    def _differences(self, ours: Run, theirs: Run, kind: str, base: str, tie: float) -> list[str]:
        """What speaks against both sides having written the same."""
        texts = {"ours": ours["texts"], "theirs": theirs["texts"]}
        spec = {"kind": "gaps", "base": base, "prompts": self._prompts[kind]}
        gaps = self._bench.processes.ours(spec | texts)["gaps"]
        return gates.same_texts(ours["texts"], theirs["texts"], gaps, tie)
