"""Attention as plain products, as it is used where text is written on a processor.

PyTorch's fused kernel takes nine times as long in bfloat16 for one query a row. And what all rows
have in common at the start is read by all of them at once (Juravsky et al. 2024, arXiv 2402.05099):
its keys and values lie in memory once, and one product finds the scores of all rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BY_PRODUCTS = "metier_by_products"
"""The name under which models find `by_products`."""

Pair = tuple[Tensor, Tensor]
"""Keys and values of one layer, each of shape (key heads, tokens, size)."""


class Start:
    """What stands before the tokens of every row.

    Args:
        layers: its keys and values.

    """

    def __init__(self, layers: Sequence[Pair]) -> None:
        self._layers = layers
        self._reads = [0] * len(layers)
        self._passes = 0

    @property
    def length(self) -> int:
        """In tokens."""
        return self._layers[0][0].shape[1]

    @property
    def was_read(self) -> bool:
        """Whether every layer looked at it in every pass: a family may attend in its own way."""
        return all(reads == self._passes for reads in self._reads)

    def begin(self) -> None:
        """A pass begins."""
        self._passes += 1

    def of(self, module: Any) -> Pair | None:
        """What an attention layer reads; None where it is none of those that are known."""
        place: int | None = getattr(module, "layer_idx", None)
        if place is None or place >= len(self._layers):
            return None
        self._reads[place] += 1
        return self._layers[place]


_START: ContextVar[Start | None] = ContextVar("start", default=None)


@contextlib.contextmanager
def behind_start(start: Start | None) -> Iterator[None]:
    """Let `by_products` read all rows of one forward pass behind a common start."""
    if start:
        start.begin()
    token = _START.set(start)
    try:
        yield
    finally:
        _START.reset(token)


def by_products(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Two plain products, of queries with all keys and of the weights with all values.

    Heads that share keys are read together, so that nothing is copied. What is more than one query
    a row, or than new rows behind a common start, is left to the usual kernel.

    Args:
        module: the attention layer.
        query: shape (rows, heads, queries, size).
        key: shape (rows, key heads, slots, size).
        value: the same.
        attention_mask: true where a query may look, shape (rows, 1, queries, slots).
        scaling: of the products, by default the size to the power of -1/2.
        others: what the usual kernel takes besides.

    Returns:
        what is found, shape (rows, queries, heads, size), and no weights.

    """
    rows, heads, queries, size = query.shape
    start = _START.get()
    by_head = attention_mask is not None and attention_mask.shape[1] > 1
    more = any(others.get(name) is not None for name in ("position_bias", "softcap"))
    one = queries == 1 or (start and attention_mask is None and key.shape[2] == queries)
    if by_head or more or not one:
        usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return usual(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
    scale = scaling or size**-0.5
    grouped = query.reshape(rows, key.shape[1], -1, size)
    scores = _scores(grouped, key, _bias(attention_mask, query, key), scale)
    common = start.of(module) if start else None
    mixed = (
        _mix(scores, value) if common is None else _behind(common, grouped, scores, value, scale)
    )
    return mixed.view(rows, heads, queries, size).transpose(1, 2), None


def _bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """0 where a query may look, else minus infinity, shape (rows or 1, 1, queries, slots)."""
    queries, slots = query.shape[2], key.shape[2]
    if mask is None and queries > 1:  # new rows, which look to the left
        return query.new_full((1, 1, queries, slots), float("-inf")).triu(1)
    bias = query.new_zeros(1 if mask is None else len(query), 1, queries, slots)
    return bias if mask is None else bias.masked_fill_(~mask, float("-inf"))


def _scores(grouped: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Of queries of the heads that share keys, (rows, key heads, n, size): (..., n, slots)."""
    rows, kv_heads, n, _ = grouped.shape
    spread = bias.expand(rows, kv_heads, -1, -1).repeat(1, 1, n // bias.shape[2], 1)
    found = torch.baddbmm(
        spread.flatten(0, 1),
        grouped.flatten(0, 1),
        key.flatten(0, 1).transpose(1, 2),
        alpha=scale,
    )
    return found.view(rows, kv_heads, n, -1)


def _mix(scores: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1) @ value


def _behind(common: Pair, grouped: Tensor, scores: Tensor, value: Tensor, scale: float) -> Tensor:
    """The same where every row also sees a common start, which is read for all rows at once."""
    keys, values = common
    rows, kv_heads, n, size = grouped.shape
    together = grouped.transpose(0, 1).reshape(kv_heads, rows * n, size)
    first = (together @ keys.transpose(1, 2)).mul_(scale).view(kv_heads, rows, n, -1)
    weights = torch.softmax(torch.cat((first.transpose(0, 1), scores), dim=-1), dim=-1)
    at_start, own = torch.split(weights, [keys.shape[1], scores.shape[-1]], dim=-1)
    seen = at_start.transpose(0, 1).reshape(kv_heads, rows * n, -1) @ values
    return own @ value + seen.view(kv_heads, rows, n, size).transpose(0, 1)


AttentionInterface.register(BY_PRODUCTS, by_products)
AttentionMaskInterface.register(BY_PRODUCTS, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
