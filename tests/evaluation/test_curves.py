"""Learning curves: paths are read back against the labels of both axes."""

from __future__ import annotations

import math
import re

import pytest

from metier.evaluation import curves
from metier.evaluation.schema import CurvePoint

from .html_tree import Node, read
from .sample_verdicts import curve, tuned

NUMBER = r"(-?[\d.]+)"


def panel(*all_curves) -> Node:
    names = [f"seed {i}" for i in range(len(all_curves))]
    return read(str(curves.curves_panel("lora", all_curves, names)))


def scale(labels: list[tuple[float, float]]):
    """The line through the first and last (place, label); all others lie on it."""
    (x0, v0), (x1, v1) = labels[0], labels[-1]
    for x, value in labels:
        assert v0 + (x - x0) / (x1 - x0) * (v1 - v0) == pytest.approx(value, abs=(v1 - v0) * 1e-3)
    return lambda x: v0 + (x - x0) / (x1 - x0) * (v1 - v0)


def scales(picture: Node):
    number = [
        (kind, float(one["x"]), float(one["y"]), float(one.text.replace(",", "")))
        for kind in ("step", "loss")
        for one in picture.all("text", kind)
    ]
    return (
        scale([(x, value) for kind, x, _, value in number if kind == "step"]),
        scale([(y, value) for kind, _, y, value in number if kind == "loss"]),
    )


def read_path(path: str, step, loss) -> list[tuple[float, float]]:
    return [(step(float(x)), loss(float(y))) for x, y in re.findall(f"[ML]{NUMBER},{NUMBER}", path)]


@pytest.mark.parametrize("kind", ["train", "validation"])
def test_lines_pass_through_the_recorded_losses(kind):
    drawn = [curve(seed) for seed in range(3)]
    picture = panel(*drawn)
    step, loss = scales(picture)
    paths = list(picture.all("path", kind))
    assert len(paths) == 3
    for path, points in zip(paths, drawn, strict=True):
        expected = [
            (p.step, getattr(p, f"{kind}_loss"))
            for p in points
            if math.isfinite(getattr(p, f"{kind}_loss"))
        ]
        found = read_path(path["d"], step, loss)
        assert len(found) == len(expected) >= 13
        for (x, y), (wanted_x, wanted_y) in zip(found, expected, strict=True):
            assert x == pytest.approx(wanted_x, abs=3)
            assert y == pytest.approx(wanted_y, abs=0.01)


def test_what_was_kept_of_each_seed_carries_its_own_shape():
    drawn = [curve(seed) for seed in range(3)]
    picture = panel(*drawn)
    step, loss = scales(picture)
    marks = list(picture.all("path", "best"))
    assert len({mark["class"] for mark in marks}) == 3
    for mark, points in zip(marks, drawn, strict=True):
        x, y = re.match(rf"translate\({NUMBER},{NUMBER}\)", mark["transform"]).groups()
        best = min(points, key=lambda point: point.validation_loss)
        assert step(float(x)) == pytest.approx(best.step, abs=3)
        assert loss(float(y)) == pytest.approx(best.validation_loss, abs=0.01)


def test_fewer_mistakes_count_more_than_a_lower_loss():
    mistakes = [0.5, 0.2, 0.3]
    points = [
        CurvePoint(step=i, train_loss=1.0, validation_loss=3.0 - i, validation_mistakes=share)
        for i, share in enumerate(mistakes)
    ]
    assert "kept at step 1, validation loss 2.000" in panel(points).one("desc").inside[0]


def test_a_missing_value_breaks_the_line_instead_of_bridging_it():
    points = [CurvePoint(step=i, train_loss=1.0, validation_loss=2.0) for i in range(5)]
    points[2] = CurvePoint(step=2, train_loss=math.nan, validation_loss=math.inf)
    picture = panel(points)
    for kind in ("train", "validation"):
        path = picture.one("path", kind)["d"]
        assert path.count("M") == 2
        assert path.count("L") == 2
        assert "nan" not in path


def test_a_curve_of_nothing_finite_is_drawn_as_an_empty_panel():
    picture = panel([CurvePoint(step=0, train_loss=math.nan, validation_loss=math.nan)])
    assert not list(picture.all("path", "best"))
    assert "no evaluation" in picture.one("desc").inside[0]


def test_one_single_evaluation_is_drawn():
    picture = panel([CurvePoint(step=10, train_loss=1.5, validation_loss=1.5)])
    assert len(list(picture.all("path", "best"))) == 1


def test_curves_without_a_result_still_have_a_name():
    seeds = tuned("lora", 0.5, 0.1, 0.05).seeds
    assert curves.seed_names(seeds[:2], [(), (), ()]) == ["seed 0", "seed 1", "training 3"]
    assert curves.seed_names(seeds, [()]) == ["seed 0"]
