"""What is in a task's data, and what a person should look at before anything is trained."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from metier.config import Config
from metier.data import prepare
from metier.data.labels import alike
from metier.data.split import PARTS, Parts
from metier.graders.labels import labels_of
from metier.records import Example
from metier.task import Kind

_SHOWN = 5
_EMPTY_WORDS = {"", "-", "--", "?", ".", "n/a", "na", "nan", "none", "null", "nil", "todo", "tbd"}
_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_PHONE = re.compile(r"(?<![\w.-])\+?(?:\(\d{1,4}\)|\d{1,4})(?:[ -]+\d{2,8}){1,5}(?![\w-]|\.\d)")
_CARD = re.compile(r"(?<![\w.-])[3-6]\d{3}(?:[ -]?\d{2,7}){2,4}(?![\w-]|\.\d)")


class Lengths(Config):
    """How long texts are."""

    p50: int
    p95: int
    max: int


class Finding(Config):
    """Rows to look at."""

    rows: int
    examples: tuple[str, ...] = ()
    """Where the first few stand (``file:line``), or their ids."""


class Audit(Config):
    """What is in the data of a task."""

    rows: int
    parts: dict[str, int]
    input_characters: Lengths
    input_words: Lengths
    answer_characters: Lengths
    answer_words: Lengths
    labels: dict[str, int] = {}
    """Rows of each label, the most frequent first."""
    imbalance: float | None = None
    """Rows of the most frequent label for one row of the rarest."""
    identical: Finding
    """Rows whose input and answer stand there before."""
    conflicting: Finding
    """Rows whose input stands there with another answer too."""
    near_duplicates: Finding
    """Rows whose input is close to that of another row of the same part."""
    empty_answers: Finding
    """Rows whose answer says nothing, such as `n/a`."""
    emails: Finding
    phones: Finding
    """Rows with what looks like a telephone number."""
    cards: Finding
    """Rows with a number of 15 or 16 digits that passes the check sum of payment cards (Luhn)."""
    removed: dict[str, int]
    """Rows the split leaves out, by reason: what would have leaked, and what caps cut."""
    warnings: tuple[str, ...]


def audit(parts: Parts, kind: Kind, near_duplicate: float) -> Audit:
    """Count what is in the parts of a task.

    Args:
        parts: the split data.
        kind: kind of the task.
        near_duplicate: similarity from which two inputs are near-duplicates.

    """
    rows = [row for name in PARTS for row in getattr(parts, name)]
    labels = Counter(label for row in rows for label in labels_of(row.answer, kind))
    counts = [count for _, count in labels.most_common()]
    return Audit(
        rows=len(rows),
        parts={name: len(getattr(parts, name)) for name in PARTS},
        input_characters=_lengths(len(prepare.text_of(row)) for row in rows),
        input_words=_lengths(len(prepare.text_of(row).split()) for row in rows),
        answer_characters=_lengths(len(row.answer) for row in rows),
        answer_words=_lengths(len(row.answer.split()) for row in rows),
        labels=dict(labels.most_common()),
        imbalance=round(counts[0] / counts[-1], 1) if counts else None,
        identical=_identical(rows),
        conflicting=_conflicting(rows),
        near_duplicates=_near_duplicates(rows, near_duplicate),
        empty_answers=_find(rows, lambda row: row.answer.strip().lower() in _EMPTY_WORDS),
        emails=_find(rows, lambda row: bool(_EMAIL.search(_all_text(row)))),
        phones=_find(rows, lambda row: has_phone(_all_text(row))),
        cards=_find(rows, lambda row: has_card(_all_text(row))),
        removed=parts.removed,
        warnings=(*parts.warnings, *alike(labels)),
    )


def _lengths(values: Iterable[int]) -> Lengths:
    """Median, 95th percentile (nearest rank) and maximum."""
    ordered = sorted(values) or [0]
    rank = [max(0, -(-len(ordered) * share // 100) - 1) for share in (50, 95)]
    return Lengths(p50=ordered[rank[0]], p95=ordered[rank[1]], max=ordered[-1])


def _find(rows: Sequence[Example], test: Callable[[Example], bool]) -> Finding:
    found = [Path(row.source).name or row.id for row in rows if test(row)]
    return Finding(rows=len(found), examples=tuple(found[:_SHOWN]))


def _all_text(row: Example) -> str:
    return "\n".join(message.get("content") or "" for message in row.messages)


def _identical(rows: Sequence[Example]) -> Finding:
    seen: Counter[str] = Counter()

    def repeated(row: Example) -> bool:
        key = _all_text(row)
        seen[key] += 1
        return seen[key] > 1

    return _find(rows, repeated)


def _conflicting(rows: Sequence[Example]) -> Finding:
    answers: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        answers[prepare.normalise(prepare.text_of(row))].add(row.answer)
    return _find(rows, lambda row: len(answers[prepare.normalise(prepare.text_of(row))]) > 1)


def _near_duplicates(rows: Sequence[Example], threshold: float) -> Finding:
    texts = [prepare.text_of(row) for row in rows]
    numbers = prepare.near_duplicate_clusters(texts, threshold)
    sizes = Counter(numbers)
    cluster = {row.id: number for row, number in zip(rows, numbers, strict=True)}
    return _find(rows, lambda row: sizes[cluster[row.id]] > 1)


def has_phone(text: str) -> bool:
    """Whether a text holds 9 to 15 digits, grouped as people write telephone numbers."""
    return any(9 <= len(_digits(match.group())) <= 15 for match in _PHONE.finditer(text))


def has_card(text: str) -> bool:
    """Whether a text holds 15 or 16 digits whose last is the check digit of ISO/IEC 7812 (Luhn)."""
    numbers = (_digits(match.group()) for match in _CARD.finditer(text))
    return any(len(digits) in (15, 16) and _luhn(digits) for digits in numbers)


def _digits(text: str) -> str:
    return "".join(sign for sign in text if sign.isdigit())


def _luhn(digits: str) -> bool:
    doubled = [int(d) * (1 + i % 2) for i, d in enumerate(reversed(digits))]
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0
