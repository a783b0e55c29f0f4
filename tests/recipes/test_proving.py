"""What differs by more than rounding is refused; what rounding decides is counted."""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from metier.errors import ExportError
from metier.model import parity
from metier.model.adapters import add_adapter
from metier.model.generate import Engine
from metier.model.load import Base, load_base
from metier.progress import Silent
from metier.recipes import proving
from metier.recipes.proving import Answer, Prompt, Trial
from metier.task import Lora, Task, Training
from metier.text.template import Renderer

TEXTS = ("Tom saw a big dog", "Mia liked the soup", "Ben went to the park")
PROMPTS = [Prompt(f"row {i}", ({"role": "user", "content": t},)) for i, t in enumerate(TEXTS)]
TASK = Task(name="things", kind="expansion", data={"file": "rows.jsonl"})


@pytest.fixture(scope="module")
def base(stories260k: Path) -> Base:
    return load_base(str(stories260k), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def engine(base: Base) -> Engine:
    model = add_adapter(copy.deepcopy(base.model), "lora", Training(lora=Lora(rank=4)), 0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.01
    return Engine(model.eval(), Renderer(base.tokenizer, "plain"), 12)


@pytest.fixture(scope="module")
def trial(engine: Engine) -> Trial:
    return Trial(engine, PROMPTS, Silent())


@pytest.fixture(scope="module")
def answers(engine: Engine, trial: Trial) -> list[Answer]:
    return proving.written(engine, trial.ids, Silent())


def forced(engine: Engine, trial: Trial) -> list[torch.Tensor]:
    return [parity.logits(engine.model, row).clone() for row in trial.reference.rows]


def changed(answers: list[Answer], row: int, **values: Any) -> list[Answer]:
    return [*answers[:row], dataclasses.replace(answers[row], **values), *answers[row + 1 :]]


def other_token(answer: Answer, at: int) -> tuple[int, ...]:
    ids = list(answer.ids or ())
    return (*ids[:at], 300 if ids[at] != 300 else 301, *ids[at + 1 :])


def test_the_arm_is_as_itself(engine: Engine, trial: Trial, answers: list[Answer]) -> None:
    form = trial.hold("merged", answers, forced(engine, trial))
    assert (form.same, form.ties, form.largest_difference) == (3, (), 0)
    assert [one.text for one in answers] == [
        one.text for one in engine.generate([prompt.chat for prompt in PROMPTS])
    ]
    assert trial.hold("served", answers).largest_difference is None
    assert [one.answer_tokens for one in trial.asked()] == [len(one.ids or ()) for one in answers]


def test_another_text_names_the_prompt_and_both_texts(trial: Trial, answers: list[Answer]) -> None:
    ids = other_token(answers[1], 4)
    others = changed(answers, 1, ids=ids, text="something else")
    with pytest.raises(ExportError) as caught:
        trial.hold("reloaded", others)
    assert caught.value.place == "reloaded model, prompt 'row 1'"
    assert "'something else'" in caught.value.cause
    assert repr(answers[1].text) in caught.value.cause
    assert "from token 4 on" in caught.value.cause
    assert "metier serve" in caught.value.remedy


def test_a_tie_is_counted_and_not_refused(
    trial: Trial, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    others = changed(answers, 2, ids=other_token(answers[2], 3), text="other")
    gap = trial.reference.gap(2, 3)
    monkeypatch.setattr(trial.reference, "noise", gap * 1.01)
    form = trial.hold("merged", others)
    assert form.same == 2
    (tie,) = form.ties
    assert (tie.prompt, tie.token, tie.gap) == ("row 2", 3, gap)
    monkeypatch.setattr(trial.reference, "noise", gap * 0.99)
    with pytest.raises(ExportError, match="from token 3 on"):
        trial.hold("merged", others)


def test_a_tie_is_found_where_only_the_text_is_known(
    trial: Trial, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = answers[0]
    text = trial.renderer.answer((own.ids or ())[:5]) + "@"
    others = changed(answers, 0, ids=None, text=text)
    with pytest.raises(ExportError, match=r"from token 5 on"):
        trial.hold("served", others)
    monkeypatch.setattr(trial.reference, "noise", trial.reference.gap(0, 5))
    (tie,) = trial.hold("served", others).ties
    assert tie.token == 5


@pytest.mark.parametrize("known", [True, False])
def test_an_answer_that_does_not_stop_is_refused(
    trial: Trial, answers: list[Answer], known: bool
) -> None:
    """The text is the same: tokens that end an answer are not shown."""
    ids = (*(answers[0].ids or ()), 2, 2)
    others = changed(answers, 0, ids=ids if known else None, tokens=len(ids))
    with pytest.raises(ExportError, match=r"prompt 'row 0'.*tokens, the arm"):
        trial.hold("served", others)


def test_the_same_tokens_with_another_text_are_refused(trial: Trial, answers: list[Answer]) -> None:
    with pytest.raises(ExportError, match="though its tokens are the same"):
        trial.hold("reloaded", changed(answers, 0, text=answers[0].text + " ."))


def test_a_prompt_of_another_length_is_refused(trial: Trial, answers: list[Answer]) -> None:
    with pytest.raises(ExportError, match="is read as 99 tokens"):
        trial.hold("served", changed(answers, 1, read=99))


@pytest.mark.parametrize("by", [1.2, math.nan])
def test_a_logit_beyond_the_bound_is_refused(
    engine: Engine, trial: Trial, answers: list[Answer], by: float
) -> None:
    logits = forced(engine, trial)
    logits[1][2, 7] += trial.reference.bound * by
    with pytest.raises(ExportError, match=r"prompt 'row 1': a logit differs by") as caught:
        trial.hold("merged", answers, logits)
    assert caught.value.cause.count(repr(answers[1].text)) == 2
    logits[1][2, 7] -= trial.reference.bound * by
    logits[1] = forced(engine, trial)[1]
    logits[1][2, 7] += trial.reference.bound * 0.9
    assert trial.hold("merged", answers, logits).largest_difference > 0


def test_other_ids_are_refused_where_they_begin(trial: Trial) -> None:
    ids = [list(one) for one in trial.ids]
    trial.check_prompts(ids)
    ids[2].insert(4, 13)
    with pytest.raises(ExportError, match=r"prompt 'row 2': from token 4 on") as caught:
        trial.check_prompts(ids)
    assert "--prompts FILE" in caught.value.remedy
    ids[2] = trial.ids[2][:-1]
    with pytest.raises(ExportError, match=f"from token {len(ids[2])} on"):
        trial.check_prompts(ids)


def test_a_merged_model_in_memory_is_held_to_the_arm(base: Base, engine: Engine) -> None:
    from metier.model.merge import merge

    mine = copy.deepcopy(engine.model)
    held = Trial(Engine(mine, engine.renderer, 12), PROMPTS, Silent())
    merged = merge(mine, Silent())
    again = Engine(merged.model, engine.renderer, 12)
    form = proving.ask(held, again, Silent())
    assert form.same == 3
    assert 0 < form.largest_difference <= held.reference.bound
    merged.model.get_submodule(merged.layers[3]).weight.data *= 1.01
    with pytest.raises(ExportError, match="merged model"):
        proving.ask(held, again, Silent())


def test_what_is_served_is_held_to_the_arm(engine: Engine, trial: Trial, base: Base) -> None:
    form = proving.serve(trial, engine, TASK, Silent())
    assert (form.same, form.ties) == (3, ())
    untuned = Engine(base.model, engine.renderer, 12)
    with pytest.raises(ExportError, match=r"served model, prompt 'row"):
        proving.serve(trial, untuned, TASK, Silent())


def test_a_missing_stop_token_is_found_before_anything_is_served(
    engine: Engine, trial: Trial
) -> None:
    renderer = copy.copy(engine.renderer)
    renderer.stop_ids = frozenset({13})
    with pytest.raises(ExportError, match="stop tokens"):
        proving.serve(trial, Engine(engine.model, renderer, 12), TASK, Silent())


def test_what_the_gateway_refuses_is_said(engine: Engine, trial: Trial) -> None:
    short = Engine(engine.model, engine.renderer, 5000)
    with pytest.raises(ExportError, match=r"prompt 'row 0': is refused .*context length"):
        proving.serve(trial, short, TASK, Silent())


def test_a_directory_that_cannot_be_loaded_is_refused_with_the_reason(
    trial: Trial, stories260k: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(stories260k / name, tmp_path / name)
    with pytest.raises(ExportError, match="plain Transformers cannot use the directory") as caught:
        proving.reload(trial, tmp_path, {"device": "cpu", "base": None}, Silent())
    assert "no file named model.safetensors" in caught.value.cause
