"""A few rows by heart: who can, and that what is broken is found and named."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metier import recipes
from metier.errors import ConfigError
from metier.model.world import World
from metier.recipes import making, overfitting
from metier.recipes.overfitting import Overfit
from metier.recipes.workbench import open_workbench, read_task
from metier.training.preflight import Prepared
from tests.recipes.conftest import write_task

TRAINING = {"max_length": 128, "rehearsal": 0, "seeds": [0]}


@pytest.fixture
def task(tmp_path: Path, stories260k: Path) -> Path:
    return write_task(tmp_path, stories260k, training=TRAINING)


def tried(task: Path, arm: str, *overrides: str) -> Overfit:
    before = sorted(task.parent.iterdir())
    found = recipes.overfit(task, arm, 4, overrides)
    assert found.rows == 4
    assert found.passed == (found.written == 4) == (not found.causes)
    assert sorted(task.parent.iterdir()) == before, "nothing is kept"
    return found


@pytest.mark.parametrize("arm", ["full", "full/head"])
def test_what_can_learn_passes(task: Path, arm: str) -> None:
    found = tried(task, arm)
    assert found.passed
    assert found.arm == arm
    assert found.steps < overfitting.STEPS
    assert found.last_loss < found.first_loss / 2
    assert found.missed == ()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for what can learn."""
    monkeypatch.setattr(overfitting, "STEPS", 100)


def test_a_stop_token_that_is_not_learned(task: Path, short: None) -> None:
    """In this base it has the embedding of a token for unknown text, which LoRA does not change."""
    found = tried(task, "lora")
    assert found.written < found.rows
    assert all(one.written.startswith(one.taught) for one in found.missed)
    assert not any(one.finished for one in found.missed)
    assert "rows.jsonl:" in found.missed[0].row
    (cause,) = found.causes
    missed = found.rows - found.written
    assert cause.startswith(f"{missed} answers are right but do not end: the stop token")


def test_a_base_that_is_frozen(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = making.load_trainable

    def frozen(*given: Any) -> Any:
        base, model = load(*given)
        return base, model.requires_grad_(requires_grad=False)

    monkeypatch.setattr(making, "load_trainable", frozen)
    found = tried(task, "full")
    assert found.steps == 0
    assert found.causes == ("nothing is trained: no parameter of the model wants a gradient",)


@pytest.mark.parametrize(("rate", "word"), [("1e-9", "too low"), ("0.99", "too high")])
def test_a_learning_rate_that_is_absurd(task: Path, short: None, rate: str, word: str) -> None:
    (cause,) = tried(task, "full", f"training.learning_rate={rate}").causes
    assert cause.startswith(f"the learning rate may be {word}")


def test_a_gradient_that_is_no_number(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "clip", lambda *_: math.inf)
    (cause,) = tried(task, "full").causes
    assert "is too high (step 2: the gradient was not finite" in cause


def test_a_mask_on_the_question(task: Path, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = making.prepare

    def turned(*given: Any) -> tuple[Prepared, Prepared]:
        train, held = prepare(*given)
        rows = [
            replace(row, trained=tuple(place and not t for place, t in enumerate(row.trained)))
            for row in train.rows
        ]
        return replace(train, rows=rows), held

    monkeypatch.setattr(making, "prepare", turned)
    first, *_ = tried(task, "full").causes
    assert re.match(r"the mask: .*rows.jsonl:\d+ is trained on .* not on its answer", first)


def test_a_template_that_is_not_the_one_trained_with(
    task: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question is put otherwise when the model is asked."""
    make = making.make_engine

    def other(*given: Any) -> Any:
        engine = make(*given)
        prompt = engine.renderer.prompt
        monkeypatch.setattr(engine.renderer, "prompt", lambda chat: prompt(chat)[:4])
        return engine

    monkeypatch.setattr(making, "make_engine", other)
    (cause,) = tried(task, "full").causes
    assert "the template or the mask differs" in cause


def test_rows_that_ask_the_same_are_tried_once(task: Path) -> None:
    bench = open_workbench(read_task(task), task.parent)
    doubled = replace(bench, parts=replace(bench.parts, train=bench.parts.train * 2))
    few = overfitting._with_few(doubled, 1000).parts
    assert few.train == few.validation
    assert len(few.train) == len({str(row.prompt) for row in bench.parts.train})
    assert few.test == ()


def test_what_is_not_trained_is_refused(task: Path) -> None:
    with pytest.raises(ConfigError, match="is not trained"):
        recipes.overfit(task, "prompt")
