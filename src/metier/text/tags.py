"""Tags of the tokens of a text: which span each belongs to, if any.

Classes are those of IOB2 (Tjong Kim Sang and Veenstra 1999, "Representing text chunks"): 0 is O,
outside of any span; of the type at place k, 1 + 2k begins a span (B) and 2 + 2k goes on it (I).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from metier.records import Chat, last_user_text
from metier.text.spans import Found, Span
from metier.text.template import Renderer

NONE = -1
"""In place of a class: nobody knows it, or there is none."""


class Unit(NamedTuple):
    """The smallest stretch of a text that gets a class.

    It is one token without the white space around it, or several that share a character.

    Attributes:
        token: number of its last token, which has read all of it.
        start: its first character.
        end: behind its last.

    """

    token: int
    start: int
    end: int


class Reading(NamedTuple):
    """What a tagger reads.

    Attributes:
        text: what it tags: the last user message.
        ids: of the whole prompt, and of the text once more behind it; for an encoder of the text.
        units: of the text, as it stands there.

    """

    text: str
    ids: list[int]
    units: list[Unit]


def read(renderer: Renderer, chat: Chat) -> Reading:
    """A prompt with its last user message once more, in place of the answer.

    A decoder looks to the left only. When it reads a text for the second time, it knows at each
    token what follows (Springer et al. 2024, "Repetition improves language model embeddings",
    arXiv 2402.15449). It also makes the text stand where no template can change it. An encoder
    looks both ways: it reads the message once, between its special tokens.
    """
    text = last_user_text(chat)
    before, behind = renderer.tokenizer.frame or (renderer.prompt(chat), ())
    ids, offsets = renderer.tokenizer.locate(text)
    units = [unit._replace(token=len(before) + unit.token) for unit in units_of(text, offsets)]
    return Reading(text, [*before, *ids, *behind], units)


def units_of(text: str, offsets: Sequence[tuple[int, int]]) -> list[Unit]:
    """The units of a text.

    Args:
        text: any.
        offsets: first character and end of each of its tokens. Tokens of byte-level tokenizers
            begin with the blank before a word, and several may stand for one character.

    """
    units: list[Unit] = []
    for token, (start, end) in enumerate(offsets):
        piece = text[start:end]
        if not piece.strip():
            continue
        start, end = end - len(piece.lstrip()), start + len(piece.rstrip())
        if units and start < units[-1].end:
            before = units.pop()
            start, end = before.start, max(before.end, end)
        units.append(Unit(token, start, end))
    return units


def class_names(types: Sequence[str]) -> tuple[str, ...]:
    """Names of the classes, as Transformers' ``id2label`` has them."""
    return ("O", *(f"{letter}-{kind}" for kind in types for letter in "BI"))


def classes_of(units: Sequence[Unit], found: Found, types: Sequence[str]) -> tuple[list[int], int]:
    """The class of each unit, and how many spans begin or end inside of one.

    Of such a span the units are tagged whole; a unit that two spans share is the first one's. A
    unit has no class where its place is unsure or its type is not among `types`.
    """
    classes, cut = [0] * len(units), 0
    for span in found.spans:
        own = [at for at in _touched(units, span.start, span.end) if not classes[at]]
        known = span.type in types
        begins = 1 + 2 * types.index(span.type) if known else NONE
        for number, at in enumerate(own):
            classes[at] = begins + (number > 0) if known else NONE
        edges = (units[own[0]].start, units[own[-1]].end) if own else ()
        cut += known and edges != (span.start, span.end)
    for start, end in found.unsure:
        for at in _touched(units, start, end):
            classes[at] = NONE
    return classes, cut


def _touched(units: Sequence[Unit], start: int, end: int) -> list[int]:
    return [at for at, unit in enumerate(units) if unit.start < end and unit.end > start]


def spans_of(units: Sequence[Unit], classes: Sequence[int], types: Sequence[str]) -> list[Span]:
    """The spans that classes mark; every I goes on a span of its type, as `best_classes` has it."""
    spans: list[Span] = []
    for unit, number in zip(units, classes, strict=True):
        if number % 2:
            spans.append(Span(unit.start, unit.end, types[number // 2]))
        elif number:
            spans[-1] = spans[-1]._replace(end=unit.end)
    return spans


def best_classes(scores: npt.NDArray[np.floating]) -> list[int]:
    """The classes with the largest sum of scores in which no I follows anything but its B or I.

    The algorithm of Viterbi (1967) with transitions that are allowed or not.

    Args:
        scores: logarithms of probabilities, shape (units, classes).

    """
    if not len(scores):
        return []
    begins = np.arange(1, scores.shape[1], 2)
    goes_on = begins + 1
    best = scores[0].astype(np.float64)
    best[goes_on] = -np.inf
    came_from = np.zeros(scores.shape, dtype=np.int64)
    for row in range(1, len(scores)):
        came_from[row] = best.argmax()
        came_from[row, goes_on] = np.where(best[begins] >= best[goes_on], begins, goes_on)
        best = best[came_from[row]] + scores[row]
    path = [int(best.argmax())]
    for row in range(len(scores) - 1, 0, -1):
        path.append(int(came_from[row, path[-1]]))
    return path[::-1]
