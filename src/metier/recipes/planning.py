"""Time and memory of every arm before anything runs, from a few seconds of real work.

The speeds of reading, writing and training are measured on the base itself with small batches;
lengths come from the task's own rows. Estimates err on the long side: early stopping, which
usually ends a training sooner, is not counted on.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from metier.config import Config
from metier.data.split import PARTS
from metier.errors import BudgetError
from metier.evaluation import forgetting, runner, units
from metier.evaluation.wording import phrasings
from metier.model.load import is_encoder_decoder
from metier.model.memory import resident
from metier.model.quantised import check_four_bit
from metier.progress import Progress
from metier.recipes import encoder_decoder, making, speeds
from metier.recipes.speeds import Kept
from metier.recipes.workbench import Workbench
from metier.task import Arm, Task
from metier.text import tags
from metier.training import rehearsal
from metier.training.batches import Row

_SAMPLED = 24
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
class Request:
    """Mean tokens of one request of an arm.

    Attributes:
        read: at once.
        written: one after the other.

    """

    read: float
    written: float


def plan(bench: Workbench, progress: Progress, made: Collection[str] = ()) -> Plan:
    """Say what the data is, and estimate every arm of a task on this machine.

    Args:
        bench: what the arms are made from.
        progress: is told.
        made: names of the arms that are made already, of which only the answers are to come.

    """
    _say_data(bench, progress)
    encoder_decoder.check(bench, progress)
    progress.stage("estimate time and memory")
    arms = bench.task.chosen_arms()
    found = [_plan_elsewhere(bench, arm, made) for arm in arms if not _local(arm)]
    for name in bench.task.bases():
        if local := [arm for arm in arms if _local(arm)]:
            found += _plan_base(_Base(bench, name, local), local, made)
    return Plan(
        arms=tuple(found),
        minutes=sum(arm.minutes for arm in found),
        memory=max(arm.memory for arm in found),
    )


def plan_training(bench: Workbench, progress: Progress, trainings: float = 1) -> Plan:
    """The same for trainings of a task's only arm, without answers."""
    _say_data(bench, progress)
    encoder_decoder.check(bench, progress)
    progress.stage("estimate time and memory")
    (arm,) = bench.task.chosen_arms()
    base = _Base(bench, bench.task.bases()[0], [arm])
    seconds = base.making(arm, base.request(arm), trainings)
    memory = base.memory(arm, made=False)
    found = ArmPlan(arm=arm.name, minutes=seconds / 60, memory=memory)
    return Plan(arms=(found,), minutes=found.minutes, memory=memory)


def check_machine(task: Task) -> None:
    """Refuse arms that this machine cannot make, before any work.

    Raises:
        ConfigError: one holds its base in four bits, and there is no accelerator for that.
        MissingExtraError: the package for that is not installed.

    """
    if any(arm.tuning and arm.tuning.four_bit for arm in task.chosen_arms()):
        check_four_bit()


def hold(estimate: Plan, budget: float) -> None:
    """Refuse work that would not fit the budget.

    Raises:
        BudgetError: the estimate is above `budget` minutes.

    """
    if estimate.minutes <= budget:
        return
    longest = max(estimate.arms, key=lambda arm: arm.minutes)
    several = len(estimate.arms) > 1
    taken, allowed, most = (
        units.seconds(minutes * 60) for minutes in (estimate.minutes, budget, longest.minutes)
    )
    raise BudgetError(
        "budget",
        f"this would take about {taken}, the budget is {allowed}"
        + (f"; {longest.arm} alone takes {most}" if several else ""),
        f"allow more (--budget {math.ceil(estimate.minutes * 1.2)}), "
        + (f"leave out {longest.arm}, " if several else "")
        + "lower training.epochs, or set split.max_train and split.max_test",
    )


