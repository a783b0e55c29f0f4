"""Causal attention of whole rows for training on a processor, forward and backward.

Queries are read in blocks, each with the keys up to its own end, so that long rows cost half of
what the whole square would; and only the weights are kept, in the compute dtype. On rows of 512
tokens this takes a third of the time of plain products with autograd (`docs/log.md`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 256


def causal_attention(turned: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv 1706.03762) of rows side by side.

    Args:
        turned: queries and keys, shape (rows, length, heads + key heads, size).
        values: shape (rows, length, key heads, size).
        mask: 0 where a query may look, else minus infinity, in the same dtype, shape (longest,
            longest) with at least `length`.

    Returns:
        what is found, shape (rows, length, heads * size).

    """
    rows, length, kv_heads, size = values.shape
    heads = turned.shape[2] - kv_heads
    q, k = torch.split(turned.transpose(1, 2), [heads, kv_heads], dim=1)
    found: Tensor = _Causal.apply(  # type: ignore[no-untyped-call]
        q.reshape(rows * kv_heads, heads // kv_heads, length, size),
        k.reshape(rows * kv_heads, length, size),
        values.transpose(1, 2).reshape(rows * kv_heads, length, size),
        mask,
    )
    return found.view(rows, heads, length, size).transpose(1, 2).reshape(rows, length, -1)


class _Causal(torch.autograd.Function):
    """Of queries (batch, heads that share keys, length, size); keys, values (batch, length, size).

    The heads that share keys are read as if they were more queries.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        found, kept = [], []
        for own, so_far in _blocks(q):
            masked = mask[own, so_far].repeat(q.shape[1], 1)
            scores = torch.baddbmm(
                masked, _together(q, own), k[:, so_far].transpose(1, 2), alpha=scale
            )
            kept.append(torch.softmax(scores, dim=-1))
            found.append(_apart(kept[-1] @ v[:, so_far], q))
        ctx.save_for_backward(q, k, v, *kept)
        return torch.cat(found, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        (gradient,) = upstream
        for_q, for_k, for_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (own, so_far), weights in zip(_blocks(q), kept, strict=True):
            received = _together(gradient, own)
            for_weights = received @ v[:, so_far].transpose(1, 2)
            for_scores = torch._softmax_backward_data(for_weights, weights, -1, weights.dtype)
            for_q[:, :, own] = _apart(for_scores @ k[:, so_far], q)
            for_k[:, so_far].baddbmm_(for_scores.transpose(1, 2), _together(q, own))
            for_v[:, so_far].baddbmm_(weights.transpose(1, 2), received)
        scale = q.shape[-1] ** -0.5
        return for_q.mul_(scale), for_k.mul_(scale), for_v, None


def _blocks(q: Tensor) -> Iterator[tuple[slice, slice]]:
    """Of every block of queries: its places, and those of the keys that it sees."""
    length = q.shape[2]
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        yield slice(start, end), slice(0, end)


def _together(x: Tensor, own: slice) -> Tensor:
    """One block, (batch, heads * block, size)."""
    return x[:, :, own].reshape(len(x), -1, x.shape[-1])


def _apart(x: Tensor, q: Tensor) -> Tensor:
    """The reverse, (batch, heads, block, size)."""
    return x.view(len(x), q.shape[1], -1, x.shape[-1])
