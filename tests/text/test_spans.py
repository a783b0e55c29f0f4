"""Spans become answers and are found again; what nobody could find again is counted."""

from __future__ import annotations

import json
from itertools import groupby, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.text.spans import Span, answer_of, as_entities, find, of_tags

TYPES = ("person", "place-name")
TEXT = "We met Ada in Rome , not in Paris ."
MARKED = ["person:Ada Lovelace", "place-name:London", "place-name:New York"]


@pytest.mark.parametrize(
    "tags",
    [
        "O B-a I-a B-a B-b I-b O B-a",  # IOB2
        "O I-a I-a B-a I-b I-b O I-a",  # IOB1: B only where spans of a type touch
        "O B-a E-a S-a B-b E-b O S-a",  # BIOES
        "O B-a L-a U-a B-b L-b O U-a",  # BILOU
        "O I-a E-a S-a I-b L-b O E-a",  # spans that lost their beginning
    ],
)
def test_every_scheme_marks_the_same_spans(tags: str) -> None:
    text, spans = of_tags(["x", "Ada", "L.", "Bob", "New", "York", ",", "Cy"], tags.split())
    assert text == "x Ada L. Bob New York , Cy"
    named = [(text[span.start : span.end], span.type) for span in spans]
    assert named == [("Ada L.", "a"), ("Bob", "a"), ("New York", "b"), ("Cy", "a")]


def written(text: str) -> tuple[str, str]:
    """A type and a span as `MARKED` has them."""
    kind, _, words = text.partition(":")
    return kind, words


# Without capitals, so that none is one of those that are marked.
words = st.text(st.characters(exclude_categories=["Z", "C", "Lu"]), min_size=1, max_size=6)
pieces = st.lists(st.one_of(words, st.sampled_from(MARKED)), max_size=12)


@given(pieces)
def test_spans_come_back_from_their_answer(pieces: list[str]) -> None:
    """An oracle that never computes a place: what is marked is what was written as marked."""
    tokens: list[str] = []
    tags: list[str] = []
    for piece in pieces:
        kind, text = written(piece) if piece in MARKED else ("", piece)
        for number, word in enumerate(text.split()):
            tokens.append(word)
            tags.append(f"{'I' if number else 'B'}-{kind}" if kind else "O")
    text, spans = of_tags(tokens, tags)
    expected = [written(piece) for piece in pieces if piece in MARKED]
    assert [(span.type, text[span.start : span.end]) for span in spans] == expected
    answer = json.loads(answer_of(text, spans))
    for kind in TYPES:
        assert answer.get(kind, []) == [words for one, words in expected if one == kind]
    entities = as_entities(answer)
    assert entities is not None
    found = find(text, entities)
    assert (found.spans, found.unsure, found.missing) == (spans, [], 0)


few = st.lists(st.text("ab ", max_size=3), max_size=4)


@given(st.text("ab ", max_size=30), st.dictionaries(st.sampled_from("xy"), few))
def test_whatever_is_asked_for_nothing_overlaps_and_nothing_is_lost(
    text: str, entities: dict[str, list[str]]
) -> None:
    found = find(text, entities)
    places = sorted([*((span.start, span.end) for span in found.spans), *found.unsure])
    assert all(before[1] <= after[0] for before, after in pairwise(places))
    for span in found.spans:
        assert text[span.start : span.end] in entities[span.type]
    asked = [text for texts in entities.values() for text in texts]
    sure = [text[span.start : span.end] for span in found.spans]
    in_doubt = {text[start:end] for start, end in found.unsure}
    assert len(sure) + found.missing <= len(asked)
    assert len(sure) + found.missing + sum(one in in_doubt for one in asked) >= len(asked)


CASES = {
    "each once": ({"person": ["Ada"], "place": ["Rome", "Paris"]}, ["Ada", "Rome", "Paris"], 0, 0),
    "not there": ({"place": ["Oslo", "Rome"]}, ["Rome"], 0, 1),
    "more often in the text": ({"sign": ["in"]}, [], 2, 0),
    "as often": ({"sign": ["in", "in"]}, ["in", "in"], 0, 0),
    "more often in the answer": ({"place": ["Rome", "Rome"]}, ["Rome"], 0, 1),
    "two types": ({"person": ["Rome"], "place": ["Rome"]}, [], 1, 1),
    "one inside another": ({"long": ["Ada in Rome"], "short": ["Rome"]}, ["Ada in Rome"], 0, 1),
    "whole words first": ({"x": ["t"]}, [], 2, 0),
    "blank": ({"x": ["", " "]}, [], 0, 2),
    "nothing": ({"x": []}, [], 0, 0),
}


@pytest.mark.parametrize(
    ("entities", "sure", "unsure", "missing"), CASES.values(), ids=CASES.keys()
)
def test_what_is_found_and_what_is_not(
    entities: dict[str, list[str]], sure: list[str], unsure: int, missing: int
) -> None:
    found = find(TEXT, entities)
    assert [TEXT[span.start : span.end] for span in found.spans] == sure
    assert (len(found.unsure), found.missing) == (unsure, missing)


def test_a_word_is_not_looked_for_inside_of_others() -> None:
    assert find("Romeo in Rome", {"place": ["Rome"]}).spans == [Span(9, 13, "place")]
    assert find("中国人 in Rome", {"place": ["中国"]}).spans == [Span(0, 2, "place")]


@pytest.mark.parametrize("value", [[], "x", {"a": "x"}, {"a": [1]}, {"a": [{"x": "y"}]}, None])
def test_other_answers_name_no_spans(value: object) -> None:
    assert as_entities(value) is None


def test_real_answers_are_found_where_they_were_marked(data_dir: Path) -> None:
    """Of a data set that was tagged by people, all but what is said to be unsure comes back."""
    lines = (data_dir / "ncbi_disease" / "devel.tsv").read_text("utf-8").splitlines()
    spans = unsure = 0
    for is_text, group in groupby(lines, key=lambda line: bool(line.strip())):
        if not is_text:
            continue
        tokens, tags = zip(*(line.split("\t") for line in group), strict=True)
        text, marked = of_tags(tokens, tags)
        entities = as_entities(json.loads(answer_of(text, marked)))
        assert entities is not None
        found = find(text, entities)
        assert set(found.spans) <= set(marked)
        assert found.missing == 0
        doubted = sum(any(a <= s.start < b for a, b in found.unsure) for s in marked)
        assert len(found.spans) + doubted == len(marked)
        spans, unsure = spans + len(marked), unsure + doubted
    assert spans == sum("B-" in line for line in lines)
    assert unsure < 0.01 * spans