def _say_data(bench: Workbench, progress: Progress) -> None:
    """The lines of an audit that a person must see before work begins."""
    sizes = ", ".join(f"{name} {len(getattr(bench.parts, name)):,}" for name in PARTS)
    progress.say(f"rows: {sizes}")
    removed = bench.parts.removed | bench.removed_passages
    if left_out := ", ".join(f"{why} {count:,}" for why, count in removed.items() if count):
        progress.say(f"left out: {left_out}")
    for warning in bench.parts.warnings:
        progress.say(f"warning: {warning}")


def _local(arm: Arm) -> bool:
    """Whether a base on this machine answers."""
    return arm.method not in ("classical", "remote")


def _plan_elsewhere(bench: Workbench, arm: Arm, made: Collection[str]) -> ArmPlan:
    """An arm without a base; what it needs besides this process is small."""
    parts, memory = bench.parts, resident()
    making_it, answering = len(parts.train) * len(bench.labels) / _CLASSICAL_PER_SECOND, 0.0
    if arm.method == "remote":
        names = [phrasing.name for phrasing in phrasings(bench.task.kind)]
        making.remote(bench, names[0])  # what would stop it is refused now
        making_it = making.CHOOSE_ON * len(names) * _REMOTE_SECONDS
        requests = len(parts.validation) + len(parts.test)
        answering = requests * _REMOTE_SECONDS + runner.latency_seconds(_REMOTE_SECONDS)
    seconds = (arm.name not in made) * making_it + answering
    return ArmPlan(arm=arm.name, minutes=seconds / 60, memory=memory)


def _plan_base(base: _Base, arms: Sequence[Arm], made: Collection[str]) -> Iterator[ArmPlan]:
    """The arms over one base."""
    for arm in arms:
        name, request = base.arm_name(arm), base.request(arm)
        seconds = base.answering(arm, request) + base.forgetting(arm)
        if name not in made:
            seconds += base.making(arm, request, base.seeds)
        yield ArmPlan(arm=name, minutes=seconds / 60, memory=base.memory(arm, name in made))


