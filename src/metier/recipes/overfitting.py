"""Can an arm learn at all? Train it on a few rows alone until it writes their answers exactly.

A model that can be trained learns a few rows by heart in some hundred steps. One that does not is
broken somewhere between the rows and the optimiser, and no amount of data mends that (Karpathy
2019, "A Recipe for Training Neural Networks": overfit a single batch). Nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metier.config import Config
from metier.errors import DivergedError
from metier.model.backbone import inner
from metier.model.calibration import Calibration
from metier.model.encoder import is_encoder
from metier.model.head import HeadGenerator
from metier.model.tagger import TagGenerator
from metier.model.world import World
from metier.progress import Progress
from metier.recipes import making, planning, tuning
from metier.recipes.workbench import Workbench, only_arm, open_workbench, read_task
from metier.records import Example, Generator
from metier.runs import fingerprint
from metier.task import Arm
from metier.text.template import Renderer
from metier.training import classify, sft, tagging
from metier.training.batches import Batch, Row, cut
from metier.training.loop import Loop, Plan
from metier.training.optimizers import adamw
from metier.training.scoring import Scorer

STEPS = 300
"""Steps in which the rows must be learned; each sees all of them."""
_EVERY, _WARMUP = 10, 10
_SHOWN = 3
# A loss that falls by less than a tenth has not fallen.
_FALLEN = 0.9


class Missed(Config):
    """An answer that was not written as it was taught."""

    row: str
    """Its place in the data."""
    taught: str
    written: str
    finished: bool
    """Whether it ended by itself."""


class Overfit(Config):
    """What came of training an arm on a few rows alone."""

    arm: str
    passed: bool
    rows: int
    written: int
    """Answers that were written exactly."""
    steps: int
    learning_rate: float
    first_loss: float
    """Mean over the trained tokens before the first step; of a head, over the rows."""
    last_loss: float
    missed: tuple[Missed, ...] = ()
    """The first of the other answers."""
    causes: tuple[str, ...] = ()
    """What may be wrong."""


@dataclass(frozen=True)
class _Lesson:
    """A model and the rows that it is to learn by heart.

    Attributes:
        model: as it is trained.
        loss: summed over a batch.
        judge: of a batch.
        rows: what is trained on.
        examples: behind the rows.
        answers: asks the model as it is.
        renderer: of the rows.
        rate: peak learning rate.
        head_rate: that of a head alone, where it has one of its own.

    """

    model: Any
    loss: Any
    judge: sft.Judge
    rows: Sequence[Row]
    examples: Sequence[Example]
    answers: Generator
    renderer: Renderer
    rate: float
    head_rate: float | None = None

    @property
    def parts(self) -> list[Batch]:
        """The rows in micro-batches."""
        return cut(self.rows, sft.MICRO_TOKENS)

    def missed(self) -> list[Missed]:
        """The answers that are not written as they were taught."""
        written = self.answers.generate([example.prompt for example in self.examples])
        return [
            Missed(row=row.place, taught=row.answer, written=one.text, finished=one.finished)
            for row, one in zip(self.examples, written, strict=True)
            if one.text != row.answer.strip() or not one.finished
        ]

    def loop(self, progress: Progress) -> Loop[Batch]:
        """All rows in every step, at a constant rate after a short rise."""
        return Loop(
            self.model,
            self.loss,
            _Same(self.parts),
            [adamw(self.model, self.rate, 0.0, self.head_rate)],
            Plan(STEPS, lambda step: min(1.0, (step + 1) / _WARMUP)),
            evaluate=sft.evaluation(self.parts, self.judge, World()),
            progress=progress,
        )


@dataclass(frozen=True)
class _Same:
    """The same batches in every step."""

    parts: Sequence[Batch]

    def step(self, _: int) -> Sequence[Batch]:
        return self.parts


def overfit(task_file: Path, rows: int, overrides: Iterable[str], progress: Progress) -> Overfit:
    """Train the only arm of a task on a few rows. See `recipes.overfit`."""
    task = read_task(task_file, overrides)
    arm = only_arm(task)
    planning.check_machine(task)
    bench = _with_few(open_workbench(task, task_file.parent), rows)
    progress.stage(f"learn {rows} rows by heart with {arm.name}", STEPS)
    return _learned(arm, _lesson(bench, arm, progress), progress)


def _with_few(bench: Workbench, rows: int) -> Workbench:
    """The same with the first training rows alone; no two of them ask the same."""
    asked: dict[str, Example] = {}
    for row in bench.parts.train:
        asked.setdefault(fingerprint(row.prompt), row)
    few = tuple(asked.values())[:rows]
    return replace(bench, parts=replace(bench.parts, train=few, validation=few, test=()))


def _lesson(bench: Workbench, arm: Arm, progress: Progress) -> _Lesson:
    """Rows, model and loss as they are in a training, but for what goes against learning by heart.

    That is rehearsal and weight decay.
    """
    training, way = bench.task.training, arm.tuning
    assert way is not None  # noqa: S101  the arm is a tuned one
    base, tuned = making.load_trainable(bench, arm, training.seeds[0])
    engine = making.make_engine(bench, base, tuned)
    prepared, _ = making.prepare(bench, arm, engine)
    progress.say(f"{arm.name} is trained on the text between ⟦ and ⟧:\n{prepared.sample}")
    rate = training.learning_rate or sft.default_learning_rate(tuned, way)
    model, rows = tuning.with_head(bench, arm, tuned), prepared.rows
    encoder = arm.headed and is_encoder(inner(tuned).config)
    head_rate = sft.encoder_head_rate(tuned) if encoder else None
    answers: Generator = engine
    if arm.mode == "head":
        rows = classify.label_rows(rows, prepared.examples, bench.labels, bench.task.kind)
        if bench.task.kind == "multi-label":
            model.calibration = Calibration(threshold=0.5)
        answers, loss = HeadGenerator(model, engine.renderer), classify.head_loss(model)
        judge = sft.unjudged(loss)
    elif arm.mode == "tags":
        answers = TagGenerator(model, engine.renderer)
        loss, judge = tagging.tag_loss(model), tagging.tag_judge(model)
    else:
        score = Scorer(tuned)
        loss, judge = sft.answer_loss(score), sft.answer_judge(score)
    reader = engine.renderer
    return _Lesson(model, loss, judge, rows, prepared.examples, answers, reader, rate, head_rate)


def _learned(arm: Arm, lesson: _Lesson, progress: Progress) -> Overfit:
    """Train until all answers are written, and say what came of it."""
    if not any(parameter.requires_grad for parameter in lesson.model.parameters()):
        nothing = "nothing is trained: no parameter of the model wants a gradient"
        seen = [sft.evaluation(lesson.parts, lesson.judge, World())()]
        return _result(arm, lesson, 0, seen, lesson.missed(), [nothing])
    loop, missed = lesson.loop(progress), list[Missed]()
    seen = [loop.figures()]
    try:
        for until in range(_EVERY, STEPS + 1, _EVERY):
            loop.run(until)
            seen.append(loop.figures())
            # Asking takes longer than looking.
            if not seen[-1].get("validation_mistakes") or until == STEPS:
                missed = lesson.missed()
                if not missed:
                    break
    except DivergedError as error:
        causes = [f"the learning rate is too high ({error.place}: {error.cause})"]
        missed = lesson.missed()
    else:
        causes = list(_causes(lesson, seen, missed)) if missed else []
    return _result(arm, lesson, loop.state.step, seen, missed, causes)


def _result(
    arm: Arm,
    lesson: _Lesson,
    steps: int,
    seen: Sequence[Mapping[str, float]],
    missed: Sequence[Missed],
    causes: Sequence[str],
) -> Overfit:
    return Overfit(
        arm=arm.name,
        passed=not causes,
        rows=len(lesson.rows),
        written=len(lesson.rows) - len(missed),
        steps=steps,
        learning_rate=lesson.rate,
        first_loss=seen[0]["loss"],
        last_loss=seen[-1]["loss"],
        missed=tuple(missed[:_SHOWN]),
        causes=tuple(causes),
    )


def _causes(
    lesson: _Lesson, seen: Sequence[Mapping[str, float]], missed: Sequence[Missed]
) -> Iterator[str]:
    """What may be wrong where some answers are missed, the surest first."""
    yield from _of_mask(lesson)
    losses = [figures["loss"] for figures in seen]
    if not max(losses) * _FALLEN < losses[0]:
        yield (
            f"the learning rate may be too high: the loss rose from {losses[0]:.3f} to "
            f"{max(losses):.3f}"
        )
    elif not losses[-1] < losses[0] * _FALLEN:
        yield (
            "the learning rate may be too low, or its gradient reaches too little of the model: "
            f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}"
        )
    elif endless := sum(one.written.startswith(one.taught) and not one.finished for one in missed):
        yield (
            f"{endless} answers are right but do not end: the stop token is not learned, as where "
            "the base cannot tell it from other tokens that it has never seen ('full' can teach it "
            "that), or it is not the one that is waited for"
        )
    elif mistakes := seen[-1].get("validation_mistakes"):
        yield (
            f"{mistakes:.1%} of the trained tokens would still be written wrong after {STEPS} "
            "steps: a higher rank or another learning rate may be needed"
        )
    elif mistakes == 0:
        yield (
            "every trained token is right behind the right ones, but not when the model is asked: "
            "the template or the mask differs between training and answering"
        )
    else:
        yield f"{STEPS} steps were not enough: another learning rate may be needed"


def _of_mask(lesson: _Lesson) -> Iterator[str]:
    """Whether what is trained is the answer; of a head, no token is."""
    for row, example in zip(lesson.rows, lesson.examples, strict=True):
        ids = [token for token, trained in zip(row.ids, row.trained, strict=True) if trained]
        text = lesson.renderer.tokenizer.decode(ids)
        headed = row.labelled or row.tags
        if not headed and example.answer.strip() not in text:
            yield (
                f"the mask: {example.place} is trained on {text!r}, not on its answer "
                f"{example.answer!r}"
            )
            return
