"""Temperature and calibration error against scikit-learn and closed forms."""

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
from sklearn.metrics import log_loss

from metier.model.calibration import calibration_error, temperature

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
    own = softmax(logits / temperature(logits, places), axis=1)
    assert own == pytest.approx(peer.predict_proba(logits), abs=1e-4)


@pytest.mark.parametrize("scale", [0.4, 3.0])
def test_what_was_made_too_sure_is_found_and_loses(scale: float) -> None:
    logits, places = drawn(4000, 5, scale)
    found = temperature(logits, places)
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
        assert temperature(logits, [1] * count) == pytest.approx(expected, rel=1e-4)
        assert expit(2 / expected) == pytest.approx((count + 0.5) / (count + 1))


def test_one_margin_has_a_closed_form() -> None:
    logits = np.tile([1.5, 0.0], (10, 1))
    share = (7 + 0.5) / 11
    expected = 1.5 / math.log(share / (1 - share))
    assert temperature(logits, [0] * 7 + [1] * 3) == pytest.approx(expected, rel=1e-4)


def test_an_untrained_head_has_some_temperature() -> None:
    assert 0.01 <= temperature(np.zeros((9, 3)), [0] * 9) <= 100


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
