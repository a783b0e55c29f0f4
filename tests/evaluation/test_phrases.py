"""Numbers in sentences claim nothing that rounding would change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.evaluation import phrases


@given(st.integers(-3000, 3000), st.sampled_from([0.0, 0.0025, 0.01, 0.02, 0.025, 0.1]))
def test_a_bound_is_written_on_its_own_side_of_the_margin(ten_thousandths, margin):
    bound = ten_thousandths / 10_000 + 0.00004
    written = float(phrases.bound_in_points(bound, margin).split()[0].replace("\u2212", "-"))
    assert (written > round(margin * 100, 6)) == (bound > margin)


def test_a_margin_keeps_its_decimals():
    assert phrases.margin_in_points(0.02) == "2.0 points"
    assert phrases.margin_in_points(0.0025) == "0.25 points"
    assert phrases.margin_in_points(0.07) == "7.0 points"


@pytest.mark.parametrize(
    ("names", "text"), [(["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")]
)
def test_names_are_listed(names, text):
    assert phrases.listed(iter(names)) == text


def test_things_are_counted():
    assert phrases.counted(1, "seed") == "1 seed"
    assert phrases.counted(1204, "example") == "1,204 examples"
