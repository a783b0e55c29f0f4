"""Temperature, threshold and calibration error against scikit-learn and closed forms."""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV, calibration_curve
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss

from metier.model.calibration import (
    Calibration,
    best_threshold,
    calibration_error,
    mean_f1,
    temperature,
)

Floats = npt.NDArray[np.float64]


class Given(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A fitted classifier whose features are its logits."""

    def fit(self, _: Floats, labels: npt.NDArray[np.int64]) -> Self:
        self.classes_ = np.unique(labels)
        return self

    def decision_function(self, logits: Floats) -> Floats:
        return logits

    def predict(self, logits: Floats) -> npt.NDArray[np.int64]:
        return np.asarray(self.classes_[logits.argmax(1)])


def drawn(rows: int, labels: int, scale: float, seed: int = 0) -> tuple[Floats, Any]:
    """Logits that are `scale` times too sure, and labels drawn by the true ones."""
    rng = np.random.default_rng(seed)
    true = rng.normal(0, 2, (rows, labels))
    places = [rng.choice(labels, p=row) for row in softmax(true, axis=1)]
    return scale * true, np.array(places)


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_the_temperature_is_that_of_scikit_learn(scale: float) -> None:
    """The row of unknown label is given to it as every label of every row, 240 times fewer."""
    logits, places = drawn(60, 4, scale)
    features = np.repeat(logits, 240 + 4, axis=0)
    labels = np.concatenate([[*[place] * 240, *range(4)] for place in places])
    frozen = FrozenEstimator(Given().fit(features, labels))
    peer = CalibratedClassifierCV(frozen, method="temperature").fit(features, labels)
    own = softmax(logits / temperature(logits, np.eye(4)[places]), axis=1)
    assert own == pytest.approx(peer.predict_proba(logits), abs=1e-4)


@pytest.mark.parametrize("scale", [0.4, 3.0])
def test_what_was_made_too_sure_is_found_and_loses(scale: float) -> None:
    logits, places = drawn(4000, 5, scale)
    found = temperature(logits, np.eye(5)[places])
    assert found == pytest.approx(scale, rel=0.05)
    unseen, truth = drawn(4000, 5, scale, seed=1)
    before, after = softmax(unseen, axis=1), softmax(unseen / found, axis=1)
    assert log_loss(truth, after) < log_loss(truth, before) - 0.03
    right = unseen.argmax(1) == truth
    errors = [calibration_error(chances.max(1), right) for chances in (before, after)]
    assert errors[0] > 0.1 > 0.03 > errors[1]


def test_rows_that_are_all_right_do_not_make_sure() -> None:
    """Closed form: of two labels one margin apart, n right rows have n + 1/2 of n + 1."""
    for count in (5, 50):
        logits = np.tile([0.0, 2.0], (count, 1))
        expected = 2 / math.log((count + 0.5) / 0.5)
        assert temperature(logits, np.tile([0, 1], (count, 1))) == pytest.approx(expected, rel=1e-4)
        assert expit(2 / expected) == pytest.approx((count + 0.5) / (count + 1))


def test_one_margin_has_a_closed_form() -> None:
    logits = np.tile([1.5, 0.0], (10, 1))
    share = (7 + 0.5) / 11
    expected = 1.5 / math.log(share / (1 - share))
    assert temperature(logits, np.eye(2)[[0] * 7 + [1] * 3]) == pytest.approx(expected, rel=1e-4)


def test_an_untrained_head_has_some_temperature() -> None:
    assert 0.01 <= temperature(np.zeros((9, 3)), np.eye(3)[[0] * 9]) <= 100


def test_the_error_is_that_of_scikit_learns_curve() -> None:
    rng = np.random.default_rng(0)
    given = rng.beta(5, 1, 998)  # 997 is a prime: no edge of a bin is an answer
    right = rng.random(998) < given**2
    true, mean = calibration_curve(right, given, n_bins=15, strategy="quantile")
    edges = np.quantile(given, np.linspace(0, 1, 16))
    sizes = np.bincount(np.searchsorted(edges[1:-1], given), minlength=15)
    expected = (np.abs(true - mean) * sizes).sum() / 998
    assert calibration_error(given, right) == pytest.approx(expected)
    assert expected > 0.05


def test_equal_probabilities_have_one_bin_whatever_their_order() -> None:
    given, right = [0.75] * 40, [True] * 30 + [False] * 10
    assert calibration_error(given, right) == pytest.approx(0)
    assert calibration_error(given, [True] * 40) == pytest.approx(0.25)
    mixed = [0.2] * 20 + [1.0] * 20
    assert calibration_error(mixed, [True] * 4 + [False] * 16 + [True] * 20) == pytest.approx(0)
    assert calibration_error(mixed, [False] * 40) == pytest.approx(0.6)


def test_of_one_answer_the_error_is_its_own() -> None:
    assert calibration_error([0.3], [True]) == pytest.approx(0.7)


def drawn_sets(rows: int, scale: float, seed: int = 0) -> tuple[Floats, Any]:
    """Logits of four labels that are `scale` times too sure, and are there by the true ones."""
    rng = np.random.default_rng(seed)
    true = rng.normal(-1, 2, (rows, 4))
    return scale * true, (rng.random((rows, 4)) < expit(true)).astype(int)


def test_of_several_labels_the_temperature_is_a_logistic_regression() -> None:
    """Of all labels of all rows on their logit alone; half a row more has each, half has not."""
    logits, wanted = drawn_sets(50, 2.5)
    features = np.tile(logits.reshape(-1, 1), (3, 1))
    answers = np.concatenate((wanted.ravel(), np.ones(200), np.zeros(200)))
    weights = np.concatenate((np.full(200, 100.0), np.ones(400)))
    peer = LogisticRegression(C=1e9, fit_intercept=False, tol=1e-8)
    peer.fit(features, answers, sample_weight=weights)
    assert temperature(logits, wanted, several=True) == pytest.approx(
        1 / peer.coef_[0, 0], rel=1e-3
    )


def test_of_several_labels_the_temperature_is_found() -> None:
    logits, wanted = drawn_sets(4000, 2.5)
    assert temperature(logits, wanted, several=True) == pytest.approx(2.5, rel=0.05)


def test_f1_of_a_rows_labels_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    given, wanted = rng.random((2, 200, 3)) < 0.3
    expected = f1_score(wanted, given, average="samples", zero_division=1)
    # Where nothing is wanted and something given, the library and we say 0.
    assert mean_f1(given, wanted) == pytest.approx(expected)
    assert mean_f1(np.zeros((2, 3), bool), np.zeros((2, 3), bool)) == 1


def test_the_threshold_is_the_best_of_all() -> None:
    logits, wanted = drawn_sets(300, 1.0)
    chances = expit(logits)
    found = best_threshold(chances, wanted)
    scores = {
        one: f1_score(wanted, chances >= one, average="samples", zero_division=1)
        for one in np.arange(5, 96) / 100
    }
    assert scores[found] == pytest.approx(max(scores.values()))
    assert found < 0.5, "F1 forgives a label too many before one too few"
    assert best_threshold(np.array([[0.9], [0.1]]), np.array([[1], [0]])) == 0.5


def test_answers_with_several_labels() -> None:
    """Probabilities by hand: labels are given from 0.6 on, with logits divided by 2."""
    logits = np.array([[2.0, -2.0, 4.0], [-2.0, -2.0, -2.0]])
    answers = Calibration(2.0, 0.6).answers(logits, ("z", "b", "a"), [7, 9])
    assert [answer.text for answer in answers] == ['["a","z"]', "[]"]
    assert [answer.prompt_tokens for answer in answers] == [7, 9]
    p, q = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    assert answers[0].probabilities == pytest.approx({"z": p, "b": 1 - p, "a": q})
    assert answers[0].probability == pytest.approx(p * p * q)
    assert answers[1].probability == pytest.approx(p**3)
    assert answers[1].uncalibrated == pytest.approx(q**3)


def test_an_answer_with_one_label() -> None:
    (answer,) = Calibration(2.0).answers(np.array([[2.0, 0.0]]), ("b", "a"), [3])
    assert answer.text == "b"
    assert answer.probability == pytest.approx(1 / (1 + math.exp(-1)))
    assert answer.uncalibrated == pytest.approx(1 / (1 + math.exp(-2)))
    assert answer.probabilities == {}
    assert Calibration().answers(np.empty((0, 2)), ("b", "a"), []) == []
