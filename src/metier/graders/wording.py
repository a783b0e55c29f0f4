"""How graders compare plain texts, and how they name texts and rows in words."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def normalise(text: str, ignore_case: bool = False) -> str:
    """Compose characters (NFC), strip, and make every run of white space one space."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return text.casefold() if ignore_case else text


def case_is_meaningless(texts: Sequence[str]) -> bool:
    """Whether no two different texts become the same when case is ignored."""
    return len({normalise(text, True) for text in texts}) == len(set(map(normalise, texts)))


def quote(text: str, limit: int = 60) -> str:
    """A text as an explanation shows it: on one line, in quotes, cut when long."""
    line = " ".join(text.split())
    return f"'{line}'" if len(line) <= limit else f"'{line[: limit - 1]}…'"
