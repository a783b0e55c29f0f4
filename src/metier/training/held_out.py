"""Bits per byte of held-out text while a base is trained, source by source.

The bytes are those of the text, and every token behind the opening one is counted, so figures can
be compared between tokenizers, and between a base and what became of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from metier.text.tokenizer import Tokenizer
from metier.text.windows import fit
from metier.training.scoring import Scorer

Floats = NDArray[np.float64]
Bits = Mapping[str, Floats]
"""By source, the bits of each of its windows."""

_ROWS = 4


class Interval(Protocol):
    """A figure with its 95 % interval."""

    @property
    def mean(self) -> float:
        """The figure."""
        ...

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        ...

    @property
    def high(self) -> float:
        """Upper end of it."""
        ...


Ratio = Callable[[Floats, Floats], Interval]
"""Numerators and denominators by window to the ratio of their sums."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out windows of one source.

    A window longer than a row stands in several. All rows are equally long, and there are whole
    batches of them: a forward pass compiled for one shape sees no other.

    Attributes:
        name: of the source.
        trained: False for a source that is only watched.
        ids: what is read, shape (rows, length); the opening token stands first, and behind the end.
        targets: the next token, or -1 behind the end; the same shape.
        window: which window a row is of, shape (rows,).
        sizes: UTF-8 bytes of each window.

    """

    name: str
    trained: bool
    ids: Tensor
    targets: Tensor
    window: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def of(
        cls, name: str, windows: Sequence[str], tokenizer: Tokenizer, length: int, *, trained: bool
    ) -> HeldOut:
        """Lay out windows of text in rows of at most `length` tokens."""
        rows = [
            (number, tokenizer.encode(piece))
            for number, window in enumerate(windows)
            for piece in fit(window, tokenizer, length)
        ]
        shape = (math.ceil(len(rows) / _ROWS) * _ROWS, length)
        ids, targets = torch.full(shape, tokenizer.opening_id), torch.full(shape, -1)
        for place, (_, tokens) in enumerate(rows):
            found = torch.tensor(tokens, dtype=torch.long)
            ids[place, 1 : len(tokens)] = found[:-1]
            targets[place, : len(tokens)] = found
        window = torch.zeros(shape[0], dtype=torch.long)
        window[: len(rows)] = torch.tensor([number for number, _ in rows], dtype=torch.long)
        sizes = tuple(len(text.encode()) for text in windows)
        return cls(name, trained, ids, targets, window, sizes)

    def bits(self, score: Scorer) -> Floats:
        """Bits of each window under a model, shape (windows,)."""
        found = torch.zeros(len(self.sizes), dtype=torch.float64)
        parts = (torch.split(values, _ROWS) for values in (self.ids, self.targets, self.window))
        for ids, targets, window in zip(*parts, strict=True):
            nats = _nats(score, ids, targets).sum(1)
            found.index_add_(0, window, nats.double().cpu() / math.log(2))
        return found.numpy()


def _nats(score: Scorer, ids: Tensor, targets: Tensor) -> Tensor:
    """Loss of every token, zero where there is none; shape (rows, length)."""
    targets = targets.to(score.device)
    wanted = targets >= 0
    nats = torch.zeros(targets.shape, device=score.device)
    following, found = targets[wanted], []

    def criterion(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        found.append(F.cross_entropy(logits, following[rows], reduction="none").float())
        return found[-1].sum(), logits

    with torch.no_grad():
        score(
            ids.to(score.device).flatten(), [ids.shape[1]] * len(ids), wanted.flatten(), criterion
        )
        nats[wanted] = torch.cat(found) if found else nats[wanted]
    return nats


def bits_of(score: Scorer, held_out: Sequence[HeldOut]) -> Bits:
    """Bits of the windows of each source under a model."""
    return {part.name: part.bits(score) for part in held_out}


def bits_per_byte(bits: Bits, held_out: Sequence[HeldOut]) -> dict[str, float]:
    """Bits per byte of each source; ``loss`` is the mean of those that are trained on.

    Where only watched sources have held-out text, ``loss`` is NaN, which is never the best.
    """
    figures = {part.name: float(bits[part.name].sum()) / sum(part.sizes) for part in held_out}
    trained = [figures[part.name] for part in held_out if part.trained]
    return figures | {"loss": sum(trained) / len(trained) if trained else math.nan}


@dataclass(frozen=True)
class Change:
    """What became of a base on one source, in bits per byte; less is better.

    Attributes:
        source: name of the source.
        trained: False for a source that is only watched.
        windows: how many were read.
        text_bytes: UTF-8 bytes in them.
        before: of the base.
        after: of what is written.
        difference: after minus before.
        low: lower end of its 95 % interval, over windows.
        high: upper end of it.
        verdict: ``better`` or ``worse`` where the interval leaves no other, else ``unclear``.

    """

    source: str
    trained: bool
    windows: int
    text_bytes: int
    before: float
    after: float
    difference: float
    low: float
    high: float
    verdict: str

    def row(self) -> dict[str, Any]:
        """All of it for JSON; a single window has no interval."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in vars(self).items()
        }

    def __str__(self) -> str:
        return (
            f"{self.source}: {self.before:.3f} bits per byte before, {self.after:.3f} after "
            f"({self.difference:+.3f}, 95 % interval {self.low:+.3f} to {self.high:+.3f}): "
            f"{self.verdict}"
        )


def compared(before: Bits, after: Bits, held_out: Sequence[HeldOut], ratio: Ratio) -> list[Change]:
    """The change of every source, over the same windows."""
    return [_change(part, before[part.name], after[part.name], ratio) for part in held_out]


def _change(part: HeldOut, before: Floats, after: Floats, ratio: Ratio) -> Change:
    sizes = np.array(part.sizes, dtype=np.float64)
    found = ratio(after - before, sizes)
    return Change(
        source=part.name,
        trained=part.trained,
        windows=len(sizes),
        text_bytes=sum(part.sizes),
        before=float(before.sum() / sizes.sum()),
        after=float(after.sum() / sizes.sum()),
        difference=found.mean,
        low=found.low,
        high=found.high,
        verdict="worse" if found.low > 0 else "better" if found.high < 0 else "unclear",
    )
