"""Files in CoNLL's form: a token in each line, its tag last, blank lines between sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from metier.errors import DataError

TAG = re.compile(r"O|[BIESLU]-\S+")
"""What a token is tagged with: outside of any span, or a place in one and its type."""
SUFFIXES = (".conll", ".bio", ".iob", ".iob2", ".txt")
_DOCUMENT = "-DOCSTART-"


def is_tagged(line: str) -> bool:
    """Whether a line is a token with its tag: no name of a column is O or B-person."""
    return "\t" in line and TAG.fullmatch(_cells(line)[-1]) is not None


def sentences(
    path: Path, lines: Iterator[str], longest: int
) -> Iterator[tuple[int, list[str], list[str]]]:
    """The sentences of a file: number of the first line, tokens, and the tag of each.

    Left out are comments (a line that begins with # and ends in no tag) and the lines of
    CoNLL-2003 that begin a document.

    Raises:
        DataError: a line has no tag, or a sentence more than `longest` characters.

    """
    first = size = 0
    tokens: list[str] = []
    tags: list[str] = []
    for number, line in enumerate(chain(lines, [""]), start=1):
        cells = _cells(line)
        if cells and cells[0].startswith("#") and not TAG.fullmatch(cells[-1]):
            continue
        if cells:
            _check(f"{path}:{number}", cells)
            first, size = first or number, size + len(line)
            tokens.append(cells[0])
            tags.append(cells[-1])
        elif tokens:
            if tokens != [_DOCUMENT]:
                yield first, tokens, tags
            tokens, tags, first, size = [], [], 0, 0
        if size > longest:
            raise DataError(
                f"{path}:{first}",
                f"the sentence is longer than {longest:,} characters",
                "put a blank line between sentences",
            )


def _cells(line: str) -> list[str]:
    """Cells of a line; none of a blank one."""
    if not line.strip():
        return []
    return [cell.strip() for cell in line.split("\t")] if "\t" in line else line.split()


def _check(place: str, cells: list[str]) -> None:
    if len(cells) < 2 or not cells[0] or not TAG.fullmatch(cells[-1]):
        raise DataError(
            place,
            "is no token with its tag, such as 'London B-place' or 'is O'",
            "write a token first and its tag last in each line (O, or B- or I- and a type), and a "
            "blank line between sentences",
        )
