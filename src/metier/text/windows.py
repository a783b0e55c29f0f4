"""Cut texts into windows in which a model reads them, so that every byte is read once."""

from __future__ import annotations

import math
from collections.abc import Iterator

from metier.text.tokenizer import Tokenizer


def cut(text: str, length: int) -> Iterator[str]:
    """Cut a text into pieces of at most `length` characters, before white space where possible.

    The pieces are about equally long, so that no short rest stands for a window. Joined they are
    the text, so that every byte is scored once.
    """
    start = 0
    while left := len(text) - start:
        piece = text[start : start + math.ceil(left / math.ceil(left / length))]
        if len(piece) < left:
            spaces = (i for i in range(len(piece) - 1, 0, -1) if piece[i].isspace())
            piece = piece[: next(spaces, len(piece))]
        yield piece
        start += len(piece)


def fit(piece: str, tokenizer: Tokenizer, room: float) -> Iterator[str]:
    """The piece, or its halves and so on until each is at most `room` tokens."""
    if len(piece) < 2 or len(tokenizer.encode(piece)) <= room:
        yield piece
    else:
        for half in cut(piece, math.ceil(len(piece) / 2)):
            yield from fit(half, tokenizer, room)
