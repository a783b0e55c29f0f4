"""How long work tells its caller where it stands.

Recipes and everything below them report to a `Progress`; who listens is the caller's choice. The
terminal's bars are `metier.app.terminal.TerminalProgress`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Progress(Protocol):
    """Listener of a long piece of work, which consists of stages one after the other."""

    def stage(self, name: str, total: float | None = None) -> None:
        """Begin a stage; the one before it is over.

        Args:
            name: what is being done, in words, e.g. ``train lora, seed 1``.
            total: units of work in it (steps, requests), None where it is not known.

        """
        ...

    def advance(self, n: float = 1, **info: object) -> None:
        """Count `n` more units of the stage as done; `info` is shown beside, e.g. ``loss=1.93``."""
        ...

    def say(self, text: str) -> None:
        """Tell the person one line that should stay on the screen."""
        ...


class Silent:
    """A `Progress` that tells nobody."""

    def stage(self, name: str, total: float | None = None) -> None:
        """Ignore it."""

    def advance(self, n: float = 1, **info: object) -> None:
        """Ignore it."""

    def say(self, text: str) -> None:
        """Ignore it."""


@contextmanager
def no_weight_bar() -> Iterator[None]:
    """Without what transformers draws and says of weights: who loads them checks them."""
    from transformers.utils import logging

    bar: Any = logging
    shown, said = bar.is_progress_bar_enabled(), bar.get_verbosity()
    bar.disable_progress_bar()
    bar.set_verbosity_error()
    try:
        yield
    finally:
        bar.set_verbosity(said)
        if shown:
            bar.enable_progress_bar()
