"""Rows to optimiser steps: a random draw per step, cut into micro-batches.

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

_NONE = -1


@dataclass(frozen=True, slots=True)
class Row:
    """One training example as ids, at least two of them unless it has a label or tags.

    Attributes:
        ids: shape (length,).
        trained: which ids the loss looks at.
        label: for a classification head: the place of the label, or where a row may have several,
            a 1 or a 0 for each; else -1.
        tags: class of each id for a tagging head, -1 where it has none; else empty.

    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    label: int | tuple[int, ...] = _NONE
    tags: tuple[int, ...] = ()

    @property
    def labelled(self) -> bool:
        """Whether a classification head is trained on it."""
        return self.label != _NONE

    @classmethod
    def of(cls, rendered: Rendered) -> Row:
        """Row of a rendered example."""
        return cls(rendered.ids, rendered.trained)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows one behind the other, longest first.

    Attributes:
        ids: what is read, shape (tokens,): of a labelled or tagged row all, else all but its last
            token.
        lengths: tokens that are read of each row.
        targets: the next token where it is trained, or the tag, else -1; shape (tokens,).
        labels: of the rows, shape (rows,), or where there may be several, (rows, labels).
        weight: trained tokens or tags, or rows where a classification head is trained.
        tokens: of the rows, for speed figures.

    """

    ids: Tensor
    lengths: tuple[int, ...]
    targets: Tensor
    labels: Tensor
    weight: float
    tokens: int

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Batch:
        """Batch of rows that are sorted, longest first, and all of one kind."""
        read = [_read(row) for row in rows]
        targets = torch.tensor([target for _, found in read for target in found])
        labels = torch.tensor([row.label for row in rows])
        return cls(
            ids=torch.tensor([token for ids, _ in read for token in ids]),
            lengths=tuple(len(ids) for ids, _ in read),
            targets=targets,
            labels=labels,
            weight=float(sum(row.labelled for row in rows) or (targets >= 0).sum()),
            tokens=sum(len(row.ids) for row in rows),
        )

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return replace(
            self,
            ids=self.ids.to(device),
            targets=self.targets.to(device),
            labels=self.labels.to(device),
        )


def _read(row: Row) -> tuple[Sequence[int], Sequence[int]]:
    """What is read of a row, and what each of its tokens is to tell."""
    if row.labelled:
        return row.ids, [_NONE] * len(row.ids)
    if row.tags:
        return row.ids, row.tags
    following = zip(row.ids[1:], row.trained[1:], strict=True)
    return row.ids[:-1], [token if trained else _NONE for token, trained in following]


def cut(rows: Sequence[Row], budget: int) -> list[Batch]:
    """Sort rows by length and cut them into batches of at most `budget` tokens.

    One row may be longer.
    """
    batches: list[list[Row]] = []
    room = 0
    for row in sorted(rows, key=lambda row: len(row.ids), reverse=True):
        if not batches or len(row.ids) > room:
            batches.append([])
            room = budget
        batches[-1].append(row)
        room -= len(row.ids)
    return [Batch.of(batch) for batch in batches]


class RowBatches:
    """The steps of several passes over rows.

    Args:
        rows: the training part.
        step_rows: rows of one optimiser step.
        micro_tokens: tokens of one micro-batch, at most (one row may be longer).
        seed: of the order.

    """

    def __init__(
        self, rows: Sequence[Row], *, step_rows: int, micro_tokens: int, seed: int
    ) -> None:
        self._rows, self._micro, self._seed = rows, micro_tokens, seed
        self.steps_per_epoch = math.ceil(len(rows) / step_rows)
        self._order: tuple[int, list[int]] = (-1, [])

    def step(self, index: int) -> list[Batch]:
        """Micro-batches of step `index`: an equal share of a pass's random order."""
        epoch, place = divmod(index, self.steps_per_epoch)
        order = self._epoch_order(epoch)
        start = place * len(order) // self.steps_per_epoch
        end = (place + 1) * len(order) // self.steps_per_epoch
        return cut([self._rows[i] for i in order[start:end]], self._micro)

    def _epoch_order(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            order = torch.randperm(len(self._rows), generator=generator).tolist()
            self._order = (epoch, order)
        return self._order[1]
