"""Ratios of what two sides measured side by side, with an interval, and the rows of a results file.

Rows have the shape that every benchmark of the project writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Pair = tuple[Sequence[float], Sequence[float]]
"""What our side and the other measured in one round; of a training one number per measured step,
and then the steps of both sides are the same steps."""

_DRAWS, _COVERED = 10_000, (2.5, 97.5)


@dataclass(frozen=True)
class Ratio:
    """Our side over the other, and its 95 % interval; a single number on each side has none."""

    value: float
    low: float | None
    high: float | None


def ratio_of(pairs: Sequence[Pair], seed: int = 0) -> Ratio:
    """Ratio of the medians of both sides, the geometric mean over rounds.

    The interval is a percentile bootstrap (Efron and Tibshirani 1993) that draws rounds, and in a
    round steps, the same on both sides: a step has the same rows on both.

    Args:
        pairs: of every round, each with as many numbers on one side as on the other.
        seed: of the draws.

    Raises:
        ValueError: sides or rounds are of different lengths, or empty.

    """
    ours, theirs = (np.array([pair[side] for pair in pairs], dtype=float) for side in (0, 1))
    if ours.shape != theirs.shape or ours.ndim != 2 or not ours.size:
        raise ValueError(f"rounds of shapes {ours.shape} and {theirs.shape} cannot be compared")
    rounds, steps = ours.shape
    generator = np.random.default_rng(seed)
    logs = np.zeros(_DRAWS)
    for _ in range(rounds):
        chosen = generator.integers(rounds, size=(_DRAWS, 1))
        places = generator.integers(steps, size=(_DRAWS, steps))
        logs += np.log(_medians(ours[chosen, places]) / _medians(theirs[chosen, places]))
    low, high = np.exp(np.percentile(logs / rounds, _COVERED))
    value = float(np.exp(np.log(_medians(ours) / _medians(theirs)).mean()))
    return Ratio(value, float(low), float(high)) if ours.size > 1 else Ratio(value, None, None)


def _medians(values: Any) -> Any:
    return np.median(values, axis=1)


@dataclass(frozen=True)
class Goal:
    """What a ratio must reach: with its whole interval, or it is not claimed."""

    bound: float
    stretch: float | None = None
    at_most: bool = False

    def __str__(self) -> str:
        if self.at_most:
            return f"at most {self.bound:g}"
        return f"at least {self.bound:g}" + (f", stretch {self.stretch:g}" if self.stretch else "")

    def holds(self, ratio: Ratio) -> bool:
        """Whether the whole interval is on the right side."""
        if ratio.low is None or ratio.high is None:
            return False
        return ratio.high <= self.bound if self.at_most else ratio.low >= self.bound


def row(
    scenario: str, against: str, figure: str, goal: Goal, ratio: Ratio | None
) -> dict[str, Any]:
    """One row of a results file; without a ratio where a gate refused the comparison."""
    return {
        "scenario": scenario,
        "against": against,
        "figure": figure,
        "ratio": ratio and ratio.value,
        "low": ratio and ratio.low,
        "high": ratio and ratio.high,
        "goal": str(goal),
        "holds": bool(ratio and goal.holds(ratio)),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    lines = ["| scenario | against | figure | ratio | goal | |", "|---|---|---|---|---|---|"]
    for found in rows:
        shown = "not comparable"
        if found["low"] is not None:
            shown = "{ratio:.2f} ({low:.2f} to {high:.2f})".format(**found)
        elif found["ratio"] is not None:
            shown = f"{found['ratio']:.2f} (measured once)"
        verdict = "reached" if found["holds"] else "**not reached**"
        cells = (found["scenario"], found["against"], found["figure"], shown, found["goal"])
        lines.append(f"| {' | '.join(cells)} | {verdict} |")
    return "\n".join(lines) + "\n"
