"""A run: make the arms, judge them on validation, open the sealed test part once, decide.

Every step is a stage of the run directory, named by the hash of what went into it: a run that was
interrupted goes on after its last finished stage, and a changed setting redoes what depends on it.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from metier import runs
from metier.config import Config
from metier.data.ledger import Opening, open_test
from metier.errors import ConfigError, RunError
from metier.evaluation import advice, forgetting, runner
from metier.evaluation.comparison import Measured
from metier.evaluation.report import write_report
from metier.evaluation.schema import ArmDetails, DataSummary, Forgotten, SeedResult, Verdict
from metier.evaluation.verdict import decide
from metier.graders import summarise
from metier.model.load import load_base
from metier.model.memory import PeakMemory
from metier.progress import Progress
from metier.recipes import making, planning, tuning
from metier.recipes.keys import Inputs, Keys
from metier.recipes.workbench import Workbench, open_workbench, read_task, save
from metier.records import Example
from metier.runs import Run, fingerprint
from metier.task import SIMPLER_METHODS, TUNINGS, Arm, Task
from metier.training import rehearsal

C = TypeVar("C", bound=Config)


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
    progress.stage("read and split the data")
    bench = open_workbench(task, task_file.parent)
    directory = Run(out)
    experiment = Experiment(bench, directory, progress)
    estimate = planning.plan(bench, progress, experiment.made())
    budget = task.budget if budget is None else budget
    planning.hold(estimate, budget)
    with directory:
        candidates = experiment.make_all()
        opening = experiment.open_test(candidates)
        for candidate in candidates:
            experiment.test(candidate)
        verdict, details = experiment.decide(candidates, opening)
        seconds = experiment.seconds(candidates)
        verdict = verdict.model_copy(
            update={
                "notes": (*verdict.notes, *advice.over_budget(seconds, budget)),
                "command": " ".join(["metier", *sys.argv[1:]]),
                "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "seconds": seconds,
                "versions": runs.versions(),
            }
        )
        experiment.publish(verdict, details, candidates)
    return verdict


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
    (arm,) = task.chosen_arms()
    bases = task.bases()
    if len(bases) > 1:
        raise ConfigError(
            "base",
            f"names {len(bases)} bases, but one arm over one base is trained",
            f"choose one of {', '.join(bases)}, e.g. --set base={bases[0]}",
        )
    if not arm.tuned:
        raise ConfigError(f"arm '{arm.name}'", "is not trained", f"use {', '.join(TUNINGS)}")
    planning.check_machine(task)
    bench = open_workbench(task, task_file.parent)
    estimate = planning.plan_training(bench, progress)
    planning.hold(estimate, task.budget if budget is None else budget)
    with Run(out) as directory:
        return Experiment(bench, directory, progress).make(arm, task.training.seeds[0])


class Experiment:
    """The stages of one run over a workbench."""

    def __init__(self, bench: Workbench, directory: Run, progress: Progress) -> None:
        self._bench, self._run, self._progress = bench, directory, progress
        self._keys = Keys(bench)

    def made(self) -> set[str]:
        """Names of the arms that an earlier start has made."""
        if not self._run.path.exists():
            return set()
        return {
            arm.name
            for arm in all_arms(self._bench)
            if all(
                self._run.stage_path(*self._stage(arm, seed)).exists() for seed in self._seeds(arm)
            )
        }

    def make_all(self) -> list[Candidate]:
        """Make every arm and grade it on validation."""
        candidates = [Candidate(arm) for arm in all_arms(self._bench)]
        for candidate in candidates:
            arm = candidate.arm
            candidate.directories = [self.make(arm, seed) for seed in self._seeds(arm)]
            candidate.validation = [
                runner.load_graded(
                    self._answers(candidate.arm, directory, "validation"),
                    self._bench.parts.validation,
                )
                for directory in candidate.directories
            ]
        return candidates

    def open_test(self, candidates: list[Candidate]) -> Opening:
        """Record the opening of the sealed part; a run that goes on does not count twice."""
        parts = self._bench.parts

        def make(path: Path) -> None:
            opening = open_test(
                self._bench.base_dir,
                self._bench.task.name,
                parts.test_fingerprint,
                parts.test_rows,
                "metier run",
            )
            (path / "opening.json").write_text(opening.model_dump_json())

        answers = [
            self._keys.answers(one.arm, path, parts.test)
            for one in candidates
            for path in one.directories
        ]
        path = self._run.stage("opening", self._keys.opening(answers), make)
        return Opening.model_validate_json((path / "opening.json").read_text())

    def test(self, candidate: Candidate) -> None:
        """Grade an arm on the test part, and measure what else a verdict wants."""
        arm, directories = candidate.arm, candidate.directories
        answers = [self._answers(arm, path, "test") for path in directories]
        candidate.test = [runner.load_graded(path, self._bench.parts.test) for path in answers]
        about = json.loads((self._measurements(arm, directories[0]) / "cost.json").read_text())
        candidate.latency = runner.Latency(**about["latency"])
        candidate.peak_memory = about["peak_memory"]
        candidate.notes = tuple(json.loads((answers[0] / "notes.json").read_text()))
        if arm.may_forget:
            candidate.forgetting = self._forgetting(arm, directories)

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
            "data": self._data().name,
            "arms": {
                c.arm.name: {
                    "arm": c.arm.model_dump(),
                    "directory": c.directories[self._best_seed(c)].name,
                }
                for c in candidates
            },
        }
        runs.write_atomic(out / "arms.json", json.dumps(index, indent=1))
        runs.write_atomic(out / "details.json", _json([d.model_dump(mode="json") for d in details]))
        write_report(verdict, details, out / "report.html")
        runs.write_atomic(out / "verdict.json", verdict.model_dump_json(indent=1))

    def _best_seed(self, candidate: Candidate) -> int:
        """The seed with the best validation score; test scores choose nothing."""
        means = [_mean(graded) for graded in candidate.validation]
        return means.index(max(means))

    def _data(self) -> Path:
        """What a specialist needs later of the task and its data."""
        return self._run.stage("data", self._keys.data(), lambda path: save(self._bench, path))

    def _seeds(self, arm: Arm) -> tuple[int, ...]:
        return self._bench.task.training.seeds if arm.tuned else (0,)

    def _stage(self, arm: Arm, seed: int) -> tuple[str, Inputs]:
        """Name and inputs of the stage that makes an arm."""
        name = f"arm-{slug(arm)}-seed{seed}" if arm.tuned else f"arm-{slug(arm)}"
        return name, self._keys.making(arm, seed)

    def make(self, arm: Arm, seed: int) -> Path:
        """Make an arm, or find it made; the seed counts for a tuned one."""
        bench, progress, stage = self._bench, self._progress, self._stage(arm, seed)
        if arm.tuned:
            return self._resumable(*stage, partial(self._tune, arm, seed, self._rehearsal(arm)))
        if arm.method == "classical":
            progress.stage("fit classical")
            return self._run.stage(*stage, lambda p: making.fit_classical(bench, p))
        return self._run.stage(*stage, lambda p: making.choose_phrasing(bench, arm, p, progress))

    def _tune(self, arm: Arm, seed: int, written: Path | None, path: Path, scratch: Path) -> None:
        rehearsed = rehearsal.Rehearsal.load(written) if written else None
        tuning.tune(self._bench, arm, seed, rehearsed, self._progress, path, scratch)

    def _rehearsal(self, arm: Arm) -> Path | None:
        """What the base wrote of its own, for an arm that should not forget it."""
        if not (self._bench.task.training.rehearsal and arm.may_forget):
            return None

        def make(path: Path) -> None:
            base = load_base(arm.base or self._bench.task.bases()[0])
            rehearsal.write(base, self._progress).save(path)

        return self._run.stage("rehearsal", self._keys.rehearsal(arm), make)

    def _resumable(self, name: str, inputs: Inputs, make: Callable[[Path, Path], None]) -> Path:
        """A stage whose `make` is also given a directory that outlives an interruption."""
        scratch = self._run.path / "unfinished" / f"{name}-{fingerprint(inputs)[:12]}"
        path = self._run.stage(name, inputs, lambda target: make(target, scratch))
        shutil.rmtree(scratch, ignore_errors=True)
        return path

    def _answers(self, arm: Arm, directory: Path, part: str) -> Path:
        """The stage with an arm's graded answers to a part, and what must be known of them."""
        bench = self._bench
        examples: tuple[Example, ...] = getattr(bench.parts, part)

        def make(path: Path, scratch: Path) -> None:
            seed = f", {directory.name.split('-')[-2]}" if arm.tuned else ""
            self._progress.stage(f"{part}: {arm.name}{seed}", len(examples))
            built = making.build(bench, arm, directory)
            if arm.tuned and built.engine:  # the limit may have been lowered since the training
                making.check_answers(bench, built.engine)
            done = runner.unfinished(scratch, examples)
            built.count([item.example.prompt for item in done])
            graded = runner.evaluate(
                built.generator, examples, bench.grader, self._progress, scratch, done
            )
            runner.save_graded(path, graded)
            (path / "notes.json").write_text(_json(built.notes()))

        inputs = self._keys.answers(arm, directory, examples)
        return self._resumable(f"{part}-{slug(arm)}", inputs, make)

    def _measurements(self, arm: Arm, directory: Path) -> Path:
        """Latency and memory of an arm, measured on validation requests."""
        bench = self._bench
        chats = [row.prompt for row in bench.parts.validation]

        def make(path: Path) -> None:
            self._progress.stage(f"latency: {arm.name}")
            with PeakMemory() as memory:
                built = making.build(bench, arm, directory)
                latency = runner.measure_latency(built.generator, chats)
            about = {"latency": asdict(latency), "peak_memory": memory.peak}
            (path / "cost.json").write_text(json.dumps(about))

        return self._run.stage(f"latency-{slug(arm)}", self._keys.cost(arm, directory), make)

    def _forgetting(self, arm: Arm, directories: list[Path]) -> tuple[Forgotten, ...]:
        settings = self._bench.task.forgetting
        before = self._ability(arm, None)
        after = [self._ability(arm, path) for path in directories]
        return forgetting.compare(before, after, settings)

    def _ability(self, arm: Arm, directory: Path | None) -> tuple[forgetting.Ability, ...]:
        material = self._bench.material

        def make(path: Path) -> None:
            self._progress.stage(f"what {arm.name if directory else 'the base'} knows")
            engine = making.load_engine(self._bench, arm, directory)
            found = forgetting.measure(
                engine.logprobs,
                engine.renderer.tokenizer,
                making.common_context(self._bench, engine),
                material,
            )
            (path / "ability.json").write_text(_json([a.model_dump(mode="json") for a in found]))

        name = f"ability-{slug(arm)}" if directory else "ability-base"
        path = self._run.stage(name, self._keys.ability(arm, directory), make)
        values = json.loads((path / "ability.json").read_text())
        return tuple(forgetting.Ability.parse(value, str(path)) for value in values)

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
            metrics=summarise(self._bench.task.kind, self._bench.grader, pairs, self._bench.labels),
            seeds=tuple(_seed(f, graded) for f, graded in zip(facts, candidate.test, strict=True))
            if facts
            else (),
            training_seconds=float(np.mean([f.seconds for f in facts])) if facts else 0.0,
            peak_memory=max([candidate.peak_memory, *(f.peak_memory for f in facts)]),
            token_prices=(remote.input_price, remote.output_price) if remote else None,
            forgetting=candidate.forgetting,
            notes=(*candidate.notes, *tuning.notes(facts)),
        )

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
        labels = self._bench.labels
        return ArmDetails(
            arm=candidate.arm.name,
            won=won,
            lost=lost,
            labels=labels,
            confusion=runner.confusion(labels, best) if labels else (),
            curves=tuple(fact.curve for fact in self._facts(candidate)),
        )


def all_arms(bench: Workbench) -> list[Arm]:
    """The arms of a task; those over a base once for each base."""
    bases = bench.task.bases()
    found = []
    for arm in bench.task.chosen_arms():
        if len(bases) == 1 or arm.method in ("classical", "remote"):
            found.append(arm)
        else:
            found += [arm.model_copy(update={"base": base}) for base in bases]
    return found


def slug(arm: Arm) -> str:
    """The arm's name as part of a directory's name."""
    base = f"@{fingerprint(arm.base)[:6]}" if arm.base else ""
    mode = "" if arm.mode == "text" else f"-{arm.mode}"
    return f"{arm.method.replace('+', '-')}{mode}{base}"


def read_verdict(run_directory: Path) -> Verdict:
    """Read the verdict of a finished run.

    Raises:
        RunError: there is none.

    """
    return read_file(Verdict, run_directory / "verdict.json", "run 'metier run' to its end first")


def read_file(kind: type[C], path: Path, remedy: str) -> C:
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


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1)
