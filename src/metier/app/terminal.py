"""What a person sees: progress on the standard error, results on the standard output."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

import yaml
from pydantic_core import to_json, to_jsonable_python
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from metier.evaluation import units

_LOG_SECONDS = 30.0


def as_json(value: Any) -> str:
    """One line of JSON; numbers that JSON lacks become null."""
    return to_json(value, inf_nan_mode="null").decode()


def as_outline(value: Any) -> str:
    """The same values as indented ``key: value`` lines, for reading."""
    plain = to_jsonable_python(value)
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100).rstrip()


def printable(text: str) -> str:
    """Text without what could steer a terminal: models and data files write anything."""
    kept = "\n\t\N{NO-BREAK SPACE}"
    return "".join(c if c.isprintable() or c in kept else "\N{REPLACEMENT CHARACTER}" for c in text)


class TerminalProgress:
    """A `metier.progress.Progress`: bars with the time left; a log where there is no terminal.

    Use as a context manager. A finished stage leaves one line with its duration.
    """

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[info]}", style="dim"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._name = ""
        self._began = self._logged = time.monotonic()

    def __enter__(self) -> TerminalProgress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_stage(finished=error is None)
        self._bars.stop()

    def stage(self, name: str, total: float | None = None) -> None:
        """Begin a stage; the one before it is over."""
        self._end_stage(finished=True)
        self._began = self._logged = time.monotonic()
        self._name = name
        self._task = self._bars.add_task(escape(name), total=total, info="")
        if self._bars.disable:
            self.say(f"{name} ...")

    def advance(self, n: float = 1, **info: object) -> None:
        """Count `n` more units of the stage as done."""
        if self._task is None:
            return
        shown = "  ".join(f"{key} {_short(value)}" for key, value in info.items())
        self._bars.update(self._task, advance=n, info=escape(shown))
        if self._bars.disable and time.monotonic() - self._logged > _LOG_SECONDS:
            self._logged = time.monotonic()
            self._log(shown)

    def say(self, text: str) -> None:
        """Print one line that stays."""
        self._console.print(printable(text), markup=False, soft_wrap=True)

    def _end_stage(self, *, finished: bool) -> None:
        if self._task is None:
            return
        self._bars.remove_task(self._task)
        self._task = None
        if finished:
            self.say(f"{self._name}: {units.seconds(time.monotonic() - self._began)}")

    def _log(self, shown: str) -> None:
        task = self._bars.tasks[0]
        done = f"{task.completed:,.0f}" + (f"/{task.total:,.0f}" if task.total else "")
        left = task.time_remaining
        more = f", {units.seconds(left)} left" if left is not None else ""
        self.say(f"  {done}{more}  {shown}".rstrip())


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
