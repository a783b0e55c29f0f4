"""Data and template that disagree are found before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import metier
from metier.errors import TrainingError
from metier.records import Example
from metier.task import Training
from metier.text.template import Renderer
from metier.text.tokenizer import Tokenizer
from metier.training.preflight import prepare
from tests.text.chat_families import FAMILIES, write_tokenizer

STARTER = Path(metier.__file__).parent / "model" / "starter"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("qwen3")
    return Tokenizer.load(write_tokenizer("qwen3", FAMILIES["qwen3"], directory))


def say(role: str, content: str) -> Any:
    return {"role": role, "content": content}


def examples(*rows: tuple[str, str]) -> list[Example]:
    return [
        Example(str(i), (say("user", question), say("assistant", answer)), source=f"data.jsonl:{i}")
        for i, (question, answer) in enumerate(rows, start=1)
    ]


CLEAN = (("Who comes?", "The cat."), ("Where to?", "Home."), ("When?", "Now."))

RENDERED = {
    "ChatML": ("<|im_start|>user\nWho comes?<|im_end|>\n<|im_start|>assistant\n", "The cat."),
    "Llama 2": ("<s>[INST] Who comes? [/INST]", "The cat."),
    "Llama 3": ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWho?", "The cat."),
    "Gemma": ("<start_of_turn>user\nWho comes?<end_of_turn>", "The cat."),
    "a stop token": ("Who comes?", "The cat.<|im_end|>\n"),
    "EOS": ("Who comes?", "The cat.</s>"),
}
MEANT = {
    "reasoning": ("Who comes?", "<think>\nIt purrs.\n</think>\n\nThe cat."),
    "a call": ("Who comes?", '<tool_call>\n{"name": "look"}\n</tool_call>'),
}


@pytest.mark.parametrize("template", ["chat", "question-answer"])
@pytest.mark.parametrize("name", RENDERED)
def test_data_that_was_rendered_already_is_refused(
    qwen: Tokenizer, template: Any, name: str
) -> None:
    rows = examples(*CLEAN[:2], RENDERED[name], RENDERED[name])
    with pytest.raises(TrainingError, match="2 of 4 training rows") as caught:
        prepare(rows, Renderer(qwen, template), Training(), None)
    assert caught.value.place == "data.jsonl:3"


@pytest.mark.parametrize("name", MEANT)
def test_reasoning_and_calls_as_text_are_refused_under_a_chat_template(
    qwen: Tokenizer, name: str
) -> None:
    """The template's own tokens, typed, would be learned as the characters they are."""
    rows = examples(*CLEAN[:2], MEANT[name], MEANT[name])
    with pytest.raises(TrainingError, match="begin or end with control tokens") as caught:
        prepare(rows, Renderer(qwen, "chat"), Training(), None)
    assert "tool_calls" in caught.value.remedy
    as_text = prepare(rows, Renderer(qwen, "question-answer"), Training(), None)
    assert not any("control tokens" in note for note in as_text.notes)


def test_a_few_rows_with_markup_are_told_and_trained(qwen: Tokenizer) -> None:
    rows = examples(*CLEAN, ("What opens a turn?", "<|im_start|>"))
    prepared = prepare(rows, Renderer(qwen, "chat"), Training(), None)
    (note,) = prepared.notes
    assert note.startswith("1 of 4 training rows begin or end with control tokens")
    assert "'<|im_start|>' in data.jsonl:4" in note
    assert len(prepared.rows) == 4


def test_markup_inside_a_text_is_what_the_text_is_about(qwen: Tokenizer) -> None:
    about = ("Which token, <|im_start|> or [INST], is Qwen's?", "It is <|im_start|>, of course.")
    prepared = prepare(examples(*CLEAN[:1], about, about), Renderer(qwen, "chat"), Training(), None)
    assert prepared.notes == ()


def test_a_single_row_is_never_a_majority(qwen: Tokenizer) -> None:
    rows = examples(("What opens a turn?", "<|im_start|>"))
    assert len(prepare(rows, Renderer(qwen, "chat"), Training(), None).notes) == 1


def test_clean_data_under_the_bases_own_template_needs_no_note(qwen: Tokenizer) -> None:
    assert prepare(examples(*CLEAN), Renderer(qwen, "chat"), Training(), None).notes == ()


def test_another_template_than_the_bases_own_is_a_note(qwen: Tokenizer) -> None:
    rows = examples(*CLEAN)
    (note,) = prepare(rows, Renderer(qwen, "question-answer"), Training(), None).notes
    assert "has a chat template of its own, but template is question-answer" in note
    # The starter was pre-trained here, on documents: it was never taught its chat template.
    starter = Renderer(Tokenizer.load(STARTER), "question-answer")
    assert starter.tokenizer.chat_template is not None
    assert prepare(rows, starter, Training(), None).notes == ()


def test_what_the_template_leaves_out_is_refused_with_the_row(qwen: Tokenizer) -> None:
    messages = (say("developer", "Be brief."), say("user", "Who?"), say("assistant", "The cat."))
    rows = [*examples(*CLEAN), Example("4", messages, source="data.jsonl:4")]
    with pytest.raises(TrainingError, match="is left out by the chat template") as caught:
        prepare(rows, Renderer(qwen, "chat"), Training(), None)
    assert caught.value.place == "data.jsonl:4: messages[0] (role developer)"


@pytest.mark.parametrize("turns", ["last", "all"])
def test_offered_tools_that_no_template_writes_are_refused(qwen: Tokenizer, turns: Any) -> None:
    tools = ({"type": "function", "function": {"name": "look"}},)
    rows = [Example("1", examples(*CLEAN)[0].messages, source="data.jsonl:1", tools=tools)]
    assert prepare(rows, Renderer(qwen, "chat"), Training(turns=turns), None).rows
    with pytest.raises(TrainingError, match="text template"):
        prepare(rows, Renderer(qwen, "question-answer"), Training(turns=turns), None)
