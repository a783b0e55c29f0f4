"""A run: make the arms, judge them on validation, open the sealed test part once, decide.

Every step is a stage of the run directory, named by the hash of what went into it: a run that was
interrupted goes on after its last finished stage, and a changed setting redoes what depends on it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from metier import runs
from metier.data.ledger import Opening
from metier.errors import ConfigError
from metier.evaluation import advice, forgetting, runner
from metier.evaluation.comparison import Measured
from metier.evaluation.report import write_report
from metier.evaluation.schema import (
    ArmDetails,
    DataSummary,
    Forgotten,
    SeedResult,
    Verdict,
)
from metier.evaluation.verdict import decide
from metier.graders import summarise
from metier.model.world import World
from metier.progress import Progress
from metier.recipes import encoder_decoder, making, planning, tuning
from metier.recipes.finished import read_verdict
from metier.recipes.stages import Stages, all_arms, held, to_json
from metier.recipes.workbench import Workbench, only_arm, open_workbench, read_task
from metier.runs import Run
from metier.task import SIMPLER_METHODS, Arm, Task


@dataclass
class Candidate:
    """An arm with the directories that it was made into, one for each seed.

    Attributes:
        arm: which arm.
        directories: one per seed; one for an arm that is not tuned.
        validation: graded answers, per directory.
        test: graded answers, per directory.
        latency: of one request alone.
        peak_memory: bytes of this process while it answered.
        notes: what a reader must know of its answers.
        forgetting: general abilities before and after.

    """

    arm: Arm
    directories: list[Path] = field(default_factory=list)
    validation: list[list[runner.Graded]] = field(default_factory=list)
    test: list[list[runner.Graded]] = field(default_factory=list)
    latency: runner.Latency = field(default_factory=runner.Latency)
    peak_memory: int = 0
    notes: tuple[str, ...] = ()
    forgetting: tuple[Forgotten, ...] = ()


def run(
    task_file: Path,
    out: Path,
    overrides: Iterable[str],
    budget: float | None,
    progress: Progress,
) -> Verdict:
    """Compare the arms of a task and decide. The arguments are those of `recipes.run`."""
    task = read_task(task_file, overrides)
    _check_reference(task)
    planning.check_machine(task)
    making.check_bases(task)
    minutes, directory = task.budget if budget is None else budget, Run(out)
    with held(directory) as world:
        progress.stage("read and split the data")
        bench = open_workbench(task, task_file.parent)
        stages = Stages(bench, directory, progress, world)

        def compare() -> None:
            planning.hold(planning.plan(bench, progress, stages.made()), minutes)
            Experiment(bench, directory, stages).compare(minutes)

        _with_helpers(stages, world, compare)
    return read_verdict(out)


def _check_reference(task: Task) -> None:
    """Refuse a comparison without a simpler arm before anything is trained or opened."""
    if not any(arm.method in SIMPLER_METHODS for arm in task.chosen_arms()):
        raise ConfigError(
            "arms", "hold no simpler arm to compare with", f"add {', '.join(SIMPLER_METHODS)}"
        )


def train_one(
    task_file: Path,
    out: Path,
    overrides: Iterable[str],
    budget: float | None,
    progress: Progress,
) -> Path:
    """Train the only arm of a task with its first seed. See `recipes.train`."""
    task = read_task(task_file, overrides)
    arm = only_arm(task)
    planning.check_machine(task)
    making.check_bases(task)
    minutes, seed = task.budget if budget is None else budget, task.training.seeds[0]
    directory = Run(out)
    with held(directory) as world:
        bench = open_workbench(task, task_file.parent)
        stages = Stages(bench, directory, progress, world)

        def make() -> None:
            planning.hold(planning.plan_training(bench, progress), minutes)
            stages.make(arm, seed)

        _with_helpers(stages, world, make)
    return stages.place(arm, seed)


def _with_helpers(stages: Stages, world: World, work: Callable[[], None]) -> None:
    """Do some work; other processes that torchrun has started only share its trainings."""
    if world.first:
        work()
        stages.dismiss()
    else:
        stages.help()


class Experiment:
    """One run over a workbench, stage by stage."""

    def __init__(self, bench: Workbench, directory: Run, stages: Stages) -> None:
        self._bench, self._run, self._stages = bench, directory, stages

    def compare(self, budget: float) -> None:
        """Make the arms, open the test part, decide and publish."""
        candidates = self.make_all()
        answered = [(one.arm, path) for one in candidates for path in one.directories]
        opening = self._stages.opening(answered)
        for candidate in candidates:
            self.test(candidate)
        verdict, details = self.decide(candidates, opening)
        seconds = self.seconds(candidates)
        verdict = verdict.model_copy(
            update={
                "notes": (*verdict.notes, *advice.over_budget(seconds, budget)),
                "command": " ".join(["metier", *sys.argv[1:]]),
                "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "seconds": seconds,
                "versions": runs.versions(),
            }
        )
        self.publish(verdict, details, candidates)

    def make_all(self) -> list[Candidate]:
        """Make every arm and grade it on validation."""
        candidates = [Candidate(arm) for arm in all_arms(self._bench)]
        for candidate in candidates:
            arm, stages = candidate.arm, self._stages
            candidate.directories = [stages.make(arm, seed) for seed in stages.seeds(arm)]
            candidate.validation = [
                runner.load_graded(
                    stages.answers(arm, directory, "validation"), self._bench.parts.validation
                )
                for directory in candidate.directories
            ]
        return candidates

    def test(self, candidate: Candidate) -> None:
        """Grade an arm on the test part, and measure what else a verdict wants."""
        arm, directories, stages = candidate.arm, candidate.directories, self._stages
        answers = [stages.answers(arm, path, "test") for path in directories]
        candidate.test = [runner.load_graded(path, self._bench.parts.test) for path in answers]
        about = json.loads((stages.measurements(arm, directories[0]) / "cost.json").read_text())
        candidate.latency = runner.Latency(**about["latency"])
        candidate.peak_memory = about["peak_memory"]
        candidate.notes = tuple(json.loads((answers[0] / "notes.json").read_text()))
        if encoder_decoder.may_forget(self._bench, arm):
            before = stages.ability(arm, None)
            after = [stages.ability(arm, path) for path in directories]
            candidate.forgetting = forgetting.compare(before, after, self._bench.task.forgetting)
        elif arm.may_forget:
            candidate.notes += (encoder_decoder.UNMEASURED,)

    def decide(
        self, candidates: list[Candidate], opening: Opening
    ) -> tuple[Verdict, list[ArmDetails]]:
        """The verdict and what the report draws."""
        bench = self._bench
        parts = bench.parts
        verdict = decide(
            bench.task,
            [self._measured(candidate) for candidate in candidates],
            clusters=[parts.clusters[row.id] for row in parts.test],
            expected=[row.answer for row in parts.test],
            labels=bench.labels,
            data=DataSummary(
                train=len(parts.train),
                validation=len(parts.validation),
                test=len(parts.test),
                test_clusters=len({parts.clusters[row.id] for row in parts.test}),
                removed=parts.removed | bench.removed_passages,
                test_openings=opening.openings,
                test_rows_seen=opening.rows_seen,
                warnings=parts.warnings,
            ),
        )
        reference = next(c for c in candidates if c.arm.name == verdict.reference)
        return verdict, [self._details(c, reference) for c in candidates]

    def seconds(self, candidates: list[Candidate]) -> float:
        """What making all stages took; a training that was interrupted counts as a whole."""
        trained = {
            path.name: facts.seconds
            for candidate in candidates
            for path, facts in zip(candidate.directories, self._facts(candidate), strict=False)
        }
        return sum(
            max(seconds, trained.get(name, 0.0)) for name, seconds in self._run.seconds.items()
        )

    def publish(
        self, verdict: Verdict, details: list[ArmDetails], candidates: list[Candidate]
    ) -> None:
        """Write verdict, report and the index of arms that `specialist` reads.

        Readers begin with the verdict: it goes first and comes last, so that none ever stands
        beside the files of another.
        """
        out = self._run.path
        (out / "verdict.json").unlink(missing_ok=True)
        index = {
            "data": self._stages.data().name,
            "arms": {
                c.arm.name: {
                    "arm": c.arm.model_dump(),
                    "directory": c.directories[self._best_seed(c)].name,
                }
                for c in candidates
            },
        }
        runs.write_atomic(out / "arms.json", json.dumps(index, indent=1))
        shown = [one.model_dump(mode="json") for one in details]
        runs.write_atomic(out / "details.json", to_json(shown))
        write_report(verdict, details, out / "report.html")
        runs.write_atomic(out / "verdict.json", verdict.model_dump_json(indent=1))

    def _best_seed(self, candidate: Candidate) -> int:
        """The seed with the best validation score; test scores choose nothing."""
        means = [_mean(graded) for graded in candidate.validation]
        return means.index(max(means))

    def _measured(self, candidate: Candidate) -> Measured:
        facts = self._facts(candidate)
        answers = [item for graded in candidate.test for item in graded]
        # Ties between arms are broken by tokens: counted on validation, as every choice.
        counted = [item.completion for graded in candidate.validation for item in graded]
        pairs = [(item.completion.text, item.example, item.score) for item in answers]
        remote = self._bench.task.remote if candidate.arm.method == "remote" else None
        return Measured(
            arm=candidate.arm,
            scores=_scores(candidate.test),
            validation=_scores(candidate.validation),
            latency_mean=candidate.latency.mean,
            latency_p50=candidate.latency.p50,
            latency_p95=candidate.latency.p95,
            latency_requests=candidate.latency.requests,
            prompt_tokens=float(np.mean([one.prompt_tokens for one in counted])),
            completion_tokens=float(np.mean([one.completion_tokens for one in counted])),
            metrics=summarise(self._bench.task.kind, self._bench.grader, pairs, self._bench.labels)
            | self._calibration(candidate),
            seeds=tuple(_seed(f, graded) for f, graded in zip(facts, candidate.test, strict=True))
            if facts
            else (),
            training_seconds=float(np.mean([f.seconds for f in facts])) if facts else 0.0,
            peak_memory=max([candidate.peak_memory, *(f.peak_memory for f in facts)]),
            token_prices=(remote.input_price, remote.output_price) if remote else None,
            forgetting=candidate.forgetting,
            notes=(*candidate.notes, *tuning.notes(facts)),
        )

    def _calibration(self, candidate: Candidate) -> dict[str, float]:
        """Means over the trainings of an arm: each gives probabilities of its own."""
        kind, labels = self._bench.task.kind, self._bench.labels
        found = [runner.calibration(kind, labels, graded) for graded in candidate.test]
        return {name: float(np.mean([one[name] for one in found])) for name in found[0]}

    def _facts(self, candidate: Candidate) -> list[tuning.Facts]:
        return (
            [tuning.read_facts(path) for path in candidate.directories]
            if candidate.arm.tuned
            else []
        )

    def _details(self, candidate: Candidate, reference: Candidate) -> ArmDetails:
        best = candidate.test[self._best_seed(candidate)]
        won, lost = (
            ((), ()) if candidate is reference else runner.won_and_lost(best, reference.test[0])
        )
        # Which label stands for which other is only known where there is one.
        labels = self._bench.labels if self._bench.task.kind == "classification" else ()
        return ArmDetails(
            arm=candidate.arm.name,
            won=won,
            lost=lost,
            labels=labels,
            confusion=runner.confusion(labels, best) if labels else (),
            curves=tuple(fact.curve for fact in self._facts(candidate)),
        )


def _mean(graded: list[runner.Graded]) -> float:
    return float(np.mean([item.score.value for item in graded]))


def _scores(graded: list[list[runner.Graded]]) -> Any:
    return np.array([[item.score.value for item in one] for one in graded])


def _seed(facts: tuning.Facts, graded: list[runner.Graded]) -> SeedResult:
    return SeedResult(
        seed=facts.seed,
        test_score=_mean(graded),
        validation_loss=facts.validation_loss,
        steps=facts.steps,
        seconds=facts.seconds,
    )
