"""The command line: a thin shell over `metier.recipes`.

Results go to the standard output, progress and errors to the standard error. Exit codes: 0 done,
1 a fault of metier's own, 2 something the user can mend, 130 interrupted, 143 terminated.
Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import secrets
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from metier.errors import MetierError, RunError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from metier.evaluation.schema import Verdict

app = typer.Typer(
    name="metier",
    help="Turn a general language model into a specialist for one task, and prove that it did.",
    epilog="First time here? 'metier demo' runs the whole loop on built-in data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

TaskFile = Annotated[Path, typer.Argument(metavar="TASK", help="task.yaml, see 'metier init'.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="Directory that 'metier run' made.")]
ArmName = Annotated[
    str | None, typer.Option(metavar="ARM", help="An arm; by default the one of the verdict.")
]
TunedArm = Annotated[str, typer.Argument(metavar="ARM", help="A tuned arm: lora, full, ...")]
Out = Annotated[Path | None, typer.Option(metavar="PATH", help="Where to write the result.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field, e.g. training.epochs=3."),
]
Budget = Annotated[
    float | None, typer.Option(metavar="MINUTES", min=0, help="Longest time the work may take.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON to the standard output and nothing else.")
]

_T = TypeVar("_T")
_NONE: list[str] = []
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RESUMABLE = ("demo", "run", "train", "pretrain", "predict")


def main() -> None:
    """Entry point of the `metier` command."""
    signal.signal(signal.SIGTERM, _terminate)
    if _follows():
        # Of the processes of torchrun the first one speaks; the others only say what went wrong.
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    if not sys.warnoptions:  # what libraries will change one day is not the user's to mend
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
    app()


def _follows() -> bool:
    """Whether torchrun has started this process as another than the first."""
    return os.environ.get("RANK", "0") != "0"


def _terminate(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose errors end in one clear message and an exit code."""

    @functools.wraps(function)
    def guarded(**arguments: Any) -> None:
        with _told(function.__name__, arguments["as_json"]):
            function(**arguments)

    return app.command()(guarded)


@contextlib.contextmanager
def _told(command: str, as_json: bool) -> Iterator[None]:
    """Turn what went wrong in a command into a message and an exit code."""
    try:
        yield
    except (typer.Exit, BrokenPipeError):
        raise
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[0] if interrupt.args else signal.SIGINT
        go_on = " What is finished is kept: the same command goes on from there."
        _tell("\ninterrupted." + (go_on if command in _RESUMABLE else ""))
        raise typer.Exit(128 + number) from None
    except Exception as error:
        if os.environ.get("METIER_DEBUG") == "1":
            traceback.print_exc()
        raise typer.Exit(_tell_error(error, command, as_json)) from None


def _tell_error(error: Exception, command: str, as_json: bool) -> int:
    """Say what is wrong; returns the exit code."""
    if isinstance(error, OSError) and error.errno:
        remedy = "check the path, its permissions and the space left"
        if error.errno in _NO_ROOM:
            go_on = ", then give the same command again: it goes on where it stopped"
            remedy = "make room there" + (go_on if command in _RESUMABLE else "")
        place = str(error.filename or "writing or reading a file")
        error = RunError(place, error.strerror or "failed", remedy)
    if _follows():
        sys.stderr = sys.__stderr__
    if isinstance(error, MetierError):
        _tell(f"error: {error}")
        if as_json:
            parts = ("place", "cause", "remedy")
            _print({"error": {part: getattr(error, part) for part in parts}}, as_json)
        return 2
    _tell(f"a fault of metier's own: {type(error).__name__}: {error}")
    _tell("  METIER_DEBUG=1 shows where it happened; please report it with that.")
    return 1


def _tell(text: str) -> None:
    from metier.app.terminal import printable

    print(printable(text), file=sys.stderr, flush=True)


def _print(value: Any, as_json: bool) -> None:
    from metier.app import terminal

    print(terminal.as_json(value) if as_json else terminal.as_outline(value), flush=True)


def _show(value: _T, table: Callable[[_T], RenderableType], as_json: bool) -> None:
    """Print a result as a table for people, or as JSON."""
    from rich.console import Console

    if as_json:
        _print(value, as_json)
    else:
        Console(highlight=False).print(table(value))


def _show_verdict(verdict: Verdict, directory: Path, as_json: bool) -> None:
    from metier.evaluation.report import terminal_table

    _show(verdict, terminal_table, as_json)
    _tell(f"report: {directory / 'report.html'}")


