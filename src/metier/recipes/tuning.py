"""Tune one arm with one seed: render, look, train, write what `making.build` reads."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metier.evaluation.schema import CurvePoint
from metier.model.adapters import save_adapter
from metier.model.backbone import inner
from metier.model.device import compute_dtype
from metier.model.encoder import is_encoder
from metier.model.head import Classifier, save_head
from metier.model.load import Base
from metier.model.memory import PeakMemory
from metier.model.seq2seq import name_own_head
from metier.model.tagger import Tagger
from metier.model.world import World, gathered, shard
from metier.progress import Progress
from metier.recipes import making
from metier.recipes.workbench import Workbench
from metier.task import Arm, Training
from metier.training import classify, preflight, rehearsal, sft, tagging
from metier.training.batches import Row
from metier.training.loop import State
from metier.training.scoring import Scorer

_FACTS = "training.json"


@dataclasses.dataclass(frozen=True)
class Facts:
    """How one training went.

    Attributes:
        seed: its seed.
        steps: optimiser steps done.
        best_step: the step whose parameters were kept.
        validation_loss: at that step.
        seconds: of training, over every interruption.
        peak_memory: bytes of this process while training.
        curve: one point per pass over the data.
        sample: one training example as text, trained tokens marked.
        dropped: training and validation rows left out as too long.
        skipped: steps that changed nothing, as their gradient was not finite.

    """

    seed: int
    steps: int
    best_step: int
    validation_loss: float
    seconds: float
    peak_memory: int
    curve: tuple[CurvePoint, ...]
    sample: str
    dropped: dict[str, int]
    skipped: int = 0


def tune(
    bench: Workbench,
    arm: Arm,
    seed: int,
    rehearsed: rehearsal.Rehearsal | None,
    progress: Progress,
    directory: Path,
    scratch: Path,
    world: World | None = None,
    part: float = 1.0,
) -> State:
    """Train an arm; write adapter or model, head, wording, log and facts into `directory`.

    Args:
        bench: what it is made from.
        arm: a tuned arm.
        seed: of the adapter's start, the order and dropout.
        rehearsed: of the base, where it should not be forgotten.
        progress: is told every step.
        directory: receives the result, from the first process.
        scratch: keeps checkpoints; an interrupted training goes on from there.
        world: the processes that share the training; all call this.
        part: of its steps; where that is not all of them, the training is paused behind them, and
            nothing is written but checkpoints.

    Returns:
        where the training stands.

    Raises:
        DivergedError: training diverged.
        TrainingError: a row cannot be trained on.

    """
    world = world or World()
    in_parts = bench.task.training.shard and world.size > 1
    with PeakMemory() as memory:
        base, tuned = making.load_trainable(bench, arm, seed, "cpu" if in_parts else "auto")
        rows = making.prepare(bench, arm, making.make_engine(bench, base, tuned))
        _show(arm, rows, progress)
        if in_parts:
            shard(base.model, world)
        model = with_head(bench, arm, tuned)
        progress.stage(f"train {arm.name}, seed {seed}", _steps(bench, arm, rows[0]))
        settings = {"seed": seed, "world": world, "progress": progress, "part": part}
        state = _fit(bench, arm, model, rows, rehearsed, scratch, settings)
    if part < 1:
        return state
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    found = gathered(trained, world)
    if world.first:
        if in_parts:
            base, model = _whole(bench, arm, seed, model, found)
        _write(arm, base, model, directory)
        shutil.copyfile(scratch / "log.jsonl", directory / "log.jsonl")
        _write_facts(state, rows, seed, memory.peak, directory)
    return state


def _show(
    arm: Arm, rows: tuple[preflight.Prepared, preflight.Prepared], progress: Progress
) -> None:
    """What is trained on, and what was noticed of it."""
    progress.say(f"{arm.name} is trained on the text between ⟦ and ⟧:\n{rows[0].sample}")
    for note in dict.fromkeys((*rows[0].notes, *rows[1].notes)):
        progress.say(f"note: {note}")


def _whole(
    bench: Workbench, arm: Arm, seed: int, model: Any, found: Mapping[str, Any]
) -> tuple[Base, Any]:
    """The base and the model whole, with what was trained of it in parts."""
    base, tuned = making.load_trainable(bench, arm, seed, "cpu")
    whole = _again(model, tuned) if arm.headed else tuned
    whole.load_state_dict(found, strict=False)
    return base, whole


def read_facts(directory: Path) -> Facts:
    """Read how the training behind a directory went."""
    values: dict[str, Any] = json.loads((directory / _FACTS).read_text("utf-8"))
    values["curve"] = tuple(CurvePoint(**point) for point in values["curve"])
    return Facts(**values)


def notes(trainings: Sequence[Facts]) -> list[str]:
    """What a reader must know of the trainings of an arm, one for each seed; none: nothing."""
    dropped = trainings[0].dropped if trainings else {}
    found = [f"{count} {rows} were left out as too long" for rows, count in dropped.items()]
    skipped = sum(facts.skipped for facts in trainings)
    if skipped:
        steps = sum(facts.steps for facts in trainings)
        found.append(
            f"{skipped:,} of {steps:,} training steps changed nothing, as their gradient was not a "
            "finite number: where they are many, lower training.learning_rate"
        )
    return found


def with_head(bench: Workbench, arm: Arm, tuned: Any) -> Any:
    """The model that is trained, with the head of its arm if that has one."""
    if arm.mode == "tags":
        return Tagger(tuned, tagging.labels_of(bench.parts.train))
    return Classifier(tuned, bench.labels) if arm.mode == "head" else tuned


def _steps(bench: Workbench, arm: Arm, rows: preflight.Prepared) -> int:
    training = bench.task.training
    passes = training.epochs + making.reading_passes(bench, arm)
    return sft.row_batches(rows.rows, training, seed=0).steps_per_epoch * passes


def _fit(
    bench: Workbench,
    arm: Arm,
    model: Any,
    rows: tuple[preflight.Prepared, preflight.Prepared],
    rehearsed: rehearsal.Rehearsal | None,
    scratch: Path,
    settings: dict[str, Any],
) -> State:
    training, tuning = bench.task.training, arm.tuning
    assert tuning is not None  # noqa: S101  the arm is a tuned one
    if not tuning.decays:
        training = training.model_copy(update={"weight_decay": 0.0})
    tuned = model.model if arm.headed else model
    rate = sft.default_learning_rate(tuned, tuning)
    settings["learning_rate"] = training.learning_rate or rate
    if arm.headed and is_encoder(inner(tuned).config):  # it does not learn to read first
        settings["head_rate"] = sft.encoder_head_rate(tuned)
    if arm.mode == "head":
        reading = making.reading_passes(bench, arm)
        train, held = (
            classify.label_rows(p.rows, p.examples, bench.labels, bench.task.kind) for p in rows
        )
        return _fit_head(model, reading, training, train, held, scratch, settings)
    train, held = (p.rows for p in rows)
    if arm.mode == "tags":
        loss, settings["judge"] = tagging.tag_loss(model), tagging.tag_judge(model)
        return sft.fit(model, loss, train, held, training, directory=scratch, **settings)
    score = Scorer(model)
    if rehearsed:
        weight = training.rehearsal
        settings["also"] = rehearsal.loss(score, rehearsed, settings["seed"], weight)
    settings["judge"] = sft.answer_judge(score)
    loss = sft.answer_loss(score)
    return sft.fit(model, loss, train, held, training, directory=scratch, **settings)


def _fit_head(
    classifier: Classifier,
    reading: int,
    training: Training,
    train: list[Row],
    held: list[Row],
    scratch: Path,
    settings: dict[str, Any],
) -> State:
    """Learn to read the inputs, then their labels, then how sure to be, on the validation rows.

    Seconds and skipped steps are those of both trainings.
    """
    read = State()
    if reading:
        read = sft.fit(
            classifier.model,
            sft.answer_loss(Scorer(classifier.model)),
            classify.reading_rows(train),
            classify.reading_rows(held),
            training.model_copy(update={"epochs": reading}),
            directory=scratch / "reading",
            **settings | {"part": 1.0},
        )
    classify.start_at_shares(classifier, train)
    weights = training.class_weights
    counted = classify.class_weights(weights, train, classifier.labels) if weights else None
    loss = classify.head_loss(classifier, counted)
    state = sft.fit(classifier, loss, train, held, training, directory=scratch, **settings)
    classify.calibrate(classifier, held)
    return dataclasses.replace(
        state, seconds=read.seconds + state.seconds, skipped=read.skipped + state.skipped
    )


def _again(headed: Classifier | Tagger, model: Any) -> Classifier | Tagger:
    """The same head on another model."""
    found = type(headed)(model, headed.labels)
    if isinstance(headed, Classifier) and isinstance(found, Classifier):
        found.calibration = headed.calibration
    return found


def _write(arm: Arm, base: Base, model: Any, directory: Path) -> None:
    making.write_about(directory, arm, "")
    tuned = model.model if arm.headed else model
    if arm.tuning and not arm.tuning.adapter:
        # In what the device computes in, as it is loaded again: what is served was trained so.
        tuned.to(compute_dtype(tuned.device)).save_pretrained(directory)
        name_own_head(tuned, directory)
        base.tokenizer.save(directory)
    else:
        save_adapter(tuned, directory, base)
    if arm.headed:
        save_head(model, directory)


def _write_facts(
    state: State,
    rows: tuple[preflight.Prepared, preflight.Prepared],
    seed: int,
    peak: int,
    directory: Path,
) -> None:
    train, validation = rows
    facts = {
        "seed": seed,
        "steps": state.step,
        "best_step": state.best_step,
        "validation_loss": state.best_loss,
        "seconds": state.seconds,
        "peak_memory": peak,
        "curve": state.curve,
        "sample": train.sample,
        "dropped": train.dropped | validation.dropped,
        "skipped": state.skipped,
    }
    (directory / _FACTS).write_text(json.dumps(facts, ensure_ascii=False), "utf-8")
