"""Charts say what the numbers say: marks are read back against the labels of the axis."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.evaluation import charts
from metier.evaluation.schema import Estimate

from .html_tree import Node, read
from .sample_verdicts import ALL, arm, around, forgotten, tuned

ESTIMATES = (
    st.lists(st.floats(-1, 1), min_size=3, max_size=3)
    .map(sorted)
    .map(lambda ends: Estimate(low=ends[0], mean=ends[1], high=ends[2]))
)


def place(text: str) -> float:
    assert text.endswith("%")
    return float(text[:-1])


def ruler(axis: charts.Axis, *, signed: bool = True):
    """From a place in percent of the width to what an eye reads between the printed labels."""
    labels = list(read(str(charts.axis_labels(axis, signed=signed))).all("text"))
    marks = [(place(one["x"]), float(one.text.replace("\u2212", "-"))) for one in labels]
    anchors = [one["text-anchor"] for one in labels]  # the middle, or the end of the picture
    assert anchors == ["start", *["middle"] * (len(labels) - 2), "end"]
    (x0, v0), (x1, v1) = marks[0], marks[-1]
    for x, value in marks:
        assert v0 + (x - x0) / (x1 - x0) * (v1 - v0) == pytest.approx(value, abs=1e-3 * (v1 - v0))
    return lambda x: v0 + (place(x) - x0) / (x1 - x0) * (v1 - v0)


def read_estimate(row: Node, value) -> tuple[float, float, float]:
    line, dot = row.one("line", "whisker"), row.one("circle", "mean")
    return value(line["x1"]), value(dot["cx"]), value(line["x2"])


def in_hundredths(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.low * 100, estimate.mean * 100, estimate.high * 100


def check_difference(row: Node, one, margin: float, axis: charts.Axis) -> None:
    value = ruler(axis)
    near = pytest.approx
    slack = (axis.high - axis.low) * 0.01
    assert read_estimate(row, value) == near(in_hundredths(one.difference), abs=slack)
    band = row.one("rect", "margin")
    left = place(band["x"])
    assert value(band["x"]) == near(0, abs=slack)
    assert value(f"{left + place(band['width'])}%") == near(margin * 100, abs=slack)
    assert value(row.one("line", "limit")["x1"]) == near(margin * 100, abs=slack)
    assert value(row.one("line", "reference")["x1"]) == near(0, abs=slack)
    if one.adjusted_low is not None:
        assert value(row.one("line", "bound")["x1"]) == near(one.adjusted_low * 100, abs=slack)


@pytest.mark.parametrize("name", ALL)
def test_score_marks_stand_where_the_axis_says(name):
    verdict, _ = ALL[name]()
    value = ruler(charts.SCORES, signed=False)
    for one in verdict.arms:
        row = read(str(charts.score_row(one, 0.5)))
        assert read_estimate(row, value) == pytest.approx(in_hundredths(one.score), abs=0.001)
        assert value(row.one("line", "reference")["x1"]) == pytest.approx(50)
        seeds = [value(line["x1"]) for line in row.all("line", "seed")]
        assert seeds == pytest.approx([s.test_score * 100 for s in one.seeds], abs=0.001)


@pytest.mark.parametrize("name", ["shipping", "simpler", "hostile"])
def test_difference_marks_stand_where_the_axis_says(name):
    verdict, _ = ALL[name]()
    axis = charts.difference_axis(verdict.arms, verdict.margin)
    on_axis = [
        one
        for one in verdict.arms
        if one.difference and axis.low <= one.difference.mean <= axis.high
    ]
    assert {one.arm for one in verdict.arms if one.tuned} <= {one.arm for one in on_axis}
    for one in on_axis:
        row = read(str(charts.difference_row(one, verdict.margin, axis)))
        check_difference(row, one, verdict.margin, axis)


@settings(max_examples=40)
@given(ESTIMATES, st.floats(-1, 1), st.floats(0, 0.5))
def test_any_difference_is_drawn_where_the_axis_says(difference, bound, margin):
    one = tuned("lora", 0.5, 0.0, bound, difference=difference)
    axis = charts.difference_axis([one], margin)
    check_difference(read(str(charts.difference_row(one, margin, axis))), one, margin, axis)


def test_a_mark_that_was_moved_is_noticed():
    one = tuned("lora", 0.5, 0.05, 0.03)
    axis = charts.difference_axis([one], 0.02)
    row = read(str(charts.difference_row(one, 0.02, axis)))
    dot = row.one("circle", "mean")
    dot.attributes["cx"] = f"{place(dot['cx']) + 2}%"
    with pytest.raises(AssertionError):
        check_difference(row, one, 0.02, axis)


@pytest.mark.parametrize(("mean", "side", "anchor"), [(-0.8, "0", "start"), (0.9, "100%", "end")])
def test_an_arm_far_off_does_not_stretch_the_axis_but_is_pointed_at(mean, side, anchor):
    near, far = tuned("lora", 0.5, 0.05, 0.03), arm("prompt", 0.1, difference=around(mean, 0.02))
    axis = charts.difference_axis([near, far], 0.02)
    assert axis.high - axis.low < 0.3
    row = read(str(charts.difference_row(far, 0.02, axis)))
    assert not list(row.all("circle"))
    arrow = next(part for part in row.all("svg", "marks") if list(part.all("path", "off")))
    assert list(row.all("svg", "marks"))[1]["x"] == side
    label = arrow.one("text")
    assert label["text-anchor"] == anchor
    assert label.text.replace("\u2212", "-") == f"{mean * 100:+.1f}"


@pytest.mark.parametrize("text_loss", [0.016, -0.004, 0.2])
def test_losses_stand_where_the_axis_says(text_loss):
    for ability in forgotten(text_loss):
        rows = [(arm("lora", 0.5), ability)]
        axis = charts.loss_axis(rows)
        row = read(str(charts.loss_row(ability, "lora", axis)))
        value = ruler(axis)
        near = pytest.approx(in_hundredths(ability.loss), abs=0.01)
        assert read_estimate(row, value) == near
        limit = value(row.one("line", "limit")["x1"])
        assert limit == pytest.approx(ability.tolerance * 100, abs=0.01)


def test_a_broken_ability_has_another_mark_and_says_so_in_words():
    kept, broken = forgotten(0.01, 0.05, holds=False)
    for ability, kind in ((kept, "tuned"), (broken, "broken")):
        row = read(
            str(charts.loss_row(ability, "lora", charts.loss_axis([(arm("x", 0.5), ability)])))
        )
        assert kind in row.one("circle")["class"].split()
        assert "tolerance" in row.one("title").inside[0]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_an_axis_holds_all_values_on_few_round_ticks(values):
    axis = charts.fitted_axis(values)
    slack = 1e-6 * (axis.high - axis.low)
    assert axis.low - slack <= min(values)
    assert max(values) <= axis.high + slack
    assert 3 <= len(axis.ticks) <= 8
    steps = [b - a for a, b in zip(axis.ticks, axis.ticks[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps))
    leading = float(f"{steps[0]:.6e}".partition("e")[0])
    assert leading in (1, 2, 5)


def test_values_that_are_not_finite_are_left_out():
    nowhere = Estimate(mean=math.nan, low=math.nan, high=math.nan)
    one = tuned("lora", 0.5, 0.0, math.nan, difference=nowhere, score=nowhere)
    axis = charts.difference_axis([one], 0.02)
    for row in (charts.score_row(one, math.nan), charts.difference_row(one, 0.02, axis)):
        assert "nan" not in str(row)
        assert not list(read(str(row)).all("circle"))


def test_every_picture_says_in_words_what_it_shows():
    verdict, _ = ALL["shipping"]()
    axis = charts.difference_axis(verdict.arms, verdict.margin)
    for one in verdict.arms:
        for row in (charts.score_row(one, 0.5), charts.difference_row(one, 0.02, axis)):
            picture = read(str(row)).inside[0]
            assert picture["role"] == "img"
            assert picture.inside[0].tag == "title"
            assert one.arm in picture.inside[0].inside[0]
