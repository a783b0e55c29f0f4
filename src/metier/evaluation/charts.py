"""The report's charts as inline SVG: dot-and-whisker rows on a shared axis.

Rows place their marks in percent of the width, so they fit any screen without scaling their
text; names and numbers stand beside them as HTML. Colours are CSS classes of report.css (Okabe
and Ito's palette, told apart by shape as well), so they follow light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element

from metier.evaluation import units
from metier.evaluation.schema import ArmResult, Estimate, Forgotten
from metier.evaluation.svg import add, element, markup, share

if TYPE_CHECKING:
    from markupsafe import Markup


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high` with labelled ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Place of a value: 0 at the low end, 1 at the high end; values outside stand at an end."""
        place = (value - self.low) / (self.high - self.low)
        return min(max(place, 0.0), 1.0)

    def holds(self, value: float) -> bool:
        """Whether a value lies on the axis, up to rounding."""
        slack = 1e-6 * (self.high - self.low)
        return self.low - slack <= value <= self.high + slack


SCORES = Axis(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0))
"""Scores always stand on the whole axis from 0 to 100 %."""


def fitted_axis(values: Iterable[float], most_ticks: int = 6) -> Axis:
    """The shortest axis with round ticks (1, 2 or 5 times a power of ten) that holds all values."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    if high - low < 1e-9 * max(1.0, abs(low)):
        low, high = low - 0.01, high + 0.01
    step = _round_step((high - low) / (most_ticks - 2))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(step * index for index in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))


def difference_axis(arms: Sequence[ArmResult], margin: float) -> Axis:
    """Axis of the differences to the reference, wide enough for what decides.

    It holds zero, the margin and every tuned arm. Another arm that would make it more than three
    times as long is left off: its row points beyond the end and says how far.
    """
    decisive = [arm for arm in arms if arm.tuned] or list(arms)
    values = [0.0, margin, *(value for arm in decisive for value in _differences(arm))]
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    span = high - low or 0.01
    for arm in arms:
        if arm.difference is None or not math.isfinite(arm.difference.mean):
            continue
        if low - span <= arm.difference.mean <= high + span:
            values += _differences(arm)
        else:  # room for the arrow, so that it does not stand on the line of zero
            values.append(low - span / 10 if arm.difference.mean < low else high + span / 10)
    return fitted_axis(values)


def _differences(arm: ArmResult) -> list[float]:
    if arm.difference is None:
        return []
    values = [arm.difference.mean, arm.difference.low, arm.difference.high]
    return values if arm.adjusted_low is None else [*values, arm.adjusted_low]


def loss_axis(rows: Iterable[tuple[ArmResult, Forgotten]]) -> Axis:
    """Axis of what the arms lost of one ability; zero (as before) and tolerances are on it."""
    values = [0.0]
    for _, ability in rows:
        values += [ability.loss.low, ability.loss.high, ability.loss.mean, ability.tolerance]
    return fitted_axis(values)


def axis_labels(axis: Axis, unit: str = "", *, signed: bool = False) -> Markup:
    """The ticks of the rows above in hundredths: percent or points."""
    svg = element("svg", class_="axis", height=18)
    ends = {axis.ticks[0]: "start", axis.ticks[-1]: "end"}
    for tick in axis.ticks:
        number = round(tick * 100, 6)
        text = f"{number:+,.6g}" if signed and number else f"{number:,.6g}"
        add(
            svg,
            "text",
            text.replace("-", "\u2212") + unit,
            x=share(axis.at(tick)),
            y=13,
            text_anchor=ends.get(tick, "middle"),
        )
    return markup(svg)


def score_row(arm: ArmResult, reference: float, axis: Axis = SCORES) -> Markup:
    """One arm's mean score with its interval, the seeds behind it, and the reference's mean."""
    svg = _row(f"{arm.arm}: {_in_words(arm.score, units.percent)}")
    _grid(svg, axis)
    _vertical(svg, axis, reference, "reference")
    marks = _middle(svg)
    for seed in arm.seeds:
        if math.isfinite(seed.test_score):
            x = share(axis.at(seed.test_score))
            add(marks, "line", x1=x, x2=x, y1=9, y2=14, class_="seed")
    _whisker(marks, axis, arm.score, "tuned" if arm.tuned else "simpler", units.percent)
    return markup(svg)


def difference_row(arm: ArmResult, margin: float, axis: Axis) -> Markup:
    """One arm's paired difference to the reference, its adjusted lower bound, and the margin."""
    title = "the reference"
    if arm.difference is not None:
        title = _in_words(arm.difference, units.points)
    if arm.adjusted_low is not None:
        title += f", Holm-adjusted lower bound {units.points(arm.adjusted_low)}"
    svg = _row(f"{arm.arm}: {title}")
    _band(svg, axis, margin, "margin")
    _grid(svg, axis)
    _vertical(svg, axis, margin, "limit margin")
    _vertical(svg, axis, 0.0, "reference")
    if arm.difference is not None:
        marks = _middle(svg)
        _adjusted_bound(marks, axis, arm.difference.mean, arm.adjusted_low)
        _whisker(marks, axis, arm.difference, "tuned" if arm.tuned else "simpler", units.points)
    return markup(svg)


