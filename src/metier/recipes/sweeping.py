"""Search learning rate and rank by successive halving, on the validation part alone.

All settings are trained for a small part of their steps; the better half goes on from where it
stopped for twice as many, until one is left, which is trained to its end (Jamieson and Talwalkar
2016, arXiv 1502.07943; rungs as in Hyperband, Li et al. 2018, arXiv 1603.06560, with eta = 2).

A rung pauses a training and changes nothing of it: each has the schedule of its whole length, so
the winner is, to the byte, the arm that its settings give without a sweep. The price is that
learning rates are compared before they have fallen, which is a little to the favour of low ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metier import runs
from metier.config import Config, overridden
from metier.errors import ConfigError, DivergedError, RunError
from metier.evaluation import units
from metier.model.load import base_config
from metier.model.world import World
from metier.progress import Progress, Silent
from metier.recipes import making, planning, tuning
from metier.recipes.stages import Stages, held, slug
from metier.recipes.workbench import Workbench, only_arm, open_workbench, read_task
from metier.runs import Run
from metier.task import Arm, Training
from metier.training.sft import rate_of

RATES = (0.3, 1.0, 3.0)
"""Factors on the task's learning rate."""
RANKS = (0.5, 1.0, 2.0)
"""Factors on the task's rank. The best rate hardly depends on it where alpha stays as it is
(Schulman et al. 2025, "LoRA Without Regret")."""
_FILE = "sweep.json"


class Rung(Config):
    """Where a setting stood after a rung."""

    rung: int
    """From 1."""
    steps: int = 0
    """Optimiser steps done in all."""
    validation_loss: float | None = None
    """At the best step so far; none where the training has diverged."""
    validation_mistakes: float | None = None
    """Share of the validation answers' tokens that would be written wrong; a head writes none."""
    seconds: float = 0.0
    """Of training, in all."""
    failed: str = ""
    """Why the setting cannot be trained."""

    @property
    def order(self) -> tuple[float, float]:
        """By what a training chooses its parameters, too; the least is the best."""
        infinite = float("inf")
        loss = infinite if self.validation_loss is None else self.validation_loss
        mistakes = infinite if self.failed else self.validation_mistakes or 0.0
        return mistakes, loss


class Trial(Config):
    """One setting and how far it came."""

    learning_rate: float
    rank: int | None
    """None where the arm has none."""
    overrides: tuple[str, ...]
    """What to give to `--set` for it; nothing for the task's own setting."""
    rungs: tuple[Rung, ...] = ()


class Sweep(Config):
    """What a sweep tried, the winner first."""

    arm: str
    seed: int
    directory: str
    """Of the winner's arm, in the run."""
    trials: tuple[Trial, ...]


