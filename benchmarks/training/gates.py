"""Whether two sides did the same work; without that no speed is reported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

TOLERANCE = 2e-2
"""Nats by which losses in bfloat16 may differ."""
TIE = 0.1
"""Nats between two next tokens that bfloat16 may confuse."""

_COUNTS = ("tokens", "trained", "contents")

Run = Mapping[str, Any]


def same_training(
    ours: Sequence[Run], peers: Sequence[Run], band: Sequence[Run], tolerance: float = TOLERANCE
) -> list[str]:
    """What speaks against trainings being the same; nothing, and they are.

    Every step of every run must have read the same rows and trained the same tokens, the number of
    both included. The first loss of our side
    must be the peer's within the tolerance, and every loss must lie inside the peer's band: from
    the least to the greatest that any of its runs had at that step, widened by the tolerance.

    Args:
        ours: our runs, with the figures of `common.Steps`.
        peers: the peer's runs that are compared.
        band: more of the peer's runs, which differ by seed or number format only.
        tolerance: in nats.

    """
    everyone = [*ours, *peers, *band]
    if len(lengths := {len(run[name]) for run in everyone for name in (*_COUNTS, "losses")}) > 1:
        return [f"runs have {sorted(lengths)} steps"]
    found = [
        f"step {step}: the runs' {name} differ ({', '.join(map(str, sorted(values)))})"
        for name in _COUNTS
        for step, values in enumerate(_by_step(name, everyone))
        if len(values) > 1
    ]
    theirs = _by_step("losses", [*peers, *band])
    for number, run in enumerate(ours):
        first = abs(run["losses"][0] - peers[0]["losses"][0])
        if not first <= tolerance:
            found.append(f"our run {number}: first loss differs by {first:.4f}")
        for step, (loss, band_of) in enumerate(zip(run["losses"], theirs, strict=True)):
            low, high = min(band_of) - tolerance, max(band_of) + tolerance
            if not (math.isfinite(loss) and low <= loss <= high):
                found.append(
                    f"our run {number}, step {step}: loss {loss:.4f}, peer {low:.4f} to {high:.4f}"
                )
    return found


def same_torch(runs: Sequence[Run]) -> list[str]:
    """What speaks against both sides having the same library for their products."""
    found = sorted({run["versions"]["torch"] for run in runs})
    return [f"different builds of torch: {', '.join(found)}"] if len(found) > 1 else []


def same_texts(
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
    gaps: Sequence[float],
    tie: float = TIE,
) -> list[str]:
    """What speaks against texts being the same, ties of the number format aside.

    Args:
        ours: ids that our side wrote for every prompt.
        theirs: ids that the peer wrote.
        gaps: of every text that differs, nats between both next tokens where it first does.
        tie: nats up to which number formats may choose differently.

    """
    found = []
    if len(ours) != len(theirs):
        found.append(f"{len(ours)} texts of ours, {len(theirs)} of the peer")
    if len(gaps) != sum(list(a) != list(b) for a, b in zip(ours, theirs, strict=False)):
        found.append("there is not one gap for every text that differs")
    return [*found, *(f"a text differs by {gap:.3f} nats" for gap in gaps if not gap <= tie)]


def _by_step(name: str, runs: Sequence[Run]) -> list[set[float]]:
    """Of every step, all values that runs had."""
    return [set(values) for values in zip(*(run[name] for run in runs), strict=True)]
