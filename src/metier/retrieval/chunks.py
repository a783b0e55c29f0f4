"""Documents to passages: Markdown or plain text in pieces of about 120 words.

Nothing but blank space is dropped: every passage is a stretch of its document, in order. Headings
stay with the text below them, code blocks and paragraphs stay whole where they fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from metier.errors import DataError

WORDS = 120
_BYTES_PER_WORD = 10
_FENCE = re.compile(r"\s{0,3}(```|~~~)")
_HEADING = re.compile(r"#{1,6}\s[^\n]*|[^\n]+\n(={3,}|-{3,})\s*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Passage:
    """A stretch of a document.

    Attributes:
        text: the words, as written there.
        source: name of the document, such as its path.
        line: line of the document where its first paragraph begins, counted from 1.

    """

    text: str
    source: str
    line: int


def read_passages(paths: Iterable[Path]) -> list[Passage]:
    """Passages of text files, in the order of the files.

    Raises:
        DataError: a file cannot be read, is not UTF-8 text, or is empty.

    """
    passages: list[Passage] = []
    for path in paths:
        found = split(_read(path), str(path))
        if not found:
            raise DataError(str(path), "holds no text", "leave it out of data.documents")
        passages.extend(found)
    return passages


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            str(path), f"is not UTF-8 (byte {error.start})", "save it as UTF-8 text"
        ) from None
    except OSError as error:
        raise DataError(
            str(path), f"cannot be read ({error.strerror})", "name a readable text file"
        ) from None
    if "\0" in text:
        raise DataError(str(path), "holds NUL bytes: it is no text", "convert it to text first")
    return text


def split(text: str, source: str) -> list[Passage]:
    """Passages of one document, of at most about 120 words each."""
    passages: list[Passage] = []
    open_text, open_line = "", 0
    for line, block in _blocks(text):
        for piece in _pieces(block, (_SENTENCE_END, _SPACE)):
            joined = f"{open_text}\n\n{piece}" if open_text else piece
            if open_text and (_size(joined) > WORDS or _starts_section(piece, open_text)):
                passages.append(Passage(open_text, source, open_line))
                open_text = ""
            open_text, open_line = (joined, open_line) if open_text else (piece, line)
    if open_text:
        passages.append(Passage(open_text, source, open_line))
    return passages


def _starts_section(piece: str, before: str) -> bool:
    """A heading opens a new passage unless the one before it is short."""
    return bool(_HEADING.match(piece)) and _size(before) >= WORDS // 2


def _size(text: str) -> int:
    """Length in words; long strings and scripts without spaces count by their bytes."""
    size_in_bytes = len(text.encode("utf-8", errors="replace"))
    return max(len(text.split()), size_in_bytes // _BYTES_PER_WORD)


def _blocks(text: str) -> Iterator[tuple[int, str]]:
    """Paragraphs, whole code blocks, and headings with what follows, with their first lines."""
    lines: list[str] = []
    first = 0
    fence = ""
    for number, line in enumerate(text.split("\n"), start=1):
        mark = _FENCE.match(line)
        blank = not line.strip()
        ends = (blank or _HEADING.match(line)) and not fence and not _only_heading(lines)
        if lines and ends:
            yield first, "\n".join(lines)
            lines = []
        if blank and not fence:
            continue
        first = first if lines else number
        lines.append(line)
        if mark:
            fence = "" if mark[1] == fence else fence or mark[1]
    if lines:
        yield first, "\n".join(lines)


def _only_heading(lines: list[str]) -> bool:
    return len(lines) <= 2 and bool(_HEADING.fullmatch("\n".join(lines)))


def _pieces(text: str, breaks: tuple[re.Pattern[str], ...]) -> list[str]:
    """A text in pieces that fit, cut at the first kind of break that suffices."""
    if _size(text) <= WORDS:
        return [text] if text.strip() else []
    if not breaks:
        step = WORDS * _BYTES_PER_WORD // 4
        return [text[at : at + step] for at in range(0, len(text), step)]
    pieces: list[str] = []
    start = end = 0
    for stop in [*(match.end() for match in breaks[0].finditer(text)), len(text)]:
        if end > start and _size(text[start:stop]) > WORDS:
            pieces.extend(_pieces(text[start:end].strip(), breaks[1:]))
            start = end
        end = stop
    pieces.extend(_pieces(text[start:end].strip(), breaks[1:]))
    return pieces