def loss_row(ability: Forgotten, arm: str, axis: Axis) -> Markup:
    """What one arm lost of one ability, against the tolerance; the right side is worse."""
    change = lost(ability)
    svg = _row(
        f"{arm}, loss of {ability.name}: {_in_words(ability.loss, change)}, "
        f"tolerance {change(ability.tolerance)}",
    )
    _band(svg, axis, ability.tolerance, "tolerance")
    _grid(svg, axis)
    _vertical(svg, axis, ability.tolerance, "limit tolerance")
    _vertical(svg, axis, 0.0, "reference")
    _whisker(_middle(svg), axis, ability.loss, "tuned" if ability.holds else "broken", change)
    return markup(svg)


def lost(ability: Forgotten) -> Callable[[float], str]:
    """How a loss of this ability is written: a rise in % of before, or a fall in points."""
    if ability.lower_is_better:
        return lambda value: f"{units.points(value)}\u00a0%"
    return units.points


def _in_words(estimate: Estimate, write: Callable[[float], str]) -> str:
    low, high = write(estimate.low), write(estimate.high)
    return f"{write(estimate.mean)}, 95 % interval {low} to {high}"


def _row(title: str) -> Element:
    """A picture as wide and high as its place on the page."""
    svg = element("svg", class_="row", role="img")
    add(svg, "title", title)
    return svg


def _grid(svg: Element, axis: Axis) -> None:
    for tick in axis.ticks:
        _vertical(svg, axis, tick, "grid")


def _middle(svg: Element) -> Element:
    """A layer whose y coordinates count, in pixels, from the middle of the row."""
    return add(svg, "svg", y="50%", class_="marks")


def _vertical(svg: Element, axis: Axis, value: float, kind: str) -> None:
    if math.isfinite(value):
        x = share(axis.at(value))
        add(svg, "line", x1=x, x2=x, y1="0", y2="100%", class_=kind)


def _band(svg: Element, axis: Axis, limit: float, kind: str) -> None:
    """The shaded stretch from zero to a limit."""
    left, right = axis.at(0.0), axis.at(limit)
    width = share(right - left)
    add(svg, "rect", x=share(left), width=width, height="100%", class_=f"band {kind}")


def _whisker(
    marks: Element, axis: Axis, estimate: Estimate, kind: str, write: Callable[[float], str]
) -> None:
    """A line from the low to the high end of the interval and a mark at the mean."""
    if not math.isfinite(estimate.mean):
        return
    if not axis.holds(estimate.mean):
        _off_the_axis(marks, estimate.mean < axis.low, kind, write(estimate.mean))
        return
    if math.isfinite(estimate.low) and math.isfinite(estimate.high):
        low, high = share(axis.at(estimate.low)), share(axis.at(estimate.high))
        add(marks, "line", x1=low, x2=high, y1=0, y2=0, class_=f"whisker {kind}")
    add(marks, "circle", cx=share(axis.at(estimate.mean)), cy=0, r=5.5, class_=f"mean {kind}")


def _off_the_axis(marks: Element, left: bool, kind: str, text: str) -> None:
    """An arrow at the end of the axis, with the number it points to."""
    end = add(marks, "svg", x="0" if left else "100%", class_="marks")
    side = 1 if left else -1
    add(end, "path", d=f"M{8 * side},-5 L0,0 L{8 * side},5", class_=f"whisker off {kind}")
    anchor = "start" if left else "end"
    add(end, "text", text, x=14 * side, dy="0.35em", text_anchor=anchor)


def _adjusted_bound(marks: Element, axis: Axis, mean: float, bound: float | None) -> None:
    """A thin line from the mean down to the adjusted bound, closed by a bracket."""
    if bound is None or not math.isfinite(bound) or not math.isfinite(mean):
        return
    place = share(axis.at(bound))
    add(marks, "line", x1=place, x2=share(axis.at(mean)), y1=0, y2=0, class_="adjusted")
    add(marks, "line", x1=place, x2=place, y1=-8, y2=8, class_="adjusted bound")
