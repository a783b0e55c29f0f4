"""Time and memory of every arm before anything runs, from a few seconds of real work.

The speeds of reading, writing and training are measured on the base itself with small batches;
lengths come from the task's own rows. Estimates err on the long side: early stopping, which
usually ends a training sooner, is not counted on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from metier.config import Config
from metier.errors import BudgetError
from metier.evaluation.arms import room_in
from metier.evaluation.wording import phrasings
from metier.model.adapters import add_lora
from metier.model.generate import Engine
from metier.model.load import load_base
from metier.progress import Progress
from metier.recipes import making
from metier.recipes.workbench import Workbench
from metier.records import Example
from metier.task import Arm
from metier.training import sft
from metier.training.batches import Row, pad

_LATENCY_REQUESTS = 13
_CHOSEN_ON = 40
_SAMPLED = 24
_LEAST_SECONDS = 0.2
_MOST_ROWS = 16
_CLASSICAL_PER_SECOND = 20_000
_REMOTE_SECONDS = 0.5


class ArmPlan(Config):
    """What one arm will take, about."""

    arm: str
    minutes: float
    memory: int
    """Bytes of this process at its highest."""


class Plan(Config):
    """What a run will take, about."""

    arms: tuple[ArmPlan, ...]
    minutes: float
    memory: int


@dataclass(frozen=True)
class Speed:
    """Measured on one base, in tokens per second; memory in bytes."""

    read: float
    write: float
    train: float
    memory: int


def plan(bench: Workbench, progress: Progress) -> Plan:
    """Estimate every arm of a task on this machine."""
    progress.stage("estimate time and memory")
    arms: list[ArmPlan] = []
    for base in bench.task.bases():
        chosen = [arm.model_copy(update={"base": base}) for arm in bench.task.chosen_arms()]
        arms += _plan_base(bench, base, chosen, named=len(bench.task.bases()) > 1)
    unique = {arm.arm: arm for arm in arms}
    return Plan(
        arms=tuple(unique.values()),
        minutes=sum(arm.minutes for arm in unique.values()),
        memory=max(arm.memory for arm in unique.values()),
    )


def hold(estimate: Plan, budget: float) -> None:
    """Refuse work that would not fit the budget.

    Raises:
        BudgetError: the estimate is above `budget` minutes.

    """
    if estimate.minutes <= budget:
        return
    longest = max(estimate.arms, key=lambda arm: arm.minutes)
    raise BudgetError(
        "budget",
        f"the run would take about {estimate.minutes:.0f} minutes, the budget is {budget:.0f}; "
        f"{longest.arm} alone takes {longest.minutes:.0f}",
        f"allow more (--budget {estimate.minutes * 1.2:.0f}), leave out {longest.arm}, lower "
        "training.epochs, or set split.max_train and split.max_test",
    )


def _plan_base(bench: Workbench, name: str, arms: Sequence[Arm], *, named: bool) -> list[ArmPlan]:
    local = [arm for arm in arms if arm.method not in ("classical", "remote")]
    found = []
    engine, speed = _measure(bench, name, local) if local else (None, Speed(1, 1, 1, 0))
    for arm in arms:
        _check(bench, arm, engine)
        seconds = _seconds(bench, arm, engine, speed)
        shown = arm if named and arm in local else arm.model_copy(update={"base": ""})
        found.append(ArmPlan(arm=shown.name, minutes=seconds / 60, memory=speed.memory))
    return found


def _check(bench: Workbench, arm: Arm, engine: Engine | None) -> None:
    """Refuse now what would stop the arm after others have run."""
    if arm.method == "remote":
        making.remote(bench, phrasings(bench.task.kind)[0].name)
    elif arm.tuned and engine:
        making.prepare(bench, arm, engine)


def _seconds(bench: Workbench, arm: Arm, engine: Engine | None, speed: Speed) -> float:
    parts = bench.parts
    requests = len(parts.validation) + len(parts.test) + _LATENCY_REQUESTS
    if arm.method == "classical":
        return len(parts.train) * len(bench.labels) / _CLASSICAL_PER_SECOND
    if arm.method == "remote" or engine is None:
        return (requests + _CHOSEN_ON * len(phrasings(bench.task.kind))) * _REMOTE_SECONDS
    read, written = _lengths(bench, arm, engine)
    answer = read / speed.read + written / speed.write
    if arm.mode == "likelihood":
        answer = (read + written * len(bench.labels)) / speed.read
    if not arm.tuned:
        tried = min(_CHOSEN_ON, len(parts.validation)) * len(phrasings(bench.task.kind))
        return (requests + tried) * answer
    training = bench.task.training
    passes = training.epochs * (len(parts.train) + len(parts.validation) / 3)
    return len(training.seeds) * (passes * (read + written) / speed.train + requests * answer)


def _lengths(bench: Workbench, arm: Arm, engine: Engine) -> tuple[float, float]:
    """Mean tokens read and written per request, from a sample of validation rows."""
    names = [phrasing.name for phrasing in phrasings(bench.task.kind)]
    compose = making.composer(bench, arm, room_in(engine), names[0])
    rows: Sequence[Example] = bench.parts.validation[:_SAMPLED]
    read = sum(len(engine.renderer.prompt(compose(row.prompt))) for row in rows)
    written = sum(len(engine.renderer.tokenizer.encode(row.answer)) + 1 for row in rows)
    if not arm.tuned:  # a base that was not taught to stop writes to the limit
        written = engine.max_new_tokens * len(rows)
    return read / len(rows), written / len(rows)


def _measure(bench: Workbench, name: str, arms: Sequence[Arm]) -> tuple[Engine, Speed]:
    base = load_base(name)
    engine = making.make_engine(bench, base, base.model)
    longest = engine.context or 1024
    length = min(128, longest // 2)
    read = _rate(lambda rows: _read(engine, rows, length), length)
    write = _rate(lambda rows: _write(engine, rows, length), engine.max_new_tokens)
    train = 1.0
    weights = sum(p.numel() * p.element_size() for p in base.model.parameters())
    if any(arm.tuned for arm in arms):
        model = add_lora(base.model, bench.task.training.lora, 0)
        loss = sft.answer_loss(model)
        train = _rate(lambda rows: _train(loss, rows, length), length)
    full = any(arm.method == "full" for arm in arms)
    # Full tuning keeps weights, gradient and two moments in float32.
    memory = _resident() + (16 * base.parameters if full else weights // 2)
    return engine, Speed(read, write, train, memory)


def _rate(work: Callable[[int], Any], tokens_per_row: int) -> float:
    """Tokens per second of `work(rows)`, with more rows until it takes long enough to time.

    The better of two tries counts, after one that pays for whatever is set up at first use:
    another program may hold the processor during one of them.
    """
    work(1)
    rows = 1
    while True:
        seconds = min(_seconds_of(work, rows) for _ in range(2))
        if seconds > _LEAST_SECONDS or rows >= _MOST_ROWS:
            return rows * tokens_per_row / seconds
        rows *= 4


def _seconds_of(work: Callable[[int], Any], rows: int) -> float:
    began = time.perf_counter()
    work(rows)
    return time.perf_counter() - began


@torch.inference_mode()
def _read(engine: Engine, rows: int, length: int) -> None:
    ids = torch.ones((rows, length), dtype=torch.long, device=engine.model.device)
    engine.model(input_ids=ids, use_cache=False, logits_to_keep=1)


def _write(engine: Engine, rows: int, length: int) -> None:
    engine.generate_ids([[1] * (length // 4)] * rows)


def _train(loss: Callable[[Any], torch.Tensor], rows: int, length: int) -> None:
    row = Row((1,) * length, (False,) * (length - 4) + (True,) * 4)
    loss(pad([row] * rows, 0)).backward()  # type: ignore[no-untyped-call]


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
