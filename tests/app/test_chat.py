"""`metier chat` in a real terminal over the real 260 k model."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

CTRL_C, CTRL_D = "\x03", "\x04"
# A slow answer takes 20 seconds, which nobody waits for.
PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from metier.app.chat import converse
from metier.model.generate import Engine
from metier.model.load import load_base
from metier.recipes.answering import Specialist
from metier.text.template import Renderer
base = load_base(sys.argv[1], device="cpu")
engine = Engine(base.model, Renderer(base.tokenizer, "plain"), 100)
class Slow(Specialist):
    def stream(self, chat):
        pieces = super().stream(chat)
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                return end.value
            yield piece
            time.sleep(0.2 if chat[0]["content"].startswith("Slow") else 0)
converse(Slow("stories", None, engine, engine, ""), "--json" in sys.argv)
"""


class Terminal:
    """A program in a terminal of its own: what is typed and what is shown."""

    def __init__(self, command: list[str]) -> None:
        self._master, child = pty.openpty()
        mode = termios.tcgetattr(child)
        mode[3] &= ~termios.ECHO
        termios.tcsetattr(child, termios.TCSANOW, mode)
        environment = os.environ | {"TERM": "dumb"}
        self.process = subprocess.Popen(
            command, env=environment, preexec_fn=lambda: os.login_tty(child)
        )
        os.close(child)
        self._seen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, pattern: str, seconds: float = 120) -> str:
        """What is shown up to a pattern; each call goes on where the last one ended."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self._seen)):
            assert time.monotonic() < end, f"no {pattern!r} in {self._seen!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                self._seen += os.read(self._master, 65536).decode()
        shown, self._seen = self._seen[: found.end()], self._seen[found.end() :]
        return shown

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(stories260k: Path) -> Iterator[Terminal]:
    made = Terminal([sys.executable, "-c", PROGRAM, str(stories260k)])
    yield made
    made.close()


def test_a_chat_in_a_terminal(terminal: Terminal) -> None:
    terminal.until("Ctrl-C stops an answer, Ctrl-D ends.")
    terminal.until("> ")

    terminal.type("Slow Lily wanted a cake\n")
    terminal.until(r"\w+ \w+ \w+ \w+")
    terminal.type(CTRL_C)
    stopped = terminal.until("> ")
    assert "... (stopped)" in stopped
    assert len(stopped) < 200, "the whole story is longer"

    terminal.type("once upon a time " * 300 + "\n")
    refused = terminal.until("> ")
    assert "error: messages: are longer than the model's maximum context length" in refused
    assert "remedy: shorten them" in refused

    terminal.type("Once upon a time\n")
    story = terminal.until("> ")
    assert len(story) > 250
    assert "(cut at the length limit)" in story

    terminal.type("half a li")
    time.sleep(1)  # a Ctrl-C between the prompt and readline's wait is seen at the next key only
    terminal.type(CTRL_C)
    assert "error" not in terminal.until("> ")

    terminal.type(CTRL_D)
    assert terminal.process.wait(120) == 0


def test_lines_that_are_piped_in_end_with_the_error(stories260k: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(stories260k), "--json"],
        input="One day\n" + "once upon a time " * 300 + "\nOne day\n",
        capture_output=True,
        text=True,
    )
    assert done.stdout.count("\n") == 1
    assert "maximum context length" in done.stderr
    assert done.returncode != 0