def _show_sweep(path: Path, as_json: bool) -> None:
    from metier.app.tables import sweep_table
    from metier.recipes.sweeping import read_sweep

    _show({"path": str(path), "sweep": read_sweep(path.parent)}, sweep_table, as_json)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        print(f"metier {metadata.version('metier')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    """Options of `metier` itself."""


@_command
def demo(
    name: Annotated[
        Literal["stdlib", "extract"],
        typer.Argument(help="stdlib: route a description to a module; extract: fields as JSON."),
    ] = "stdlib",
    out: Out = None,
    overrides: Overrides = _NONE,
    budget: Budget = None,
    as_json: Json = False,
) -> None:
    """Run the whole loop on real built-in data: no network, no accelerator."""
    from metier import recipes
    from metier.app.terminal import TerminalProgress

    with TerminalProgress() as progress:
        verdict = recipes.demo(name, out, overrides, budget, progress)
    _show_verdict(verdict, recipes.run_directory(verdict.task, out), as_json)


@_command
def init(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSONL, CSV, TSV, JSON, Parquet, CoNLL.")
    ],
    out: Out = None,
    force: Annotated[bool, typer.Option(help="Write over an existing task.yaml.")] = False,
    as_json: Json = False,
) -> None:
    """Look at the data and propose a task.yaml, each guess explained in it."""
    from metier import recipes

    path = recipes.init(file, out, force)
    _print({"task": str(path)}, as_json)
    _tell(f"read it, mend what was guessed wrong, then: metier run {path}")


@_command
def audit(task_file: TaskFile, overrides: Overrides = _NONE, as_json: Json = False) -> None:
    """Show what is in the data, what is wrong with it, and what would leak."""
    from metier import recipes
    from metier.app.tables import audit_table

    _show(recipes.audit(task_file, overrides), audit_table, as_json)


@_command
def plan(task_file: TaskFile, overrides: Overrides = _NONE, as_json: Json = False) -> None:
    """Estimate time and memory of every arm before anything runs."""
    from metier import recipes
    from metier.app.tables import plan_table
    from metier.app.terminal import TerminalProgress

    with TerminalProgress() as progress:
        estimate = recipes.plan(task_file, overrides, progress)
    _show(estimate, plan_table, as_json)


@_command
def run(
    task_file: TaskFile,
    out: Out = None,
    overrides: Overrides = _NONE,
    budget: Budget = None,
    as_json: Json = False,
) -> None:
    """Compare the arms on a sealed test part and give a verdict; goes on where it stopped."""
    from metier import recipes
    from metier.app.terminal import TerminalProgress

    with TerminalProgress() as progress:
        verdict = recipes.run(task_file, out, overrides, budget, progress)
    _show_verdict(verdict, recipes.run_directory(verdict.task, out), as_json)


@_command
def train(
    task_file: TaskFile,
    arm: TunedArm,
    out: Out = None,
    overrides: Overrides = _NONE,
    budget: Budget = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Search learning rate and rank on validation first.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train one arm alone, without a verdict."""
    from metier import recipes
    from metier.app.terminal import TerminalProgress

    with TerminalProgress() as progress:
        path = recipes.train(task_file, arm, out, overrides, budget, sweep, progress)
    if sweep:
        _show_sweep(path, as_json)
    else:
        _print({"path": str(path)}, as_json)


@_command
def overfit(
    task_file: TaskFile,
    arm: TunedArm,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the training part.")] = 8,
    overrides: Overrides = _NONE,
    as_json: Json = False,
) -> None:
    """See whether an arm can learn at all: a few rows by heart. Keeps nothing."""
    from metier import recipes
    from metier.app.tables import overfit_table
    from metier.app.terminal import TerminalProgress

    with TerminalProgress() as progress:
        found = recipes.overfit(task_file, arm, rows, overrides, progress)
    _show(found, overfit_table, as_json)
    if not found.passed:
        raise typer.Exit(2)


@_command
def pretrain(
    config_file: Annotated[Path, typer.Argument(metavar="RECIPE", help="See docs/pretraining.md.")],
    out: Out = None,
    overrides: Overrides = _NONE,
    as_json: Json = False,
) -> None:
    """Train a base on text: a new one from random weights, or a given one further."""
    from metier import recipes
    from metier.app.terminal import TerminalProgress

    with TerminalProgress() as progress:
        path = recipes.pretrain(config_file, out, overrides, progress)
    _print({"path": str(path)}, as_json)


@_command
def predict(
    run: RunDir,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Inputs, laid out as the task's.")],
    out: Out = None,
    arm: ArmName = None,
    as_json: Json = False,
) -> None:
    """Write the specialist's answers to every input of a file."""
    from metier import recipes
    from metier.app.terminal import TerminalProgress

    with TerminalProgress() as progress:
        path = recipes.predict(run, file, out, arm, progress)
    _print({"path": str(path)}, as_json)


@_command
def export(
    run: RunDir,
    arm: ArmName = None,
    out: Out = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapter into its base.")
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Inputs to prove it on; by default of the test part."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the specialist as files that others load, once they are proven to answer the same."""
    from metier import recipes
    from metier.app.tables import export_table
    from metier.app.terminal import TerminalProgress
    from metier.evaluation.proof import read_proof

    with TerminalProgress() as progress:
        path = recipes.export(run, arm, out, merge, prompts, progress)
    _show({"path": str(path), "proof": read_proof(path)}, export_table, as_json)


@_command
def chat(run: RunDir, arm: ArmName = None, as_json: Json = False) -> None:
    """Ask the specialist in the terminal, or answer the lines of the standard input."""
    from metier import recipes
    from metier.app.chat import converse

    converse(recipes.specialist(run, arm), as_json)


@_command
def serve(
    run: RunDir,
    arm: ArmName = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 8000,
    allow_host: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="Another host name clients may address it by."),
    ] = _NONE,
    no_key: Annotated[
        bool, typer.Option("--no-key", help="Ask for no key; on this machine only.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Serve the specialist as an OpenAI-compatible API.

    The key is METIER_API_KEY where that is set, else a new one, printed once.
    Answers are those the verdict measured unless a request names a temperature.
    """
    from metier import recipes

    given = os.environ.get("METIER_API_KEY")
    key = None if no_key else given or secrets.token_urlsafe(32)

    def announce(url: str) -> None:
        shown = {"url": url} | ({} if no_key or given else {"api_key": key})
        _print(shown, as_json)

    recipes.serve(run, arm, host, port, key, allow_host, announce)
