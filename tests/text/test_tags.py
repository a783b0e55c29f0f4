"""Spans of characters become classes of tokens and come back, whatever the tokenizer."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.model import load
from metier.records import Message
from metier.text.spans import Found, Span
from metier.text.tags import (
    NONE,
    best_classes,
    class_names,
    classes_of,
    read,
    spans_of,
    units_of,
)
from metier.text.template import Renderer
from metier.text.tokenizer import Tokenizer
from tests.text.conftest import MakeTokenizer

TYPES = ("person", "place")
NAMES = ("starter", "small", "gpt_neox_20b", "stories260k")
STARTER = Path(load.__file__).parent / "starter"


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: MakeTokenizer) -> Callable[[str], Tokenizer]:
    starter = Tokenizer.load(STARTER)
    return lambda name: starter if name == "starter" else make_tokenizer(name)


@st.composite
def marked(draw: st.DrawFn, parted: bool) -> tuple[str, list[Span]]:
    """A text with spans: of whole words between blanks, or of any characters but blanks."""
    letters = st.one_of(
        st.sampled_from("aé中🎉'-#.Ñ\u0301"), st.characters(exclude_categories=["C"])
    )
    words = draw(st.lists(st.text(letters, min_size=1, max_size=5), min_size=1, max_size=8))
    between = draw(st.sampled_from([" ", "  ", "\t"]))
    text = draw(st.sampled_from(["", " ", "\n"])) + between.join(words)
    if parted:
        places = [(m.start(), m.end()) for m in re.finditer(r"\S+", text)]
    else:
        cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=6)))
        places = [*itertools.pairwise(cuts)]
    spans = []
    for start, end in places:
        inside = text[start:end]
        kind = draw(st.sampled_from([None, *TYPES]))
        if kind and inside.strip():
            left, right = len(inside) - len(inside.lstrip()), len(inside.rstrip())
            spans.append(Span(start + left, start + right, kind))
    return text, spans


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(example=marked(parted=True))
def test_spans_of_words_come_back(
    tokenizer: Callable[[str], Tokenizer], name: str, example: tuple[str, list[Span]]
) -> None:
    text, spans = example
    units = units_of(text, tokenizer(name).locate(text)[1])
    classes, cut = classes_of(units, Found(spans, [], 0), TYPES)
    assert spans_of(units, classes, TYPES) == spans
    assert cut == 0


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(example=marked(parted=False))
def test_a_span_comes_back_or_is_counted(
    tokenizer: Callable[[str], Tokenizer], name: str, example: tuple[str, list[Span]]
) -> None:
    text, spans = example
    units = units_of(text, tokenizer(name).locate(text)[1])
    classes, cut = classes_of(units, Found(spans, [], 0), TYPES)
    back = spans_of(units, classes, TYPES)
    assert len(spans) - cut <= len(set(back) & set(spans)) <= len(spans)
    assert cut >= len(set(spans) - set(back))
    assert all(before.end <= after.start for before, after in itertools.pairwise(back))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20))
def test_units_are_the_text_without_its_white_space(
    tokenizer: Callable[[str], Tokenizer], name: str, text: str
) -> None:
    ids, offsets = tokenizer(name).locate(text)
    assert ids == tokenizer(name).encode(text, "text")
    units = units_of(text, offsets)
    assert all(before.end <= after.start for before, after in itertools.pairwise(units))
    assert all(before.token < after.token for before, after in itertools.pairwise(units))
    kept = "".join(text[unit.start : unit.end] for unit in units)
    assert "".join(kept.split()) == "".join(text.split())


def test_units_of_bytes_hold_whole_characters(make_tokenizer: MakeTokenizer) -> None:
    """Oracle: the bytes that each token of GPT-2 stands for, added up."""
    tokenizer = make_tokenizer("gpt2")
    text = " Zoë 中国🎉 x"
    ids, offsets = tokenizer.locate(text)
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(b): b for b in visible} | {
        chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in visible)
    }
    names = {number: piece for piece, number in tokenizer._backend.get_vocab().items()}
    end = 0
    for number, place in zip(ids, offsets, strict=True):
        start, end = end, end + len(bytes(byte_of[c] for c in names[number]))
        first = len(text.encode()[:start].decode(errors="ignore"))
        last = len(text.encode()[: end - 1].decode(errors="ignore")) + 1
        assert place == (first, last)
    assert end == len(text.encode())
    parts = [text[unit.start : unit.end] for unit in units_of(text, offsets)]
    assert parts == ["Zo", "ë", "中", "国", "🎉", "x"]


def test_a_token_over_the_end_of_a_span_is_tagged_whole_and_counted() -> None:
    text = "xParis 2024"
    units = units_of(text, [(0, 6), (6, 9), (9, 11)])
    classes, cut = classes_of(units, Found([Span(1, 6, "place")], [], 0), TYPES)
    assert (classes, cut) == ([3, 0, 0], 1)
    assert spans_of(units, classes, TYPES) == [Span(0, 6, "place")]
    two = [Span(0, 8, "place"), Span(8, 11, "person")]
    classes, cut = classes_of(units, Found(two, [], 0), TYPES)
    assert (classes, cut) == ([3, 4, 1], 2)


def test_two_spans_in_one_token_are_not_both_tagged() -> None:
    units = units_of("AdaRome", [(0, 7)])
    spans = [Span(0, 3, "person"), Span(3, 7, "place")]
    assert classes_of(units, Found(spans, [], 0), TYPES) == ([1], 2)


def test_nothing_is_taught_where_nobody_knows() -> None:
    text = "in Rome or Rome with Bob"
    units = units_of(text, [(m.start(), m.end()) for m in re.finditer(r"\S+", text)])
    unknown = Span(21, 24, "animal")
    found = Found([unknown], [(3, 7), (11, 15)], 0)
    assert classes_of(units, found, TYPES) == ([0, NONE, 0, NONE, 0, NONE], 0)


def test_names_of_classes_are_those_of_iob2() -> None:
    assert class_names(TYPES) == ("O", "B-person", "I-person", "B-place", "I-place")
    assert class_names(()) == ("O",)


def well_formed(classes: tuple[int, ...]) -> bool:
    """An I follows a B or an I of its type; said as a pattern, not as transitions."""
    names = class_names(TYPES)
    text = " ".join(names[number] for number in classes)
    return re.fullmatch(r"( ?(O|B-(person|place)( I-\3)*(?= |$)))*", text) is not None


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_the_best_classes_are_those_of_all_that_are_well_formed(length: int) -> None:
    draw = np.random.default_rng(length)
    every = [*itertools.product(range(5), repeat=length)]
    allowed = [each for each in every if well_formed(each)]
    assert 0 < len(allowed) < len(every)
    changed = 0
    for _ in range(40):
        scores = draw.normal(size=(length, 5)).astype(np.float32)
        best = max(allowed, key=lambda each: scores[range(length), each].sum())
        assert tuple(best_classes(scores)) == best
        changed += best != tuple(scores.argmax(1))
    assert changed  # the likeliest class of each alone would often be no answer


def test_no_text_has_no_classes() -> None:
    assert best_classes(np.zeros((0, 5), dtype=np.float32)) == []
    assert units_of(" \n", [(0, 1), (1, 2)]) == []


@pytest.mark.parametrize("template", ["plain", "question-answer", "chat"])
def test_the_text_is_read_once_more_behind_the_prompt(template: str) -> None:
    tokenizer = Tokenizer.load(STARTER)
    renderer = Renderer(tokenizer, template)  # type: ignore[arg-type]
    chat: list[Message] = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Bob"},
        {"role": "user", "content": " <|eos|> Zoë in  中国 \n"},
    ]
    reading = read(renderer, chat)
    prompt = renderer.prompt(chat)
    assert reading.ids[: len(prompt)] == prompt
    assert tokenizer.decode(reading.ids[len(prompt) :]) == chat[-1]["content"] == reading.text
    for unit in reading.units:
        piece = tokenizer.decode(reading.ids[unit.token : unit.token + 1]).strip()
        assert "\ufffd" in piece or reading.text[unit.start : unit.end].endswith(piece)
    assert min(unit.token for unit in reading.units) >= len(prompt)
