"""From logits to an answer with a probability that means what it says.

Of a hundred answers that are given a probability of 0.8, eighty should be right. A classifier's
logits are divided by one number, the temperature, which is fitted on validation rows (Guo et al.
2017, arXiv 1706.04599): it changes the order of no labels. Where a row may have several labels,
those are given whose probability is above a threshold, which validation rows choose as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from metier.graders.labels import write_labels
from metier.records import Completion

BINS = 15
"""Of the calibration error, as in Guo et al. 2017."""

_LOWEST, _HIGHEST = 0.01, 100.0
_THRESHOLDS = np.arange(5, 96) / 100

Array = npt.NDArray[np.floating]
Marks = npt.NDArray[Any]
"""1 or True where a row has a label, shape (rows, labels)."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """How logits become answers.

    Attributes:
        temperature: what they are divided by.
        threshold: where a row may have several labels, the probability from which one is given;
            None where it has one, the likeliest.

    """

    temperature: float = 1.0
    threshold: float | None = None

    @classmethod
    def fitted(cls, logits: Array, wanted: Marks, *, several: bool) -> Calibration:
        """Fit it on validation rows.

        Args:
            logits: shape (rows, labels).
            wanted: which labels the rows have.
            several: whether a row may have several labels.

        """
        found = temperature(logits, wanted, several=several)
        return cls(found, best_threshold(_sigmoid(logits / found), wanted) if several else None)

    def chosen(self, logits: Array) -> npt.NDArray[np.bool_]:
        """Which labels are given, shape (rows, labels)."""
        if self.threshold is None:
            return np.asarray(np.arange(logits.shape[1]) == logits.argmax(1)[:, None])
        return np.asarray(_sigmoid(logits / self.temperature) >= self.threshold)

    def answers(
        self, logits: Array, labels: Sequence[str], prompt_tokens: Sequence[int]
    ) -> list[Completion]:
        """An answer for each row: its label, or the list of its labels, with its probability.

        The probability of a list is that of each of its labels and of none beside them, as if
        they did not depend on each other.

        Args:
            logits: shape (rows, labels).
            labels: in the order of the logits.
            prompt_tokens: read for each row.

        """
        logits = np.asarray(logits, dtype=np.float64)
        chosen, several = self.chosen(logits), self.threshold is not None
        sure = _share(logits / self.temperature, chosen, several)
        before = _share(logits, chosen, several)
        each = _sigmoid(logits / self.temperature) if several else np.empty((len(logits), 0))
        found = []
        for row, tokens in enumerate(prompt_tokens):
            given = [label for label, here in zip(labels, chosen[row], strict=True) if here]
            found.append(
                Completion(
                    write_labels(given) if several else given[0],
                    tokens,
                    probability=float(sure[row]),
                    uncalibrated=float(before[row]),
                    probabilities=dict(zip(labels, each[row].tolist(), strict=False)),
                )
            )
        return found


def _share(logits: Array, chosen: npt.NDArray[np.bool_], several: bool) -> Array:
    """Probability of the chosen labels of each row, shape (rows,)."""
    from scipy.special import log_expit, log_softmax

    if several:
        return np.asarray(np.exp(log_expit(np.where(chosen, logits, -logits)).sum(1)))
    return np.asarray(np.exp(log_softmax(logits, axis=1))[chosen])


def _sigmoid(logits: Array) -> Array:
    from scipy.special import expit

    return np.asarray(expit(logits))


def temperature(logits: Array, wanted: Marks, *, several: bool = False) -> float:
    """The temperature under which validation labels are likeliest.

    Guo et al. minimise cross-entropy alone, which falls without end where all rows are right, as
    in a small validation part. So the rows count as n and one more of unknown label stands beside
    them, as in Platt 1999 ("Probabilistic Outputs for Support Vector Machines", 2.2).

    Args:
        logits: shape (rows, labels).
        wanted: which labels the rows have.
        several: whether each label has a probability of its own, or all of them together one.

    """
    from scipy.special import logsumexp

    logits = np.asarray(logits, dtype=np.float64)
    known, unknown = len(logits) / (len(logits) + 1), 0.5 if several else 1 / logits.shape[1]
    shares = known * np.asarray(wanted) + (1 - known) * unknown
    reached = (shares * logits).sum(1).mean()

    def all_of(inverse: float) -> float:
        if several:
            return float(np.logaddexp(0, inverse * logits).sum(1).mean())
        return float(logsumexp(inverse * logits, axis=1).mean())

    return _least(lambda inverse: all_of(inverse) - inverse * reached)


def _least(loss: Callable[[float], float]) -> float:
    """The temperature of the least loss, which is a convex function of its inverse."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log: loss(float(np.exp(-log))),
        bounds=(np.log(_LOWEST), np.log(_HIGHEST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))


def best_threshold(probabilities: Array, wanted: Marks) -> float:
    """The threshold from 0.05 to 0.95 with the highest mean F1 of a row's labels.

    Of equal ones that nearest to a half, where a label becomes likelier than not.

    Args:
        probabilities: of each label, shape (rows, labels).
        wanted: which labels the rows have.

    """
    scores = [mean_f1(probabilities >= one, np.asarray(wanted)) for one in _THRESHOLDS]
    best = _THRESHOLDS[np.isclose(scores, max(scores))]
    return float(best[np.abs(best - 0.5).argmin()])


def mean_f1(given: Marks, wanted: Marks) -> float:
    """Mean over rows of the F1 of their labels; 1 where there are none and none are given."""
    hits = np.logical_and(given, wanted).sum(1)
    total = given.sum(1) + wanted.sum(1)
    return float(np.where(total, 2 * hits / np.maximum(total, 1), 1.0).mean())


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
