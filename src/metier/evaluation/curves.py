"""Learning curves as inline SVG: one panel per arm, one pair of lines per seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element

from metier.evaluation.charts import Axis, fitted_axis
from metier.evaluation.schema import CurvePoint, SeedResult
from metier.evaluation.svg import add, element, markup

if TYPE_CHECKING:
    from markupsafe import Markup

WIDTH, HEIGHT = 320, 190
_SHAPES = ("circle", "square", "triangle", "diamond")
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 310, 10, 156


def curves_panel(arm: str, curves: Sequence[Sequence[CurvePoint]], seeds: Sequence[str]) -> Markup:
    """Training (dashed) and validation (solid) loss over steps, one pair of lines per seed.

    The evaluation of each seed whose parameters were kept carries the seed's own shape.
    """
    points = [point for curve in curves for point in curve]
    steps = fitted_axis([0.0, *(float(p.step) for p in points)], most_ticks=5)
    losses = fitted_axis([v for p in points for v in (p.train_loss, p.validation_loss)])
    svg = element("svg", class_="curves", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img")
    add(svg, "title", f"{arm}: loss during training, {len(curves)} seeds")
    add(svg, "desc", "; ".join(map(_described, seeds, curves)))
    _panel_axes(svg, steps, losses)
    for index, curve in enumerate(curves):
        add(svg, "path", d=_line(curve, "train_loss", steps, losses), class_="train")
        add(svg, "path", d=_line(curve, "validation_loss", steps, losses), class_="validation")
        best = _kept(curve)
        if best:
            x, y = _place(best.step, best.validation_loss, steps, losses)
            svg.append(_mark(index, x, y))
    return markup(svg)


def seed_names(seeds: Sequence[SeedResult], curves: Sequence[object]) -> list[str]:
    """Names of the curves' seeds; curves without a result are counted on."""
    known = [f"seed {seed.seed}" for seed in seeds]
    return known[: len(curves)] + [f"training {i + 1}" for i in range(len(known), len(curves))]


def seed_mark(index: int) -> Markup:
    """The shape of a seed, for the legend."""
    svg = element(
        "svg", class_="mark", width=14, height=14, viewBox="0 0 14 14", aria_hidden="true"
    )
    svg.append(_mark(index, 7, 7))
    return markup(svg)


def _described(seed: str, curve: Sequence[CurvePoint]) -> str:
    best = _kept(curve)
    if best is None:
        return f"{seed}: no evaluation"
    return f"{seed}: kept at step {best.step}, validation loss {best.validation_loss:.3f}"


def _kept(curve: Sequence[CurvePoint]) -> CurvePoint | None:
    """The fewest mistakes, of those the lowest loss."""
    finite = [point for point in curve if math.isfinite(point.validation_loss)]
    return min(
        finite, key=lambda p: (p.validation_mistakes or 0.0, p.validation_loss), default=None
    )


def _panel_axes(svg: Element, steps: Axis, losses: Axis) -> None:
    for tick in losses.ticks:
        _, y = _place(0, tick, steps, losses)
        add(svg, "line", x1=_LEFT, x2=_RIGHT, y1=y, y2=y, class_="grid")
        add(
            svg,
            "text",
            f"{tick:.10g}",
            x=_LEFT - 7,
            y=y,
            dy="0.35em",
            text_anchor="end",
            class_="loss",
        )
    for tick in steps.ticks:
        x, _ = _place(tick, losses.low, steps, losses)
        add(svg, "text", f"{tick:,.10g}", x=x, y=_BOTTOM + 16, text_anchor="middle", class_="step")
    add(svg, "text", "step", x=_RIGHT, y=HEIGHT - 3, text_anchor="end", class_="name")


def _line(curve: Sequence[CurvePoint], name: str, steps: Axis, losses: Axis) -> str:
    """A path through the finite values of a curve, broken where one is missing."""
    path, pen = [], "M"
    for point in curve:
        value = getattr(point, name)
        if not math.isfinite(value):
            pen = "M"
            continue
        x, y = _place(point.step, value, steps, losses)
        path.append(f"{pen}{x:g},{y:g}")
        pen = "L"
    return " ".join(path)


def _place(step: float, loss: float, steps: Axis, losses: Axis) -> tuple[float, float]:
    x = _LEFT + steps.at(step) * (_RIGHT - _LEFT)
    y = _BOTTOM - losses.at(loss) * (_BOTTOM - _TOP)
    return round(x, 2), round(y, 2)


def _mark(index: int, x: float, y: float) -> Element:
    shape = _SHAPES[index % len(_SHAPES)]
    outline = {
        "circle": "M-4,0 a4,4 0 1,0 8,0 a4,4 0 1,0 -8,0 Z",
        "square": "M-3.6,-3.6 h7.2 v7.2 h-7.2 Z",
        "triangle": "M0,-4.6 L4.6,3.6 L-4.6,3.6 Z",
        "diamond": "M0,-5 L5,0 L0,5 L-5,0 Z",
    }[shape]
    return element("path", d=outline, transform=f"translate({x:g},{y:g})", class_=f"best {shape}")
