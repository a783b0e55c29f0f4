"""What a finished run left: its verdict, and where its arms lie."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from metier import runs
from metier.config import Config
from metier.errors import ConfigError, RunError
from metier.evaluation.schema import Verdict
from metier.task import Arm

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Found:
    """An arm of a finished run, checked against its manifest and not yet loaded.

    Attributes:
        arm: which arm.
        directory: what it was made into.
        data: what the run kept of the task and its data.
        verdict: of the run.

    """

    arm: Arm
    directory: Path
    data: Path
    verdict: Verdict


def find(run: Path, arm: str | None) -> Found:
    """Find an arm of a finished run; by default the one the verdict names.

    Raises:
        RunError: the run is not finished, has no such arm, or its verdict names none.

    """
    verdict = read_verdict(run)
    wanted = arm or verdict.arm
    index = _read_file(_Index, run / "arms.json", "run 'metier run' again: it writes this anew")
    if not wanted:
        remedy = f"choose one all the same with --arm: {', '.join(index.arms)}"
        raise RunError(str(run), "has no arm that its verdict would use", remedy)
    if wanted not in index.arms:
        raise RunError(str(run), f"has no arm '{wanted}'", f"choose from {', '.join(index.arms)}")
    made = index.arms[wanted]
    found = Found(made.arm, run / made.directory, run / index.data, verdict)
    for path in (found.directory, found.data):
        runs.verify(path)
    return found


class _Made(Config):
    """Where an arm lies in its run."""

    arm: Arm
    directory: str


class _Index(Config):
    """What `Experiment.publish` writes into arms.json."""

    data: str
    arms: dict[str, _Made]


def read_verdict(run_directory: Path) -> Verdict:
    """Read the verdict of a finished run.

    Raises:
        RunError: there is none.

    """
    return _read_file(Verdict, run_directory / "verdict.json", "run 'metier run' to its end first")


def _read_file(kind: type[C], path: Path, remedy: str) -> C:
    """Read a JSON file that `Experiment.publish` wrote.

    Raises:
        RunError: it is missing or damaged; `remedy` says what to do then.

    """
    try:
        return kind.parse(json.loads(path.read_text("utf-8")), str(path))
    except (OSError, ValueError) as error:
        raise RunError(str(path), f"cannot be read ({error})", remedy) from None
    except ConfigError as error:
        raise RunError(error.place, error.cause, remedy) from None
