"""Rows whose spans are marked, as texts with the answer that names them (`text.spans`).

Two forms are read: tokens with a tag each (CoNLL's), and a text with the places of its spans
(Prodigy's objects, or the lists of doccano and spaCy).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metier.data.conll import TAG
from metier.errors import DataError
from metier.text.spans import Span, answer_of, of_tags

_TYPES = ("label", "type")
_REMEDY = (
    'write {"text": "In Rome", "spans": [{"start": 3, "end": 7, "label": "place"}]}, or each span '
    'as [3, 7, "place"]'
)


def text_and_answer(
    place: str, columns: Sequence[str], source: Any, marked: Any
) -> tuple[str, str]:
    """The text of a row and its answer; of a row without marks, an empty one.

    Args:
        place: of the row.
        columns: names of those of `source` and `marked`.
        source: a text, or its tokens, which are joined by blanks.
        marked: places of spans in a text, or a tag for each token; None: nothing is marked.

    Raises:
        DataError: one is of another form, or they do not fit each other.

    """
    if isinstance(source, str):
        if marked is None:
            return source, ""
        return source, answer_of(source, _spans(place, columns[1], source, marked))
    tokens = _texts(place, columns[0], source)
    if marked is None:
        return " ".join(tokens), ""
    tags = _texts(place, columns[1], marked)
    _check_tags(place, columns, tokens, tags)
    text, spans = of_tags(tokens, tags)
    return text, answer_of(text, spans)


def _texts(place: str, column: str, values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        numbers = isinstance(values, list) and any(isinstance(one, int) for one in values)
        raise DataError(
            place,
            f"column '{column}' is no list of texts",
            "write the tags' names, such as B-person, not their numbers"
            if numbers
            else 'write {"tokens": ["In", "Rome"], "tags": ["O", "B-place"]}',
        )
    return values


def _check_tags(
    place: str, columns: Sequence[str], tokens: Sequence[str], tags: Sequence[str]
) -> None:
    if len(tokens) != len(tags):
        raise DataError(
            place,
            f"has {len(tokens):,} {columns[0]} and {len(tags):,} {columns[1]}",
            "write one tag for each token",
        )
    for number, (token, tag) in enumerate(zip(tokens, tags, strict=True), start=1):
        if not token.strip():
            raise DataError(place, f"token {number} is blank", "drop it with its tag")
        if not TAG.fullmatch(tag):
            raise DataError(
                place,
                f"the tag {tag!r} of token {number} is none",
                "write O outside of spans, and B- or I- with the type inside (BIO; BIOES and "
                "BILOU are read, too)",
            )


def _spans(place: str, column: str, text: str, marked: Any) -> list[Span]:
    if not isinstance(marked, list):
        raise DataError(place, f"column '{column}' is no list of spans", _REMEDY)
    name = f"column '{column}', span"
    return [_span(f"{name} {n}", place, text, one) for n, one in enumerate(marked, start=1)]


def _span(name: str, place: str, text: str, value: Any) -> Span:
    """A span without the white space at its ends."""
    if isinstance(value, dict):
        kind = next((value[key] for key in _TYPES if key in value), None)
        value = [value.get("start"), value.get("end"), kind]
    places = value[:2] if isinstance(value, list) and len(value) == 3 else []
    if not places or any(type(at) is not int for at in places) or not isinstance(value[2], str):
        raise DataError(place, f"{name} has not a start, an end and a label", _REMEDY)
    start, end = places
    inside = text[max(start, 0) : max(end, 0)]
    if not 0 <= start < end <= len(text) or not inside.strip() or not value[2].strip():
        raise DataError(
            place,
            f"{name} is from {start} to {end} in a text of {len(text):,} characters",
            "count characters from 0; the end is behind the last one, and a span is not blank",
        )
    return Span(end - len(inside.lstrip()), start + len(inside.rstrip()), value[2].strip())
