"""The stages of a run: what each depends on, and how it is made.

A stage is a directory of the run, named by the hash of what went into it: what an interrupted run
has finished is found there, and a changed setting makes anew what depends on it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from metier import runs
from metier.data.ledger import Opening, open_test
from metier.evaluation import forgetting, runner
from metier.model.load import load_base
from metier.model.memory import PeakMemory
from metier.model.world import World, joined
from metier.progress import Progress, Silent
from metier.recipes import encoder_decoder, making, tuning
from metier.recipes.keys import Inputs, Keys
from metier.recipes.workbench import Workbench, save
from metier.records import Example
from metier.runs import Run, fingerprint
from metier.task import Arm
from metier.training import rehearsal
from metier.training.loop import State


@contextlib.contextmanager
def held(directory: Run) -> Iterator[World]:
    """Hold a run directory before any work; of several processes the first one does."""
    with joined() as world, directory if world.first else contextlib.nullcontext():
        yield world


class Stages:
    """The stages of one run over a workbench.

    Where torchrun has started several processes, the first of them runs the stages, and the others
    `help` it to train.
    """

    def __init__(
        self, bench: Workbench, directory: Run, progress: Progress, world: World | None = None
    ) -> None:
        self._bench, self._run, self._world = bench, directory, world or World()
        self._progress = progress if self._world.first else Silent()
        self._keys = Keys(bench)

    def made(self) -> set[str]:
        """Names of the arms that an earlier start has made."""
        if not self._run.path.exists():
            return set()
        return {
            arm.name
            for arm in all_arms(self._bench)
            if all(self.place(arm, seed).exists() for seed in self.seeds(arm))
        }

    def data(self) -> Path:
        """What a specialist needs later of the task and its data."""
        return self._run.stage("data", self._keys.data(), lambda path: save(self._bench, path))

    def seeds(self, arm: Arm) -> tuple[int, ...]:
        """One for each time an arm is made."""
        return self._bench.task.training.seeds if arm.tuned else (0,)

    def _stage(self, arm: Arm, seed: int) -> tuple[str, Inputs]:
        """Name and inputs of the stage that makes an arm."""
        name = f"arm-{slug(arm)}-seed{seed}" if arm.tuned else f"arm-{slug(arm)}"
        return name, self._keys.making(arm, seed)

    def place(self, arm: Arm, seed: int) -> Path:
        """Where an arm lies once it is made."""
        return self._run.stage_path(*self._stage(arm, seed))

    def make(self, arm: Arm, seed: int) -> Path:
        """Make an arm, or find it made; the seed counts for a tuned one."""
        bench, progress, stage = self._bench, self._progress, self._stage(arm, seed)
        if arm.tuned:
            return self._resumable(*stage, partial(self._tune, arm, seed, self.rehearsal(arm)))
        if arm.method == "classical":
            progress.stage("fit classical")
            return self._run.stage(*stage, lambda p: making.fit_classical(bench, p))
        return self._run.stage(*stage, lambda p: making.choose_phrasing(bench, arm, p, progress))

    def begin(self, arm: Arm, seed: int, part: float) -> State:
        """Train an arm for a part of its steps; `make` goes on from there."""
        scratch = self.unfinished(arm, seed)
        written = self.rehearsal(arm)
        return self._train(arm, seed, written, scratch, scratch, part)

    def unfinished(self, arm: Arm, seed: int) -> Path:
        """Where checkpoints of a training lie until it is finished."""
        return self._run.path / "unfinished" / self.place(arm, seed).name

    def _tune(self, arm: Arm, seed: int, written: Path | None, path: Path, scratch: Path) -> None:
        self._world.agree(json.dumps([arm.model_dump(), seed, *map(str, (written or "", scratch))]))
        self._train(arm, seed, written, path, scratch)

    def help(self) -> None:
        """Share every training of the first process, until it dismisses the others."""
        while said := self._world.agree():
            arm, seed, written, scratch = json.loads(said)
            rehearsed = Path(written) if written else None
            self._train(Arm(**arm), seed, rehearsed, Path(scratch), Path(scratch))

    def dismiss(self) -> None:
        """Let the other processes go."""
        self._world.agree()

    def _train(
        self, arm: Arm, seed: int, written: Path | None, path: Path, scratch: Path, part: float = 1
    ) -> State:
        rehearsed = rehearsal.Rehearsal.load(written) if written else None
        return tuning.tune(
            self._bench, arm, seed, rehearsed, self._progress, path, scratch, self._world, part
        )

    def rehearsal(self, arm: Arm) -> Path | None:
        """What the base wrote of its own, for an arm that should not forget it."""
        may_forget = encoder_decoder.may_forget(self._bench, arm)
        if not (self._bench.task.training.rehearsal and may_forget):
            return None

        def make(path: Path) -> None:
            base = load_base(arm.base or self._bench.task.bases()[0])
            rehearsal.write(base, self._progress).save(path)

        return self._run.stage("rehearsal", self._keys.rehearsal(arm), make)

    def _resumable(self, name: str, inputs: Inputs, make: Callable[[Path, Path], None]) -> Path:
        """A stage whose `make` is also given a directory that outlives an interruption."""
        scratch = self._run.path / "unfinished" / self._run.stage_path(name, inputs).name
        path = self._run.stage(
            name, inputs, lambda target: make(target, runs.begun(scratch, self._progress))
        )
        shutil.rmtree(scratch, ignore_errors=True)
        return path

    def opening(self, answered: Iterable[tuple[Arm, Path]]) -> Opening:
        """The opening of the sealed part for some arms; a run that goes on counts it once."""
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

        answers = [self._keys.answers(arm, path, parts.test) for arm, path in answered]
        path = self._run.stage("opening", self._keys.opening(answers), make)
        return Opening.model_validate_json((path / "opening.json").read_text())

    def answers(self, arm: Arm, directory: Path, part: str) -> Path:
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
            (path / "notes.json").write_text(to_json(built.notes()))

        inputs = self._keys.answers(arm, directory, examples)
        return self._resumable(f"{part}-{slug(arm)}", inputs, make)

    def measurements(self, arm: Arm, directory: Path) -> Path:
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

    def ability(self, arm: Arm, directory: Path | None) -> tuple[forgetting.Ability, ...]:
        """What an arm that was made into a directory can do in general, or its base."""
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
            (path / "ability.json").write_text(to_json([a.model_dump(mode="json") for a in found]))

        name = f"ability-{slug(arm)}" if directory else "ability-base"
        path = self._run.stage(name, self._keys.ability(arm, directory), make)
        values = json.loads((path / "ability.json").read_text())
        return tuple(forgetting.Ability.parse(value, str(path)) for value in values)


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


def to_json(value: Any) -> str:
    """JSON that people can read."""
    return json.dumps(value, ensure_ascii=False, indent=1)
