"""What all scenarios share: how much is measured, rounds of both sides, the peer's best variant."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from metier.runs import file_hash, fingerprint
from training import figures, gates
from training.figures import Goal, Pair
from training.processes import NoResultError, Processes

Run = dict[str, Any]
Variant = dict[str, Any]

OURS = "metier"


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        rounds: of A B A B, each in fresh processes.
        warmup: first steps of a training, which do not count.
        measured: steps that count.
        tries: steps with which a variant of the peer is tried; 0: the first variant is taken.
        prompts: that are answered.
        new_tokens: of each answer at most.
        rows: of the data file whose training is started.
        layers: of the base, which has 30.
        parts: micro-batches of a pre-training step.

    """

    rounds: int = 5
    warmup: int = 10
    measured: int = 70
    tries: int = 8
    prompts: int = 256
    new_tokens: int = 64
    rows: int = 10_000
    layers: int = 30
    parts: int = 8

    @property
    def steps(self) -> int:
        """Of a training."""
        return self.warmup + self.measured


QUICK = Settings(
    rounds=1,
    warmup=2,
    measured=6,
    tries=0,
    prompts=24,
    new_tokens=8,
    rows=400,
    layers=4,
    parts=1,
)


@dataclass
class Outcome:
    """What a scenario gives.

    Attributes:
        rows: of the table.
        gates: what spoke against a comparison, by peer; empty lists where nothing did.
        variants: of the peer that were tried, with what came out, and the one chosen.
        runs: everything that was measured.

    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    gates: dict[str, list[str]] = field(default_factory=dict)
    variants: dict[str, Any] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    """Where and how everything is measured."""

    processes: Processes
    settings: Settings
    data: Path

    def material(self, what: str, count: int) -> Path:
        """A directory of what both sides are given, written when first asked for."""
        source = Path(__file__).with_name("material.py")
        layers = self.settings.layers
        key = fingerprint([file_hash(source), str(self.data.resolve()), layers])[:8]
        work = self.processes.work / f"material-{key}"
        spec = {"what": what, "count": count, "work": str(work), "data": str(self.data)}
        if not (work / f"{what}-{count}").exists():
            self.processes.ours({"kind": "material", "layers": layers, **spec})
        return work / f"{what}-{count}"

    def watched(self, profile: bool) -> dict[str, Any]:
        """What to tell a training of ours whose operators are to be seen: three steady steps."""
        if not profile:
            return {}
        first, last = self.settings.warmup, self.settings.warmup + 3
        return {"profile": [first, last], "steps": last}

    @property
    def shape(self) -> str:
        """Of the base, for people."""
        layers = self.settings.layers
        return "SmolLM2-135M shape" + ("" if layers == 30 else f" with {layers} layers")

    def rounds(self, sides: Mapping[str, Callable[[], Run]]) -> dict[str, list[Run]]:
        """Run all sides in turn; a side that failed once is left out from then on."""
        found: dict[str, list[Run]] = {name: [] for name in sides}
        for number in range(self.settings.rounds):
            for name, run in sides.items():
                if len(found[name]) < number:
                    continue
                print(f"  round {number + 1}: {name}", flush=True)
                try:
                    found[name].append(run() | {"side": name, "round": number})
                except NoResultError as error:
                    if name == OURS:
                        raise
                    print(f"  {name} gave no result: {error}", flush=True)
        return found


class Scenario(Protocol):
    """A comparison."""

    def ours(self, profile: bool = False) -> Run:
        """Run our side once."""
        ...

    def compare(self) -> Outcome:
        """Measure both sides and judge."""
        ...


def search(
    measure: Callable[[Variant], float], start: Variant, choices: Mapping[str, Sequence[Any]]
) -> tuple[Variant, list[Variant]]:
    """The fastest variant of a peer, changed in one respect at a time, and all that were tried.

    Args:
        measure: what a variant does in a second.
        start: the first variant.
        choices: by name, what else is tried.

    """
    tried: list[Variant] = []

    def rate(variant: Variant) -> float:
        try:
            found = measure(variant)
        except NoResultError as error:
            tried.append(variant | {"failed": str(error)[-300:]})
            return 0.0
        print(f"  {found:,.1f} a second: {variant}", flush=True)
        tried.append(variant | {"rate": found})
        return found

    best, fastest = start, rate(start)
    for name, values in choices.items():
        for value in values:
            variant = best | {name: value}
            if variant != best and (found := rate(variant)) > fastest:
                best, fastest = variant, found
    return best, tried


def choose(
    bench: Bench, run: Callable[[Variant, int], Run], start: Variant, choices: Any
) -> tuple[Variant, list[Variant]]:
    """The fastest variant of a trainer; in a quick look the first."""
    tries = bench.settings.tries
    if not tries:
        return start, []

    def rate(variant: Variant) -> float:
        return statistics.median(speeds(run(variant, tries))[-tries // 2 :])

    return search(rate, start, choices)


def speeds(run: Run) -> list[float]:
    """Real tokens per second of every step."""
    return [n / s for n, s in zip(run["tokens"], run["seconds"], strict=True)]


def judged(ours: list[Run], peers: list[Run], band: list[Run]) -> list[str]:
    """What speaks against a comparison of trainings."""
    if not peers:
        return ["the peer gave no result"]
    return gates.same_torch([*ours, *peers]) + gates.same_training(ours, peers, band)


def speed_pairs(ours: list[Run], peers: list[Run], warmup: int) -> list[Pair]:
    """Tokens per second of both sides, round by round, after the warm-up."""
    return [
        (speeds(own)[warmup:], speeds(other)[warmup:])
        for own, other in zip(ours, peers, strict=False)
    ]


def row(
    name: str, against: str, figure: str, goal: Goal, pairs: Sequence[Pair], against_it: list[str]
) -> dict[str, Any]:
    """A row of the results; without a ratio where something speaks against the comparison."""
    ratio = figures.ratio_of(pairs) if pairs and not against_it else None
    return figures.row(name, against, figure, goal, ratio)
