"""Prompts and answers of encoder-decoders. Oracle: what the library's tokenizer makes of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from metier.errors import DataError, ModelError
from metier.task import TemplateName
from metier.text.template import Renderer
from metier.text.tokenizer import Tokenizer
from tests.seq2seq_bases import write_tokenizer

CHAT: list[Any] = [
    {"role": "system", "content": "Say what kind of thing it is."},
    {"role": "user", "content": "a dog\nand a cat"},
    {"role": "assistant", "content": " animals "},
    {"role": "user", "content": "a cake"},
    {"role": "assistant", "content": "food"},
]
TEXTS: dict[TemplateName, str] = {
    "plain": "Say what kind of thing it is.\na dog\nand a cat\nanimals\na cake",
    "question-answer": "Say what kind of thing it is.\n\n### Question:\na dog\nand a cat\n\n"
    "### Answer:\nanimals\n\n### Question:\na cake\n\n### Answer:",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, [*TEXTS.values(), "### Question: Answer: of bc"] * 20)
    return path


@pytest.mark.parametrize(("template", "text"), TEXTS.items())
def test_prompt_and_answer_are_two_texts(
    directory: Path, template: TemplateName, text: str
) -> None:
    plain: Any = AutoTokenizer.from_pretrained(directory)
    renderer = Renderer(Tokenizer.load(directory), template, encoder=True)
    prompt, whole = renderer.prompt(CHAT[:-1]), renderer.example(CHAT)
    assert prompt == plain(text).input_ids
    assert list(whole.ids) == prompt + plain(text_target="food").input_ids
    assert whole.trained == (False,) * len(prompt) + (True,) * (len(whole.ids) - len(prompt))
    assert renderer.answer(whole.ids[len(prompt) :]) == "food"


def test_control_without_an_encoder_the_prompt_does_not_end(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    renderer = Renderer(tokenizer, "plain")
    assert tokenizer.eos_id not in renderer.prompt(CHAT[:-1])
    assert renderer.fingerprint != Renderer(tokenizer, "plain", encoder=True).fingerprint


@pytest.mark.parametrize("template", TEXTS)
def test_plain_transformers_is_given_the_same_ids(
    directory: Path, tmp_path: Path, template: TemplateName
) -> None:
    """By the chat template that is exported, which metier reads in the same way again."""
    tokenizer = Tokenizer.load(directory)
    renderer = Renderer(tokenizer, template, encoder=True)
    (written,) = renderer.jinja()
    tokenizer.save(tmp_path, written)
    plain: Any = AutoTokenizer.from_pretrained(tmp_path)
    again = Renderer(Tokenizer.load(tmp_path), "chat", encoder=True)
    for end in (2, 4):
        expected = renderer.prompt(CHAT[:end])
        found = plain.apply_chat_template(CHAT[:end], add_generation_prompt=True, return_dict=False)
        assert found == expected
        assert again.prompt(CHAT[:end]) == expected
    whole = plain.apply_chat_template(CHAT, return_dict=False)
    assert whole == list(renderer.example(CHAT).ids)


def test_typed_control_tokens_are_text(directory: Path) -> None:
    renderer = Renderer(Tokenizer.load(directory), "plain", encoder=True)
    ids = renderer.prompt([{"role": "user", "content": "a</s>b <extra_id_0>"}])
    control = set(renderer.tokenizer.control_tokens.values())
    unknown = renderer.tokenizer.control_tokens["<unk>"]
    assert [token for token in ids if token in control - {unknown}] == [renderer.tokenizer.eos_id]


def test_what_cannot_be_written_is_refused(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    with pytest.raises(ModelError, match="no chat template"):
        Renderer(tokenizer, "chat", encoder=True)
    with pytest.raises(DataError, match="uses tools"):
        Renderer(tokenizer, "plain", encoder=True).prompt([{"role": "tool", "content": "1"}])
