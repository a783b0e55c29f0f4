"""Spans of a text, such as the entities it names, and the answer that says which they are.

The answer is a JSON object: every type that occurs, each with its spans word for word in the order
of the text, as in ``{"person":["Ada Lovelace"],"place":["London","Paris"]}``. It is ``{}`` where
there are none. It holds no places, so that a model that writes can give it, too: `find` recovers
them.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Entities = dict[str, list[str]]
"""Texts of spans by their type."""


class Span(NamedTuple):
    """Characters of a text, from `start` up to before `end`."""

    start: int
    end: int
    type: str


class Found(NamedTuple):
    """Where entities stand in a text.

    Attributes:
        spans: those whose place is sure, in order; none overlaps another.
        unsure: places of texts that stand more often in the text than in the answer, or under two
            types: nobody can tell which is which.
        missing: entities without a place of their own.

    """

    spans: list[Span]
    unsure: list[tuple[int, int]]
    missing: int


def answer_of(text: str, spans: Sequence[Span]) -> str:
    """The answer that names spans."""
    found: Entities = {}
    for span in sorted(spans):
        found.setdefault(span.type, []).append(text[span.start : span.end])
    return json.dumps(found, ensure_ascii=False, separators=(",", ":"))


def as_entities(value: Any) -> Entities | None:
    """The entities that a JSON value names, or None where it has another form."""
    if not isinstance(value, dict):
        return None
    lists = all(isinstance(texts, list) for texts in value.values())
    if not lists or not all(isinstance(text, str) for texts in value.values() for text in texts):
        return None
    return value


def of_tags(tokens: Sequence[str], tags: Sequence[str]) -> tuple[str, list[Span]]:
    """Tokens joined by blanks, and the spans that their tags mark.

    A span begins as conlleval has it: at B, S or U, and at any other tag that does not go on the
    span before it. So IOB1, IOB2, BIOES and BILOU are all read.

    Args:
        tokens: words and signs.
        tags: of each, ``O`` or a letter, a dash and a type, such as ``B-person``.

    """
    spans: list[Span] = []
    before, position = "O", 0
    for token, tag in zip(tokens, tags, strict=True):
        end = position + len(token)
        if tag != "O":
            if tag[0] in "BSU" or before[0] in "OESLU" or before[2:] != tag[2:]:
                spans.append(Span(position, end, tag[2:]))
            else:
                spans[-1] = spans[-1]._replace(end=end)
        before, position = tag, end + 1
    return " ".join(tokens), spans


def find(text: str, entities: Mapping[str, Sequence[str]]) -> Found:
    """Places of entities in a text.

    Longer texts are placed first, and nothing stands inside another span. Places that cut no word
    are preferred, if there are enough of them.
    """
    wanted: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, texts in entities.items():
        for one in texts:
            wanted[one][kind] += 1
    found = Found([], [], 0)
    taken = bytearray(len(text))
    missing = 0
    for one in sorted(wanted, key=lambda one: (-len(one), one)):
        types = wanted[one]
        places = _places(text, one, taken, types.total())
        for start, end in places:
            taken[start:end] = b"\1" * (end - start)
        if len(types) == 1 and len(places) <= types.total():
            found.spans.extend(Span(start, end, *types) for start, end in places)
        else:
            found.unsure.extend(places)
        missing += max(0, types.total() - len(places))
    return found._replace(spans=sorted(found.spans), missing=missing)


def _places(text: str, wanted: str, taken: bytearray, count: int) -> list[tuple[int, int]]:
    """Where a text stands in another and nothing is taken."""
    whole = _apart(p for p in _occurrences(text, wanted, taken) if _cuts_no_word(text, *p))
    return whole if len(whole) >= count else _apart(_occurrences(text, wanted, taken))


def _occurrences(text: str, wanted: str, taken: bytearray) -> Iterator[tuple[int, int]]:
    start = text.find(wanted) if wanted.strip() else -1
    while start >= 0:
        end = start + len(wanted)
        if not any(taken[start:end]):
            yield start, end
        start = text.find(wanted, start + 1)


def _apart(places: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    """The places that do not overlap one before them."""
    kept: list[tuple[int, int]] = []
    for place in places:
        if not kept or place[0] >= kept[-1][1]:
            kept.append(place)
    return kept


def _cuts_no_word(text: str, start: int, end: int) -> bool:
    return not (text[start - 1 : start + 1].isalnum() and start) and not (
        text[end - 1 : end + 1].isalnum() and end < len(text)
    )
