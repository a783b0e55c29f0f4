"""Rows to optimiser steps: a random draw per step, cut into micro-batches of similar lengths.

Which rows a step holds is a function of (seed, step) alone. Inside a step, rows are sorted by
length and cut by a budget of tokens; since the loss is a sum over the whole step, the cut changes
speed and memory, never the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metier.text.template import Rendered

# Matrix libraries set up and keep work space for every new shape, so shapes are kept few.
_ROUND = 16
# What a micro-batch costs besides its tokens, in tokens: measured on a processor with the starter.
_BATCH_COST = 100


@dataclass(frozen=True, slots=True)
class Row:
    """One training example as ids.

    Attributes:
        ids: shape (length,).
        trained: which ids the loss looks at.
        label: class for a classification head, else -1.

    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    label: int = -1

    @classmethod
    def of(cls, rendered: Rendered) -> Row:
        """Row of a rendered example."""
        return cls(rendered.ids, rendered.trained)


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Rows padded on the right, where causal attention never looks.

    Attributes:
        ids: shape (rows, length).
        trained: shape (rows, length), never true on padding or in the first column.
        lengths: shape (rows,).
        labels: shape (rows,).
        weight: trained tokens, or rows where a head is trained.
        tokens: real tokens.

    """

    ids: Tensor
    trained: Tensor
    lengths: Tensor
    labels: Tensor
    weight: float
    tokens: int

    def to(self, device: torch.device) -> PaddedBatch:
        """The batch on a device."""
        return replace(
            self,
            ids=self.ids.to(device),
            trained=self.trained.to(device),
            lengths=self.lengths.to(device),
            labels=self.labels.to(device),
        )


def _padded(length: int) -> int:
    return math.ceil(length / _ROUND) * _ROUND


def pad(rows: Sequence[Row], pad_id: int) -> PaddedBatch:
    """Put rows into one batch, its length rounded up."""
    lengths = torch.tensor([len(row.ids) for row in rows])
    longest = _padded(int(lengths.max()))
    ids = torch.full((len(rows), longest), pad_id)
    trained = torch.zeros(ids.shape, dtype=torch.bool)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = torch.tensor(row.ids)
        trained[place, : len(row.ids)] = torch.tensor(row.trained)
    labels = torch.tensor([row.label for row in rows])
    weight = float(len(rows)) if bool((labels >= 0).all()) else float(trained.sum())
    return PaddedBatch(ids, trained, lengths, labels, weight, int(lengths.sum()))


def cut(rows: Sequence[Row], budget: int, pad_id: int) -> list[PaddedBatch]:
    """Sort rows by length and cut them into batches of at most `budget` padded tokens."""
    ordered = sorted(rows, key=lambda row: len(row.ids), reverse=True)
    places = cheapest_cut([_padded(len(row.ids)) for row in ordered], budget)
    return [pad(ordered[start:end], pad_id) for start, end in places]


def cheapest_cut(lengths: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Where to cut rows, longest first, so that all batches together take the least time.

    A batch takes its padded tokens, at most `budget` unless it is one row, and a little more: many
    batches waste time, few batches waste padding.
    """
    cost, begin = [0], [0]  # of the first n rows at their best, and where their last batch begins
    for end in range(1, len(lengths) + 1):
        fitting = [(cost[end - 1] + lengths[end - 1], end - 1)]
        for start in range(end - 2, -1, -1):
            if (end - start) * lengths[start] > budget:
                break
            fitting.append((cost[start] + (end - start) * lengths[start], start))
        least, start = min(fitting)
        cost.append(least + _BATCH_COST)
        begin.append(start)
    places, end = [], len(lengths)
    while end:
        places.append((begin[end], end))
        end = begin[end]
    return places[::-1]


class RowBatches:
    """The steps of several passes over rows.

    Args:
        rows: the training part.
        step_rows: rows of one optimiser step.
        micro_tokens: padded tokens of one micro-batch, at most (one row may be longer).
        seed: of the order.
        pad_id: id to pad with.

    """

    def __init__(
        self, rows: Sequence[Row], *, step_rows: int, micro_tokens: int, seed: int, pad_id: int
    ) -> None:
        self._rows, self._micro, self._seed, self._pad = rows, micro_tokens, seed, pad_id
        self.steps_per_epoch = math.ceil(len(rows) / step_rows)
        self._order: tuple[int, list[int]] = (-1, [])

    def step(self, index: int) -> list[PaddedBatch]:
        """Micro-batches of step `index`: an equal share of a pass's random order."""
        epoch, place = divmod(index, self.steps_per_epoch)
        order = self._epoch_order(epoch)
        start = place * len(order) // self.steps_per_epoch
        end = (place + 1) * len(order) // self.steps_per_epoch
        return cut([self._rows[i] for i in order[start:end]], self._micro, self._pad)

    def _epoch_order(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            order = torch.randperm(len(self._rows), generator=generator).tolist()
            self._order = (epoch, order)
        return self._order[1]
