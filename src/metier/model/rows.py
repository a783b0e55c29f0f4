"""Rows of tokens of different lengths, one behind the other.

Layers that look at each token alone read such rows as they lie, without any padding. What looks
along a row, attention or a whole model, reads them side by side in groups of similar lengths,
padded on the right, where causal attention never looks and encoders are kept from looking
(`encoder.marked`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Matrix libraries set up and keep work space for every new shape, so shapes are kept few: lengths
# are multiples of the first number, with at most the second to each doubling.
_ROUND, _PER_DOUBLING = 8, 8
# What a group costs besides its tokens, in tokens: measured on a processor with the starter.
_GROUP_COST = 100


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are read side by side.

    Attributes:
        tokens: how many real ones it has.
        rows: how many.
        length: of each, padding included.
        places: of the real tokens among the padded ones, shape (tokens,); None where there is no
            padding.

    """

    tokens: int
    rows: int
    length: int
    places: Tensor | None

    def spread(self, own: Tensor) -> Tensor:
        """Values of its tokens, shape (tokens, ...), to those of its rows, (rows, length, ...)."""
        if self.places is not None:
            own = _Spread.apply(own, self.places, self.rows * self.length)  # type: ignore[no-untyped-call]
        return own.reshape(self.rows, self.length, *own.shape[1:])

    def gather(self, rows: Tensor) -> Tensor:
        """Values of its rows, shape (rows, length, ...), to those of its real tokens."""
        flat = rows.reshape(-1, *rows.shape[2:])
        if self.places is None:
            return flat
        return _Gather.apply(flat, self.places)  # type: ignore[no-any-return,no-untyped-call]


def groups(
    lengths: Sequence[int],
    device: torch.device,
    context: int | None = None,
    *,
    at_once: bool = False,
) -> list[Group]:
    """The groups in which rows are read.

    Args:
        lengths: of the rows in their order, longest first, so that similar ones are neighbours.
        device: of the tokens.
        context: what a padded row may have at most, if anything.
        at_once: all rows in one group, whatever padding it takes.

    Raises:
        ValueError: the lengths are not sorted.

    """
    if any(before < after for before, after in pairwise(lengths)):
        raise ValueError("rows must stand longest first")
    found = []
    rounded = [min(padded(length), context or padded(length)) for length in lengths]
    for first, last in [(0, len(lengths))] if at_once else cheapest_cut(rounded):
        own, length = lengths[first:last], rounded[first]
        tokens, places = sum(own), None
        if tokens < len(own) * length:
            each = [torch.arange(n) + place * length for place, n in enumerate(own)]
            places = torch.cat(each).to(device)
        found.append(Group(tokens, len(own), length, places))
    return found


def parted(values: Tensor, parts: Sequence[Group]) -> tuple[Tensor, ...]:
    """Values of all tokens, shape (tokens, ...), group by group, without what is behind them."""
    sizes = [group.tokens for group in parts]
    return torch.split(values, [*sizes, len(values) - sum(sizes)])[:-1]


def side_by_side(
    read: Callable[[Tensor], Tensor],
    ids: Tensor,
    lengths: Sequence[int],
    context: int | None,
    wanted: Tensor | None = None,
    *,
    at_once: bool = False,
) -> Tensor:
    """What a function of padded ids, shape (rows, length), gives for rows, group by group.

    Args:
        read: gives a value for every token, shape (rows, length, ...).
        ids: of all rows, shape (tokens, ...).
        lengths: of the rows, longest first.
        context: what `read` takes at most as length, if there is a limit.
        wanted: whose values are returned, shape (tokens,); by default all.
        at_once: call `read` once, whatever padding it takes.

    Returns:
        the values of the wanted tokens, shape (tokens, ...).

    """
    found = []
    parts = groups(lengths, ids.device, context, at_once=at_once)
    looked = [None] * len(parts) if wanted is None else parted(wanted, parts)
    for group, own, kept in zip(parts, parted(ids, parts), looked, strict=True):
        values = group.gather(read(group.spread(own)))
        found.append(values if kept is None else values[kept])
    return torch.cat(found)


def cheapest_cut(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Where to cut rows, longest first, so that all groups together take the least time.

    A group takes its padded tokens and a little more: many groups waste time, few waste padding.
    """
    # Rows of one length are never parted.
    steps = [n for n in range(1, len(lengths)) if lengths[n] != lengths[n - 1]]
    # By the number of first rows: their least cost, and where their last group begins.
    best = {0: (0, 0)}
    for end in [*steps, len(lengths)]:
        cost, start = min(
            (before + (end - start) * lengths[start], start) for start, (before, _) in best.items()
        )
        best[end] = cost + _GROUP_COST, start
    places, end = [], len(lengths)
    while end:
        start = best[end][1]
        places.append((start, end))
        end = start
    return places[::-1]


def padded(length: int) -> int:
    """The length, rounded up by at most an eighth or to a multiple of 8."""
    doubling = 1 << max(length, 1).bit_length() - 1
    step = max(_ROUND, doubling // _PER_DOUBLING)
    return math.ceil(length / step) * step


class _Spread(torch.autograd.Function):
    """Put tokens at their places among padding, which is zero."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        padded = tokens.new_zeros(size, *tokens.shape[1:])
        return padded.index_copy_(0, places, tokens)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return upstream[0].index_select(0, places), None, None


class _Gather(torch.autograd.Function):
    """Take tokens from their places; padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(padded)
        return padded.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        (gradient,) = upstream
        padded = gradient.new_zeros(ctx.size, *gradient.shape[1:])
        return padded.index_copy_(0, places, gradient), None
