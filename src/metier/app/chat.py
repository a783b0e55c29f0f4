"""`metier chat`: requests from the terminal, answered piece by piece."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from typing import Protocol

from metier.app.terminal import as_json, printable
from metier.errors import MetierError
from metier.records import Chat, Completion


class Specialist(Protocol):
    """What chatting needs of a specialist."""

    def stream(self, chat: Chat) -> Generator[str, None, Completion]:
        """Yield the answer piece by piece and return the whole."""
        ...


def converse(specialist: Specialist, json_lines: bool) -> None:
    """Answer every line until the input ends; each is a request of its own, as when evaluated.

    In a terminal an answer can be stopped with Ctrl-C, and a request that cannot be answered is
    said to be so; then the next is asked for.

    Args:
        specialist: answers greedily.
        json_lines: print one JSON object per answer instead of its text.

    """
    for line in _requests():
        pieces = specialist.stream([{"role": "user", "content": line}])
        try:
            _answer(pieces, json_lines)
        except MetierError as error:
            if not sys.stdin.isatty():
                raise
            print(printable(f"error: {error}"), file=sys.stderr)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print(" ... (stopped)", file=sys.stderr)


def _requests() -> Iterator[str]:
    """Lines of the standard input that are not blank; a terminal is shown a prompt."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    import readline  # noqa: F401 - gives input() a history and editing

    print("One request a line; Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:  # as in a shell: this line is given up
            print(file=sys.stderr)
            continue
        except EOFError:
            print(file=sys.stderr)
            return
        if line:
            yield line


def _answer(pieces: Generator[str, None, Completion], json_lines: bool) -> None:
    """Print an answer while it is made, or whole as JSON."""
    if json_lines:
        print(as_json(_whole(pieces, _ignore)), flush=True)
        return
    whole = _whole(pieces, lambda piece: print(printable(piece), end="", flush=True))
    print("" if whole.finished else " ... (cut at the length limit)")


def _whole(pieces: Generator[str, None, Completion], show: Callable[[str], None]) -> Completion:
    while True:
        try:
            show(next(pieces))
        except StopIteration as end:
            completion: Completion = end.value
            return completion


def _ignore(_: str) -> None:
    pass