class _Bar(Silent):
    """Counts the steps of each setting as parts of a unit in the bar of its rung.

    Steps of earlier rungs, which a training that goes on counts again, are left out. What is said
    is said once, not once for each setting.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress, self._said = progress, set[str]()
        self._span = (0.0, 0.0)
        self._steps = self._again = self._shown = 0.0

    def begin(self, before: float, part: float) -> None:
        """The next setting is trained from one part of its steps to another."""
        self._span, self._shown = (before, part), 0.0

    def end(self) -> None:
        """The setting is done, by whatever number of steps."""
        self._progress.advance(1 - self._shown)

    def stage(self, _: str, total: float | None = None) -> None:
        """Hear how many steps a whole training has."""
        before, part = self._span
        self._again = before * (total or 0)
        self._steps = (part - before) * (total or 0)

    def advance(self, n: float = 1, **info: object) -> None:
        """Pass on what is new."""
        again = min(n, self._again)
        self._again -= again
        if self._steps:
            new = min((n - again) / self._steps, 1 - self._shown)
            self._shown += new
            self._progress.advance(new, **info)

    def say(self, text: str) -> None:
        """Pass on what was not said yet."""
        if text not in self._said:
            self._said.add(text)
            self._progress.say(text)


@dataclass
class _Entrant:
    """A setting in the race, the task with it, and where it is trained."""

    trial: Trial
    bench: Workbench
    stages: Stages

    def reached(self, rung: Rung) -> None:
        self.trial = self.trial.model_copy(update={"rungs": (*self.trial.rungs, rung)})

    @property
    def last(self) -> Rung:
        return self.trial.rungs[-1]


def grid(bench: Workbench, arm: Arm) -> list[Trial]:
    """The settings around the task's own.

    Raises:
        ConfigError: one of them is no valid setting.

    """
    training, tuning_ = bench.task.training, arm.tuning
    assert tuning_ is not None  # noqa: S101  the arm is a tuned one
    config = base_config(bench.task.bases()[0])
    rate = training.learning_rate or rate_of(config, tuning_)
    own = training.lora.rank if "lora" in tuning_.reads else None
    ranks = sorted({max(1, int(own * factor)) for factor in RANKS}) if own else [None]
    found = []
    for rank in ranks:
        for factor in RATES:
            tried = float(f"{rate * factor:.3g}")
            changes = [f"training.learning_rate={tried}"] if factor != 1 else []
            changes += [f"training.lora.rank={rank}"] if rank != own else []
            found.append(Trial(learning_rate=tried, rank=rank, overrides=tuple(changes)))
            _with(bench, found[-1])
    return found


def parts(settings: int) -> list[tuple[int, float]]:
    """How many settings are trained for which part of their steps, rung by rung."""
    halvings = settings.bit_length() - 1
    return [(settings >> rung, 2.0 ** (rung - halvings)) for rung in range(halvings + 1)]


def trainings(settings: int) -> float:
    """How many whole trainings a sweep is as much work as."""
    work, before = 0.0, 0.0
    for left, part in parts(settings):
        work, before = work + left * (part - before), part
    return work


def search(
    task_file: Path,
    out: Path,
    overrides: Iterable[str],
    budget: float | None,
    progress: Progress,
) -> Path:
    """Train the only arm of a task with the best setting. See `recipes.train`."""
    task = read_task(task_file, overrides)
    arm = only_arm(task)
    planning.check_machine(task)
    making.check_bases(task)
    directory = Run(out)
    with held(directory) as world:
        _refuse_helpers(world)
        bench = open_workbench(task, task_file.parent)
        settings = grid(bench, arm)
        work = trainings(len(settings))
        estimate = planning.plan_training(bench, progress, work)
        planning.hold(estimate, task.budget if budget is None else budget)
        progress.say(
            f"{len(settings)} settings are about as much work as {work:.1f} trainings: "
            f"{units.seconds(estimate.minutes * 60)}"
        )
        return sweep(bench, arm, task.training.seeds[0], directory, progress)


def _refuse_helpers(world: World) -> None:
    if world.size > 1:
        raise ConfigError(
            "torchrun",
            "a sweep is the work of one process",
            "start it without torchrun; what it finds can be trained by several processes",
        )


def sweep(bench: Workbench, arm: Arm, seed: int, run: Run, progress: Progress) -> Path:
    """Find the best setting of an arm, train it to its end and write ``sweep.json``.

    Args:
        bench: what the arm is made from.
        arm: a tuned arm.
        seed: of every training.
        run: the directory, which is held; what is finished there is not made again.
        progress: is told every step.

    Returns:
        the directory of the winner.

    Raises:
        DivergedError: every setting did.
        TrainingError: a row cannot be trained on, or memory does not suffice.

    """
    Stages(bench, run, progress).rehearsal(arm)
    bar, entrants = _Bar(progress), []
    for trial in grid(bench, arm):
        changed = _with(bench, trial)
        entrants.append(_Entrant(trial, changed, Stages(changed, run, bar)))
    rungs, before, left = parts(len(entrants)), 0.0, entrants
    for number, (count, part) in enumerate(rungs[:-1], start=1):
        progress.stage(f"rung {number} of {len(rungs)}: {count} settings of {arm.name}", count)
        for entrant in left:
            bar.begin(before, part)
            entrant.reached(_rung(entrant.stages, arm, seed, run, number, part))
            bar.end()
        before, left = part, _better(left, rungs[number][0])
        progress.say(f"go on: {'; '.join(_named(entrant.trial) for entrant in left)}")
        for entrant in entrants:
            if entrant not in left:  # checkpoints of all would take much room
                shutil.rmtree(entrant.stages.unfinished(arm, seed), ignore_errors=True)
    (winner,) = left
    path = Stages(winner.bench, run, progress).make(arm, seed)
    winner.reached(_finished(path, len(rungs)))
    ranked = sorted(entrants, key=lambda one: (-len(one.trial.rungs), one.last.order))
    trials = tuple(entrant.trial for entrant in ranked)
    found = Sweep(arm=arm.name, seed=seed, directory=path.name, trials=trials)
    runs.write_atomic(run.path / _FILE, found.model_dump_json(indent=1))
    return path


def read_sweep(run: Path) -> Sweep:
    """Read what the last sweep of a run directory tried.

    Raises:
        RunError: there was none.

    """
    try:
        return Sweep.parse(json.loads((run / _FILE).read_text("utf-8")), str(run / _FILE))
    except (OSError, ValueError) as error:
        raise RunError(
            str(run / _FILE), f"cannot be read ({error})", "run 'metier train --sweep' again"
        ) from None


def _with(bench: Workbench, trial: Trial) -> Workbench:
    """The workbench with a setting.

    Raises:
        ConfigError: it is no valid one.

    """
    values: dict[str, Any] = {"training": bench.task.training.model_dump()}
    changed = overridden(values, trial.overrides)["training"]
    training = Training.parse(changed, f"sweep, {_named(trial)}: training")
    return replace(bench, task=bench.task.model_copy(update={"training": training}))


def _rung(stages: Stages, arm: Arm, seed: int, run: Run, number: int, part: float) -> Rung:
    """Train a setting up to a part of its steps, or find how it stood there."""

    def make(path: Path) -> None:
        try:
            state = stages.begin(arm, seed, part)
        except DivergedError as error:
            found = Rung(rung=number, failed=f"{error.place}: {error.cause}")
        else:
            found = Rung(
                rung=number,
                steps=state.step,
                validation_loss=state.best_loss,
                validation_mistakes=state.best_mistakes if arm.mode == "text" else None,
                seconds=state.seconds,
            )
        (path / "rung.json").write_text(found.model_dump_json())

    inputs = {"arm": stages.place(arm, seed).name, "part": part}
    path = run.stage(f"rungs/{slug(arm)}-seed{seed}", inputs, make)
    return Rung.parse(json.loads((path / "rung.json").read_text("utf-8")), str(path))


def _better(entrants: Sequence[_Entrant], count: int) -> list[_Entrant]:
    """The best of some settings, as many as can be trained.

    Raises:
        DivergedError: none can be trained.

    """
    ranked = sorted(entrants, key=lambda entrant: entrant.last.order)
    if ranked[0].last.failed:
        raise DivergedError(
            f"sweep, {_named(ranked[0].trial)}",
            f"every setting failed; this one: {ranked[0].last.failed}",
            "lower training.learning_rate: the sweep tries rates around it",
        )
    return [entrant for entrant in ranked[:count] if not entrant.last.failed]


def _finished(path: Path, number: int) -> Rung:
    facts = tuning.read_facts(path)
    best = next((p for p in facts.curve if p.step == facts.best_step), None)
    return Rung(
        rung=number,
        steps=facts.steps,
        validation_loss=facts.validation_loss,
        validation_mistakes=best.validation_mistakes if best else None,
        seconds=facts.seconds,
    )


def _named(trial: Trial) -> str:
    rank = f" with rank {trial.rank}" if trial.rank else ""
    return f"learning rate {trial.learning_rate:g}{rank}"
