"""How fast a base reads, writes and is trained on this machine, and what that takes of its memory.

Everything is measured on the base itself, in some seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from metier.model.backbone import hidden_states
from metier.model.decoder import evaluating, has_plain_cache, read_prefix
from metier.model.encoder import is_encoder
from metier.model.generate import Engine
from metier.model.load import load_base
from metier.model.memory import SLACK, PeakMemory, give_back, resident
from metier.model.prelude import virtual_tokens
from metier.model.seq2seq import cache_bytes, encode, is_seq2seq
from metier.recipes import making
from metier.recipes.workbench import Workbench
from metier.task import Arm
from metier.text.template import Renderer
from metier.training import rehearsal, sft
from metier.training.batches import Batch, Row
from metier.training.forward import forward_of
from metier.training.scoring import Scorer

_LEAST_SECONDS = 0.2
_MOST_ROWS = 16
_READ, _WRITTEN = 128, 32
_PROBED = 8
_MOST_SECONDS = 10.0
# Of every trained weight: its gradient and the two moments of AdamW, in float32.
_STATE_BYTES = 12


@dataclass(frozen=True)
class Speed:
    """Measured on one model, in tokens per second; memory in bytes of this process.

    Attributes:
        read: of prompts.
        write: of several answers at once.
        alone: of one answer alone.
        score: of text whose probability is computed.
        train: of training.
        rehearse: seconds that rehearsal adds to a step of training.
        answering: memory while it answers.
        training: memory while it trains.

    """

    read: float
    write: float
    alone: float
    score: float
    answering: int
    train: float = math.nan
    rehearse: float = math.nan
    training: int = 0


@dataclass(frozen=True)
class Kept:
    """What is kept of an engine when its model is given back; an `arms.Reader`."""

    renderer: Renderer
    max_new_tokens: int
    context: int | None


def measure(
    bench: Workbench, name: str, arms: Sequence[Arm]
) -> tuple[dict[str, Kept], dict[str, Speed]]:
    """What the base as it is and those it is tuned to read, and their speeds, by name.

    They are loaded one after the other: there may be no room for two.
    """
    found = {"base": _measured(bench, making.make_engine(bench, load_base(name)))}
    for arm in arms:
        if arm.tuning and arm.tuning.name not in found:
            give_back()
            base, model = making.load_trainable(bench, arm.model_copy(update={"base": name}), 0)
            engine = making.make_engine(bench, base, model)
            # A base whose own weights are tuned answers as it did.
            answering = None if arm.tuning.adapter else found["base"][1]
            found[arm.tuning.name] = _measured(bench, engine, answering, tuned=True)
            del base, model, engine
    kept = {model: one for model, (one, _) in found.items()}
    return kept, {model: speed for model, (_, speed) in found.items()}


def _measured(
    bench: Workbench, engine: Engine, answering: Speed | None = None, *, tuned: bool = False
) -> tuple[Kept, Speed]:
    """What an engine reads, without its model, and its speed."""
    making.check_room(bench, engine)
    speed = answering or _speed(engine)
    if tuned:
        speed = _trained(speed, engine, making.longest_row(bench, engine))
    return Kept(engine.renderer, engine.max_new_tokens, engine.context), speed


def _speed(engine: Engine) -> Speed:
    length = _length(engine)
    if is_encoder(engine.model.config):
        with PeakMemory() as memory:
            read = _rate(lambda rows: _read(engine, rows, length), length)
        return Speed(read, write=math.inf, alone=math.inf, score=math.inf, answering=memory.peak)
    short = Engine(engine.model, engine.renderer, min(_WRITTEN, engine.max_new_tokens))

    def write(rows: int) -> None:
        short.generate_ids([[1] * (length // 4)] * rows)

    with PeakMemory() as memory:
        speed = Speed(
            read=_rate(lambda rows: _read(engine, rows, length), length),
            write=_rate(write, short.max_new_tokens),
            alone=_rate(write, short.max_new_tokens, most=1),
            score=_rate(lambda rows: engine.logprobs([([1], [1] * length)] * rows), length),
            answering=0,
        )
    return replace(speed, answering=memory.peak + _cache_bytes(engine))


def _cache_bytes(engine: Engine) -> int:
    """Bytes of keys and values of a full batch; 0 where a model keeps something else."""
    if is_seq2seq(engine.model):
        return cache_bytes(engine.model) * engine.batch_tokens
    if not has_plain_cache(engine.model):
        return 0
    with evaluating(engine.model):
        layers = read_prefix(engine.model, [1] * _PROBED).layers
    size = sum(part.nbytes for layer in layers for part in (layer.keys, layer.values))
    return int(size * engine.batch_tokens // (virtual_tokens(engine.model) + _PROBED))


def _trained(speed: Speed, engine: Engine, longest: int) -> Speed:
    """The speed with that of training the parameters that want gradients.

    Args:
        speed: of answering.
        engine: holds the model.
        longest: tokens of the longest row.

    """
    loss, length = _loss(engine.model), _length(engine)
    state = _STATE_BYTES * sum(p.numel() for p in engine.model.parameters() if p.requires_grad)
    rate = _rate(lambda rows: _train(loss, rows, length), length)
    return replace(
        speed,
        train=rate,
        rehearse=min(_seconds_of(partial(_rehearse, loss), length) for _ in range(2)),
        training=_training_memory(loss, rate, longest) + state,
    )


def _loss(model: Any) -> Callable[[Any], torch.Tensor]:
    """Of answers; of an encoder, which has none, any that takes the same forward pass."""
    if not is_encoder(model.config):
        return sft.answer_loss(Scorer(model))
    forward = forward_of(model)
    return lambda batch: forward(batch.ids, batch.lengths).sum()


def _training_memory(loss: Callable[[Any], torch.Tensor], rate: float, longest: int) -> int:
    """Bytes of this process that trains on a micro-batch of the longest rows.

    Where that takes long, fewer rows are tried and what they need is scaled up. Added is what a
    training may gather before it gives memory back.
    """
    rows = max(1, sft.MICRO_TOKENS // longest)
    tried = max(1, min(rows, int(rate * _MOST_SECONDS / longest)))
    give_back()
    before = resident()
    with PeakMemory() as memory:
        _train(loss, tried, longest)
    return before + (memory.peak - before) * rows // tried + SLACK


def _length(engine: Engine) -> int:
    """Tokens of a row to measure with."""
    return min(_READ, (engine.context or 1024) // 2)


def _rate(work: Callable[[int], Any], tokens_per_row: int, most: int = _MOST_ROWS) -> float:
    """Tokens per second of `work(rows)`, with more rows until it takes long enough to time.

    The better of two tries counts, after one that pays for whatever is set up at first use:
    another program may hold the processor during one of them.
    """
    work(1)
    rows = 1
    while True:
        seconds = min(_seconds_of(work, rows) for _ in range(2))
        if seconds > _LEAST_SECONDS or rows >= most:
            return rows * tokens_per_row / seconds
        rows *= 4


def _seconds_of(work: Callable[[int], Any], rows: int) -> float:
    began = time.perf_counter()
    work(rows)
    return time.perf_counter() - began


@torch.inference_mode()
def _read(engine: Engine, rows: int, length: int) -> None:
    ids = torch.ones(rows * length, dtype=torch.long, device=engine.model.device)
    if is_seq2seq(engine.model):
        encode(engine.model, list(ids.view(rows, length)))
        return
    hidden_states(engine.model, ids, [length] * rows)


def _rehearse(loss: Callable[[Any], torch.Tensor], length: int) -> None:
    """As much as a step rehearses: every token counts, where few of an answer's row do."""
    length = min(length, rehearsal.LENGTH)
    row = Row((1,) * length, (False,) + (True,) * (length - 1))
    loss(Batch.of([row] * rehearsal.STEP_TEXTS)).backward()  # type: ignore[no-untyped-call]


def _train(loss: Callable[[Any], torch.Tensor], rows: int, length: int) -> None:
    row = Row((1,) * length, (False,) * (length - 4) + (True,) * 4)
    loss(Batch.of([row] * rows)).backward()  # type: ignore[no-untyped-call]
