"""Ids, as they are generated, to pieces of text that can be shown at once."""

from __future__ import annotations

from collections.abc import Sequence

from metier.text.tokenizer import Tokenizer


def before(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The stripped text up to the first of some stop strings, and whether one is in it.

    White space before the text is dropped before stop strings are looked for.
    """
    text = text.lstrip()
    ends = [text.find(one) for one in stop if one in text]
    return text[: min(ends, default=len(text))].rstrip(), bool(ends)


class Pieces:
    """Turns one answer's ids into text pieces whose concatenation is the stripped answer.

    A piece never ends in half a character. Trailing white space, and text that may turn out to
    be the start of a stop string, is held back until more is known.

    Attributes:
        stopped: a stop string was found; it and what follows it are not part of the text.

    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._ids: list[int] = []
        self._shown = 0
        self.stopped = False

    @property
    def count(self) -> int:
        """Number of ids so far."""
        return len(self._ids)

    def push(self, token: int) -> str:
        """Text that became certain with this id; often empty."""
        self._ids.append(token)
        text = self.text()
        return self._show(text, len(text) if self.stopped else self._certain(text))

    def finish(self) -> str:
        """The rest of the text."""
        text = self.text()
        return self._show(text, len(text))

    def text(self) -> str:
        """The whole stripped answer so far, without a stop string."""
        text, self.stopped = before(self._tokenizer.decode(self._ids), self._stop)
        return text

    def _certain(self, text: str) -> int:
        """Length of the text that later ids cannot change."""
        text = text.rstrip("\ufffd")
        held = 0
        for stop in self._stop:
            lengths = range(min(len(stop) - 1, len(text)), 0, -1)
            held = max(held, next((n for n in lengths if text.endswith(stop[:n])), 0))
        return len(text[: len(text) - held].rstrip())

    def _show(self, text: str, end: int) -> str:
        end = max(end, self._shown)
        piece = text[self._shown : end]
        self._shown = end
        return piece
