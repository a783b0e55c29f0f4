"""The sandbox writes what transformers writes, on every day the same, and lets nothing out."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from metier.text.sandbox import TODAY, compile_template
from metier.text.tokenizer import Tokenizer
from tests.text.chat_families import FAMILIES, write_tokenizer
from tests.text.chat_oracle import TOOLS, random_chat


def outcome(render: Any, *given: Any, **named: Any) -> str:
    """The text, or that the template refused the chat."""
    try:
        text: str = render(*given, **named)
    except Exception as error:  # a template may raise anything
        return type(error).__name__
    return re.sub(r"\d{4}-\d\d-\d\d|\d\d \w{3} \d{4}", "DATE", text)


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Raw chats, typed control tokens and arguments in strings included."""
    directory = write_tokenizer(name, FAMILIES[name], tmp_path)
    ours, theirs = Tokenizer.load(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    draw = random.Random(name)
    refused = 0
    for _ in range(20):
        chat, offered = random_chat(draw, FAMILIES[name])
        chat = [{k: v for k, v in message.items() if v is not None} for message in chat]
        tools = TOOLS if offered else []
        for ask in (False, True):
            text = outcome(ours.render, chat, tools, ask)
            assert text == outcome(
                theirs.apply_chat_template,
                chat,
                tools=tools or None,
                add_generation_prompt=ask,
                tokenize=False,
            )
            refused += text.isidentifier()
    assert refused < 20


def test_the_date_is_the_same_every_day() -> None:
    write = compile_template("{{ strftime_now('%d %b %Y') }}")
    assert write() == TODAY.strftime("%d %b %Y") == "26 Jul 2024"


def test_none_is_handed_on_as_none() -> None:
    """DeepSeek asks whether a content is none; transformers leaves the key out."""
    write = compile_template("{{ messages[0].content is none }}")
    assert write(messages=[{"content": None}]) == "True"


def test_marks_of_what_is_trained_are_passed_over() -> None:
    write = compile_template("a{% generation %}{% set x = 'b' %}{{ x }}{% endgeneration %}{{ x }}c")
    assert write() == "abc"


def test_json_is_written_without_html_escapes() -> None:
    write = compile_template("{{ value | tojson(indent=1) }}")
    assert write(value={"é": "<b>"}) == '{\n "é": "<b>"\n}'


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.format.__globals__.os }}",
        "{{ messages.append(1) }}",
        "{{ strftime_now.__self__.year }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.mro().pop() }}",
        "{{ ('{0.__class__.__mro__}' | attr('format'))(messages) }}",
    ],
)
def test_nothing_leaves_the_sandbox(source: str) -> None:
    with pytest.raises(jinja2.exceptions.SecurityError):
        compile_template(source)(messages=[])


def test_a_template_may_refuse_in_its_own_words() -> None:
    with pytest.raises(jinja2.TemplateError, match="no such role"):
        compile_template("{{ raise_exception('no such role') }}")()
