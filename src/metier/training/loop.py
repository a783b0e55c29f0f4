"""The only optimiser loop: batches in, trained parameters out, exact after every interruption.

The loss of a step is the sum over all its micro-batches divided by the weight (trained tokens or
rows) of the whole step, and what is added to it once: neither how a step is cut nor how many
processes share it changes its gradient. Batches and random numbers are functions of seed, step and
place in the step: a killed run that goes on is the run that was not killed, and other processes may
take over.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from metier import runs
from metier.errors import DivergedError, TrainingError
from metier.model import checkpoint
from metier.model.memory import Thrift
from metier.model.world import World, gathered, part_like
from metier.progress import Progress, Silent

_BAD_STEPS = 3


class MicroBatch(Protocol):
    """Part of an optimiser step that is computed at once."""

    @property
    def weight(self) -> float:
        """Trained tokens (or rows) in it."""
        ...

    @property
    def tokens(self) -> int:
        """All real tokens in it: how much work it is."""
        ...


B = TypeVar("B", bound=MicroBatch)
B_co = TypeVar("B_co", bound=MicroBatch, covariant=True)


class Batches(Protocol[B_co]):
    """The data of a run, as a function of the step."""

    def step(self, index: int) -> Sequence[B_co]:
        """The micro-batches of optimiser step `index`."""
        ...


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train."""

    steps: int
    schedule: Callable[[int], float]
    """Factor on the peak learning rates at a step."""
    seed: int = 0
    clip: float = 1.0
    """Largest norm of the gradient; 0 leaves it as it is."""
    evaluate_every: int = 0
    """Steps between evaluations; 0: only at the end."""
    patience: int = 0
    """Stop after this many evaluations that are not better; 0: never."""
    checkpoint_seconds: float = 60.0


@dataclass
class State:
    """Where a run stands."""

    step: int = 0
    best_loss: float = math.inf
    """At the best step."""
    best_mistakes: float = math.inf
    best_step: int = 0
    waited: int = 0
    skipped: int = 0
    """Steps that changed nothing, as their gradient was not finite."""
    skipped_in_a_row: int = 0
    """Such steps since the last that was not one."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """One entry per evaluation: step, train_loss since the one before, validation_loss."""
    finished: bool = False
    train_sum: float = 0.0
    train_steps: int = 0
    rate: float | None = None
    """Factor on the peak learning rates at the last step; None before the first."""
    seconds: float = field(default=0.0, compare=False)
    """Wall time of all its steps, over every interruption; steps done again count once."""


def cosine(steps: int, warmup: float) -> Callable[[int], float]:
    """Linear warm-up over a share of the steps, then a cosine to zero (arXiv 1608.03983)."""
    rise = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    return factor


def trapezoid(steps: int, rise: int, fall: int) -> Callable[[int], float]:
    """Linear rise, constant, then a linear fall to zero over the last steps (arXiv 2405.18392)."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / max(1, rise), (steps - step) / max(1, fall))

    return factor