class _Base:
    """Estimates, in seconds and bytes, for the arms over one base."""

    def __init__(self, bench: Workbench, name: str, arms: Sequence[Arm]) -> None:
        self._bench, self._name, self._seq2seq = bench, name, is_encoder_decoder(name)
        self.seeds = len(bench.task.training.seeds)
        self._kept, self._speeds = speeds.measure(bench, name, arms)
        # The base is measured once, for all arms that may forget.
        self._first = next((arm for arm in arms if self._may_forget(arm)), None)

    def arm_name(self, arm: Arm) -> str:
        """How reports call an arm over this base."""
        several = len(self._bench.task.bases()) > 1
        return arm.model_copy(update={"base": self._name if several else ""}).name

    def _may_forget(self, arm: Arm) -> bool:
        return arm.may_forget and not self._seq2seq

    def making(self, arm: Arm, request: Request, trainings: float) -> float:
        """Trainings, or choosing a phrasing; refuses now what cannot be trained."""
        parts = self._bench.parts
        if not arm.tuned:
            phrased = len(phrasings(self._bench.task.kind))
            tried = min(making.CHOOSE_ON, len(parts.validation))
            return phrased * tried * self._batched(arm, request)
        train, held = (
            sum(_trained_on(row, arm) for row in prepared.rows)
            for prepared in making.prepare(self._bench, arm, self._kept[_model_of(arm)])
        )
        training = self._bench.task.training
        base = arm.model_copy(update={"base": self._name})
        passes = training.epochs + making.reading_passes(self._bench, base)
        # Validation is read only: a third of the work.
        tokens = passes * (train + held / 3)
        again, writing = self._rehearsal(arm)
        return trainings * (tokens / self._speeds[_model_of(arm)].train + again) + writing

    def _rehearsal(self, arm: Arm) -> tuple[float, float]:
        """Seconds of each training against forgetting, and until the base has written for it.

        It writes once, for all arms that may forget.
        """
        training = self._bench.task.training
        if not (training.rehearsal and self._may_forget(arm)):
            return 0.0, 0.0
        steps = training.epochs * math.ceil(len(self._bench.parts.train) / training.batch_size)
        written = rehearsal.TEXTS * rehearsal.LENGTH if arm == self._first else 0
        again = steps * self._speeds[_model_of(arm)].rehearse
        return again, written / self._speeds["base"].write

    def answering(self, arm: Arm, request: Request) -> float:
        """Validation and test part with every seed, and the requests that show the latency."""
        parts = self._bench.parts
        speed = self._speeds[_model_of(arm)]
        models = len(self._bench.task.training.seeds) if arm.tuned else 1
        alone = request.read / speed.read + request.written / speed.alone
        requests = models * (len(parts.validation) + len(parts.test))
        return requests * self._batched(arm, request) + runner.latency_seconds(alone)

    def forgetting(self, arm: Arm) -> float:
        """General text and minimal pairs, read by the base once and by every tuned model."""
        if not self._may_forget(arm):
            return 0.0
        tokens = _general_tokens(self._bench, self._kept[_model_of(arm)])
        after = len(self._bench.task.training.seeds) / self._speeds[_model_of(arm)].score
        before = 1 / self._speeds["base"].score if arm == self._first else 0.0
        return tokens * (before + after)

    def memory(self, arm: Arm, made: bool) -> int:
        """Bytes of this process at its highest."""
        speed = self._speeds[_model_of(arm)]
        if made or not arm.tuned:
            return speed.answering
        # The base writes as many texts side by side as it answers in a full batch.
        return max(speed.training, self._speeds["base"].answering * self._may_forget(arm))

    def _batched(self, arm: Arm, request: Request) -> float:
        speed = self._speeds[_model_of(arm)]
        return request.read / speed.read + request.written / speed.write

    def request(self, arm: Arm) -> Request:
        """Mean of a sample of validation rows."""
        bench, engine = self._bench, self._kept[_model_of(arm)]
        names = [phrasing.name for phrasing in phrasings(bench.task.kind)]
        compose = making.composer(bench, arm, making.room(bench, arm, engine), names[0])
        rows = bench.parts.validation[:_SAMPLED]
        chats = [(compose(row.prompt), row.messages[-1]) for row in rows]
        read = sum(len(engine.renderer.prompt(chat)) for chat, _ in chats) / len(rows)
        if arm.mode == "head":  # the label is a class, not text
            return Request(read, 0)
        if arm.mode == "tags":  # the text is read once more, and nothing written
            readings = [tags.read(engine.renderer, row.prompt) for row in rows]
            return Request(sum(len(reading.ids) for reading in readings) / len(rows), 0)
        if arm.mode == "likelihood":  # reads every label behind the prompt
            encode = engine.renderer.tokenizer.encode
            return Request(read + sum(len(encode(label)) + 1 for label in bench.labels), 0)
        if not arm.tuned:  # a base that was not taught to stop writes to the limit
            return Request(read, engine.max_new_tokens)
        whole = sum(len(engine.renderer.example([*chat, end]).ids) for chat, end in chats)
        return Request(read, whole / len(rows) - read)


def _trained_on(row: Row, arm: Arm) -> int:
    """Tokens of a row; to a head the answer is a class, not text."""
    return row.trained.index(True) if arm.mode == "head" else len(row.ids)


def _model_of(arm: Arm) -> str:
    """Which of the models that `speeds.measure` looks at answers."""
    return arm.tuning.name if arm.tuning else "base"


def _general_tokens(bench: Workbench, engine: Kept) -> int:
    """Tokens of general text and minimal pairs."""
    encode = engine.renderer.tokenizer.encode
    sentences = [sentence for pair in bench.material.pairs for sentence in (pair.good, pair.bad)]
    text = "\n".join(bench.material.texts)[: forgetting.GENERAL_TEXT]
    return len(encode(text)) + sum(len(encode(sentence)) for sentence in sentences)
