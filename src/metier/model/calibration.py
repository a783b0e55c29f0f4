"""Probabilities that mean what they say, and how far they do not.

Of a hundred answers that are given a probability of 0.8, eighty should be right. A classifier's
logits are divided by one number, the temperature, which is fitted on validation rows (Guo et al.
2017, arXiv 1706.04599): no answer changes, as their order does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

BINS = 15
"""Of the calibration error, as in Guo et al. 2017."""

_LOWEST, _HIGHEST = 0.01, 100.0

Array = npt.NDArray[np.floating]


def temperature(logits: Array, places: Sequence[int]) -> float:
    """The temperature under which validation labels are likeliest.

    Guo et al. minimise cross-entropy alone, which falls without end where all rows are right, as
    in a small validation part. So the rows count as n and one more of unknown label stands beside
    them, as in Platt 1999 ("Probabilistic Outputs for Support Vector Machines", 2.2).

    Args:
        logits: shape (rows, labels).
        places: of the right label of each row.

    """
    from scipy.special import logsumexp

    logits = np.asarray(logits, dtype=np.float64)
    right = np.take_along_axis(logits, np.asarray(places)[:, None], 1).mean()
    known = len(logits) / (len(logits) + 1)
    wanted = known * right + (1 - known) * logits.mean()
    return _least(lambda inverse: logsumexp(inverse * logits, axis=1).mean() - inverse * wanted)


def _least(loss: Callable[[float], float]) -> float:
    """The temperature of the least loss, which is a convex function of its inverse."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log: loss(np.exp(-log)),
        bounds=(np.log(_LOWEST), np.log(_HIGHEST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))


def calibration_error(probabilities: Sequence[float], right: Sequence[bool]) -> float:
    """Expected calibration error (Naeini et al. 2015): how far confidence is from being right.

    The answers are cut by their probability into 15 bins of equally many, as most probabilities of
    a good arm are near one and equally wide bins would be empty there or hold nearly all (Nixon et
    al. 2019, arXiv 1904.01685). Equal probabilities stand in one bin. The error is the mean over
    answers of the distance, in their bin, between mean probability and share of right answers. Of
    few answers it is above zero by chance alone.

    Args:
        probabilities: of the answers, each by the arm that gave it.
        right: whether each answer is right.

    """
    given = np.asarray(probabilities, dtype=np.float64)
    edges = np.quantile(given, np.linspace(0, 1, BINS + 1))
    bins = np.searchsorted(edges[1:-1], given)
    excess = np.bincount(bins, given - np.asarray(right, dtype=np.float64), BINS)
    return float(np.abs(excess).sum() / len(given))