class Loop(Generic[B]):
    """Trains the parameters of `model` that require gradients.

    Args:
        model: whose parameters are trained.
        loss: sum of the losses of a micro-batch.
        batches: the data.
        optimizers: over the model's trained parameters, each group with its peak ``lr``.
        plan: how long and how fast.
        also: what a step adds to its mean loss.
        directory: receives checkpoints and ``log.jsonl``; None keeps nothing.
        evaluate: figures now, ``loss`` among them, and ``validation_mistakes`` where answers can
            be counted. The fewest mistakes choose the best parameters, of those the lowest loss.
        resumed: is given where the run stood that is about to go on, and may refuse it.
        hardest: what needs the most memory: it is tried before the first step.
        world: the processes that share the work; the first of them writes the files.
        progress: is told every step.

    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[B], Tensor],
        batches: Batches[B],
        optimizers: Sequence[torch.optim.Optimizer],
        plan: Plan,
        *,
        also: Callable[[int], Tensor] | None = None,
        directory: Path | None = None,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        resumed: Callable[[State], None] | None = None,
        hardest: B | None = None,
        world: World | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._loss, self._batches, self._optimizers, self._plan = loss, batches, optimizers, plan
        self._model, self._also, self._hardest = model, also, hardest
        self._world = world or World()
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._directory, self._evaluate, self._resumed = directory, evaluate, resumed
        self._progress: Progress = progress or Silent()
        self._best: dict[str, Tensor] = {}
        self._log: list[str] = []
        self._saved = 0.0
        self._peaks = [[group["lr"] for group in opt.param_groups] for opt in optimizers]
        self.state = State()

    def run(self, until: int | None = None) -> State:
        """Train to the end, or from the last checkpoint to the end; keep the best parameters.

        Args:
            until: a step to pause after, with a checkpoint from which the same training goes on;
                the parameters stay as they are then.

        Raises:
            DivergedError: the gradient was not finite three times in a row.
            TrainingError: memory does not suffice for the hardest micro-batch.

        """
        until = self._plan.steps if until is None else until
        self._resume()
        self._try_hardest()
        if not self.state.step:
            self._progress.advance(0)  # the first step begins
        began = time.monotonic() - self.state.seconds
        thrift = Thrift()
        self._saved = time.monotonic()
        while not self.state.finished and self.state.step < until:
            due = self._step()
            self._maybe_evaluate()
            thrift.look()
            self.state.seconds = time.monotonic() - began
            if due or self.state.finished or self.state.step == until:
                self._save()
        if self.state.finished:
            self._take_best()
        return self.state

    def figures(self) -> dict[str, float]:
        """What `evaluate` gives now; nothing of the run depends on it."""
        if self._evaluate is None:
            return {}
        self._model.eval()
        with torch.no_grad():
            return dict(self._evaluate())

    def _step(self) -> bool:
        """One optimiser step. Returns whether a checkpoint is due."""
        step, began = self.state.step, time.perf_counter()
        parts = self._batches.step(step)
        weight = sum(part.weight for part in parts)
        self._model.train()
        total = 0.0
        for place, part, counts in self._world.share(parts):
            self._seed(step, place)
            loss = self._loss(part) * counts
            (loss / weight).backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        self._seed(step, len(parts))
        added = self._add(step)
        self._world.add_gradients(self._trained.values())
        norm = self._update(step)
        total, added, due = self._world.total(total, added, self._is_due())
        line = {"step": step, "loss": total / weight, "gradient_norm": norm}
        self._record(line | ({"added": added} if self._also else {}))
        speed = sum(part.tokens for part in parts) / (time.perf_counter() - began)
        self._progress.advance(1, loss=f"{total / weight:.3f}", tokens_per_second=f"{speed:,.0f}")
        self.state.step, self.state.rate = step + 1, self._plan.schedule(step)
        self.state.finished = self.state.step >= self._plan.steps
        return due > 0

    def _seed(self, step: int, place: int) -> None:
        """What is drawn for a micro-batch does not depend on what was computed before it."""
        drawn = (self._plan.seed * 1_000_003 + step) * 1_000_003 + place
        torch.manual_seed(drawn % (1 << 63))

    def _is_due(self) -> bool:
        """The first process's clock decides for all."""
        past = time.monotonic() - self._saved > self._plan.checkpoint_seconds
        return past and self._world.first

    def _try_hardest(self) -> None:
        """Run out of memory now, not hours later."""
        if self._hardest is None or self.state.finished:
            return
        self._model.train()
        self._seed(0, 0)
        try:
            self._loss(self._hardest).backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            raise TrainingError(
                f"the longest rows, {self._hardest.tokens:,} tokens at once",
                "need more memory than there is",
                "lower training.max_length, tune an adapter instead of all weights, or take a "
                "smaller base",
            ) from None
        self._forget_gradients()
        self._hardest = None

    def _update(self, step: int) -> float:
        """Clip, guard against NaN, and step every optimiser. Returns the gradient norm."""
        norm = self._world.clip(self._trained.values(), self._plan.clip)
        if math.isfinite(norm):
            self.state.skipped_in_a_row = 0
            factor = self._plan.schedule(step)
            for optimizer, peaks in zip(self._optimizers, self._peaks, strict=True):
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * factor
                optimizer.step()
        else:
            self._skip(step)
        self._forget_gradients()
        return norm

    def _forget_gradients(self) -> None:
        for parameter in self._trained.values():
            parameter.grad = None

    def _skip(self, step: int) -> None:
        self.state.skipped += 1
        self.state.skipped_in_a_row += 1
        if self.state.skipped_in_a_row >= _BAD_STEPS:
            raise DivergedError(
                f"step {step}",
                f"the gradient was not finite {_BAD_STEPS} times in a row",
                "lower the learning rate, or look at the rows of this step",
            )

    def _add(self, step: int) -> float:
        """Of what the step's loss gets besides, the share of this process."""
        if self._also is None:
            return 0.0
        loss = self._also(step) / self._world.size
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def _record(self, line: dict[str, float]) -> None:
        self.state.train_sum += line["loss"]
        self.state.train_steps += 1
        self._log.append(json.dumps(line))

    def _maybe_evaluate(self) -> None:
        every, state = self._plan.evaluate_every, self.state
        if self._evaluate is None or not (state.finished or (every and state.step % every == 0)):
            return
        figures = self.figures()
        loss = figures.pop("loss")
        mean = state.train_sum / max(1, state.train_steps)
        point = {"step": state.step, "train_loss": mean, "validation_loss": loss}
        state.curve.append(point | figures)
        state.train_sum, state.train_steps = 0.0, 0
        mistakes = figures.get("validation_mistakes", 0.0)
        better = (mistakes, loss) < (state.best_mistakes, state.best_loss)
        if better and math.isfinite(loss):
            state.best_mistakes, state.best_loss = mistakes, loss
            state.best_step, state.waited = state.step, 0
            self._best = {n: p.detach().clone() for n, p in self._trained.items()}
        else:
            state.waited += 1
            state.finished |= 0 < self._plan.patience <= state.waited

    def _take_best(self) -> None:
        if not self._best:
            return
        with torch.no_grad():
            for name, value in self._best.items():
                self._trained[name].copy_(value)

    def _save(self) -> None:
        """Keep a checkpoint; every process gives its part, the first writes it."""
        self._saved = time.monotonic()
        if self._directory is None:
            return
        snapshot = checkpoint.Checkpoint(
            tensors=gathered(self._trained, self._world),
            optimizers=[self._gathered_states(optimizer) for optimizer in self._optimizers],
            state=vars(self.state),
            best=gathered(self._best, self._world),
        )
        if self._world.first:
            lines = "".join(f"{line}\n" for line in self._log)
            runs.write_atomic(self._directory / "log.jsonl", lines)
            checkpoint.save(self._directory / "checkpoints", snapshot, self.state.step)

    def _gathered_states(self, optimizer: torch.optim.Optimizer) -> checkpoint.States:
        return {
            name: gathered(optimizer.state[parameter], self._world)
            for name, parameter in self._trained.items()
            if parameter in optimizer.state
        }

    def _resume(self) -> None:
        if self._directory is None:
            return
        found, problems = checkpoint.load_newest(self._directory / "checkpoints")
        for problem in problems:
            self._progress.say(f"a damaged checkpoint was passed over: {problem}")
        if found is None:
            return
        self._check_names(found.tensors)
        with torch.no_grad():
            for name, value in found.tensors.items():
                self._trained[name].copy_(part_like(self._trained[name], value))
        for optimizer, states in zip(self._optimizers, found.optimizers, strict=True):
            self._restore(optimizer, states)
        self.state = State(**found.state)
        if self._resumed:
            self._resumed(self.state)
        # A plan may have become longer since.
        stopped_early = 0 < self._plan.patience <= self.state.waited
        self.state.finished = stopped_early or self.state.step >= self._plan.steps
        self._best = {n: part_like(self._trained[n], value) for n, value in found.best.items()}
        self._read_log(self._directory / "log.jsonl")
        self._progress.say(f"going on after step {self.state.step}")
        self._progress.advance(self.state.step)

    def _restore(self, optimizer: torch.optim.Optimizer, states: checkpoint.States) -> None:
        """Give an optimiser the states of its parameters, whatever their order was."""
        names = {id(parameter): name for name, parameter in self._trained.items()}
        own = [p for group in optimizer.param_groups for p in group["params"]]
        numbered = {
            place: {key: part_like(p, value) for key, value in states[names[id(p)]].items()}
            for place, p in enumerate(own)
            if names[id(p)] in states
        }
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": numbered, "param_groups": groups})

    def _read_log(self, path: Path) -> None:
        """The lines of the steps done. They are a record alone: without some a run goes on, too."""
        text = path.read_text(errors="replace") if path.exists() else ""
        self._log = [line for line in text.splitlines() if _step_of(line) < self.state.step]
        if lost := self.state.step - len(self._log):
            self._progress.say(f"{path}: of the steps done, {lost} lines are lost")

    def _check_names(self, tensors: Mapping[str, Tensor]) -> None:
        kept = {(name, tensor.shape) for name, tensor in tensors.items()}
        if wrong := kept ^ {(name, p.shape) for name, p in self._trained.items()}:
            different = min(name for name, _ in wrong)
            raise TrainingError(
                str(self._directory),
                f"the checkpoint trains other parameters (first difference: {different})",
                "give another output directory, or the settings of the first start",
            )


def _step_of(line: str) -> float:
    """Step of a line of the log; infinity where it cannot be read."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return math.inf
