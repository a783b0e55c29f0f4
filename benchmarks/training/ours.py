"""Our side: what a user's call does, with figures taken by the listener that every call allows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import metier
from metier.evaluation.statistics import ratio
from metier.model.adapters import add_adapter
from metier.model.device import set_up_processor
from metier.model.generate import Engine
from metier.model.load import load_base
from metier.progress import Silent
from metier.task import Training
from metier.text.template import Renderer
from metier.training import pretrain, sft
from metier.training.batches import Batch
from metier.training.scoring import Scorer
from training import ceiling, common, material
from training.common import Spec, Steps

_OPERATORS = 25


class EnoughError(Exception):
    """All that is measured has been done."""


class Listener(Silent):
    """Takes the time of every step.

    Args:
        most: steps after which the work is stopped.
        step_tokens: tokens of a step, all trained; None where they are counted elsewhere.
        profile: first and last step that the profiler watches, if any.

    """

    def __init__(
        self, most: int, step_tokens: int | None = None, profile: tuple[int, int] | None = None
    ) -> None:
        self.steps = Steps()
        self._most, self._step_tokens = most, step_tokens
        self._window = profile
        self.profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
        )

    def advance(self, n: float = 1, **info: object) -> None:
        """A step is over; none is where the loop says where it begins."""
        if not n:
            self.steps.begin()
            return
        if self._step_tokens:
            self.steps.count(self._step_tokens, self._step_tokens)
        self.steps.end(float(str(info["loss"])))
        done = len(self.steps.seconds)
        if self._window and done == self._window[0]:
            self.profiler.start()
        if self._window and done == self._window[1]:
            self.profiler.stop()
        if done == self._most:
            raise EnoughError

    def figures(self) -> dict[str, Any]:
        """Of the steps, and the table of operators where they were watched."""
        found = self.steps.figures()
        if self._window:
            averages = self.profiler.key_averages(group_by_input_shape=False)
            found["profile"] = averages.table(sort_by="self_cpu_time_total", row_limit=_OPERATORS)
        return found


def train(spec: Spec) -> dict[str, Any]:
    """Fine-tune as `recipes.tuning` does, without rehearsal."""
    set_up_processor()
    training = Training(epochs=1, batch_size=material.STEP_ROWS)
    full = spec["method"] == "full"
    base = load_base(spec["base"], dtype=torch.float32 if full else None)
    model: Any = base.model.requires_grad_(full)
    if not full:
        model = add_adapter(base.model, "lora", training, seed=0)
    rows = material.read_rows(Path(spec["rows"]))
    listener = _listener(spec, spec["steps"])
    loss = _counted(sft.answer_loss(Scorer(model)), listener.steps)
    rate = spec["learning_rate"]
    with contextlib.suppress(EnoughError):
        sft.fit(model, loss, rows, [], training, learning_rate=rate, seed=0, progress=listener)
    return listener.figures()


def _listener(spec: Spec, steps: int, step_tokens: int | None = None) -> Listener:
    window = spec.get("profile")
    return Listener(steps, step_tokens, tuple(window) if window else None)


def _counted(loss: Callable[[Batch], Tensor], steps: Steps) -> Callable[[Batch], Tensor]:
    """The same loss, with the rows taken down that it is given."""

    def counted(batch: Batch) -> Tensor:
        parts = (tensor.split(list(batch.lengths)) for tensor in (batch.ids, batch.targets))
        for ids, targets in zip(*parts, strict=True):
            steps.row(ids.tolist(), targets.tolist())
        return loss(batch)

    return counted


def pretrain_base(spec: Spec) -> dict[str, Any]:
    """Pre-train by the public function, and stop when enough steps are done."""
    set_up_processor()
    data, run = Path(spec["data"]), Path(spec["run"])
    config = material.recipe(data, spec["tokens"], spec["parts"])
    listener = _listener(spec, spec["steps"], config.step_tokens)
    with contextlib.suppress(EnoughError):
        pretrain.pretrain(config, data, run, ratio, progress=listener)
    return listener.figures()


class _Tokenised(Silent):
    """Stops when training would begin."""

    def stage(self, name: str, total: float | None = None) -> None:
        if name.startswith("train packed"):
            raise EnoughError


def windows(spec: Spec) -> dict[str, Any]:
    """Make tokenizer and tokens of the pre-training, and write its windows for the peer."""
    set_up_processor()
    data, run, target = (Path(spec[name]) for name in ("data", "run", "windows"))
    config = material.recipe(data, spec["tokens"], spec["parts"])
    with contextlib.suppress(EnoughError):
        pretrain.pretrain(config, data, run, ratio, progress=_Tokenised())
    steps = spec["steps"]
    material.once(target, lambda path: material.write_windows(path, run, config, steps))
    return {}


def generate(spec: Spec) -> dict[str, Any]:
    """Answer all prompts with the one engine, after a few to warm up."""
    set_up_processor()
    dtype = getattr(torch, spec["dtype"]) if spec["dtype"] else None
    base = load_base(spec["base"], dtype=dtype)
    renderer = Renderer(base.tokenizer, material.TEMPLATE)
    engine = Engine(base.model, renderer, spec["new_tokens"])
    engine.generate_ids(spec["prompts"][: spec["warm"]])
    began = time.perf_counter()
    written = engine.generate_ids(spec["prompts"])
    return {"seconds": time.perf_counter() - began, "texts": written}


@torch.inference_mode()
def gaps(spec: Spec) -> dict[str, Any]:
    """Of texts that differ: nats between both next tokens where they first do, in float32."""
    set_up_processor()
    model: Any = load_base(spec["base"], dtype=torch.float32).model
    found = []
    for prompt, ours, theirs in zip(spec["prompts"], spec["ours"], spec["theirs"], strict=True):
        pairs = enumerate(zip(ours, theirs, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        if first == len(ours) == len(theirs):
            continue
        if first in (len(ours), len(theirs)):
            found.append(float("inf"))  # one goes on where the other ended without a stop
            continue
        logits = model(torch.tensor([[*prompt, *ours[:first]]])).logits[0, -1]
        found.append(abs(float(logits[ours[first]] - logits[theirs[first]])))
    return {"gaps": found}


class _FirstStep(Silent):
    """Stops a training when its first step is done."""

    def __init__(self) -> None:
        self.training = False
        self.at = 0.0

    def stage(self, name: str, total: float | None = None) -> None:
        self.training = name.startswith("train ")

    def advance(self, n: float = 1, **info: object) -> None:
        if self.training and n:
            self.at = time.time()
            raise EnoughError


def start_up(spec: Spec) -> dict[str, Any]:
    """Train an arm of a task by the public function up to its first step."""
    listener = _FirstStep()
    changed = [f"training.learning_rate={spec['learning_rate']}"]
    with contextlib.suppress(EnoughError):
        metier.train(
            Path(spec["task"]), "lora", Path(spec["run"]), changed, budget=1e6, progress=listener
        )
    return {"first_step": listener.at}


if __name__ == "__main__":
    common.serve(
        {
            "material": material.prepare,
            "train": train,
            "pretrain": pretrain_base,
            "windows": windows,
            "generate": generate,
            "gaps": gaps,
            "start-up": start_up,
            "ceiling": ceiling.measure,
        }
    )
