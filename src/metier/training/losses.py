"""Losses as pure functions. Every loss is a *sum*; the loop divides by the weight of the step.

A criterion says what logits should be, and gives its gradient with its value. So no logits are
ever kept: those of a head are made a few hundred tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Criterion = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Logits, shape (tokens, vocabulary), and which of all tokens these are, to the sum of their losses
and its gradient by the logits, in whose memory it may lie."""

# Bytes of logits at once. Above 32 MB an allocator asks the system for memory each time and gets it
# page by page: of a vocabulary of 49,152 that took more time than the products.
_BYTES, _LEAST_ROWS = 24 * 2**20, 32


def next_tokens(targets: Tensor) -> Criterion:
    """Cross-entropy, in nats, with the tokens that follow; targets has shape (tokens,)."""

    def criterion(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        wanted = targets[rows, None]
        logprobs = torch.log_softmax(logits, dim=-1)
        own = logprobs.gather(1, wanted)
        gradient = logprobs.exp_()
        return -own.sum(), gradient.scatter_add_(1, wanted, -torch.ones_like(own))

    return criterion


def other_opinion(tokens: Tensor, weights: Tensor, logprobs: Tensor) -> Criterion:
    """Kullback-Leibler divergence, in nats, from another model's opinion of the next token.

    Args:
        tokens: which next tokens are looked at, shape (tokens, some).
        weights: how much each counts, the same shape; they add up to one. Where all tokens are
            looked at with the other model's probabilities, the divergence is exact.
        logprobs: what the other model holds of each, the same shape.

    """

    def criterion(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        looked, share = tokens[rows], weights[rows].to(logits.dtype)
        all_ours = torch.log_softmax(logits, dim=-1)
        ours = all_ours.gather(1, looked)
        loss = (share * (logprobs[rows].to(logits.dtype) - ours)).sum()
        gradient = all_ours.exp_()
        return loss, gradient.scatter_add_(1, looked, -share)

    return criterion


def of_head(hidden: Tensor, weight: Tensor, criterion: Criterion) -> Tensor:
    """Sum of a criterion over the logits of an output head, without ever holding all of them.

    The gradient is made in the forward pass, a few hundred tokens at a time, so that logits stay
    in the processor's cache and nothing is computed twice.

    Args:
        hidden: shape (tokens, hidden), those that are looked at and no others.
        weight: output head, shape (vocabulary, hidden).
        criterion: of the same tokens.

    Returns:
        the sum over tokens, float32 (float64 for float64 input).

    """
    return _OfHead.apply(hidden, weight, criterion)  # type: ignore[no-any-return,no-untyped-call]


def of_logits(logits: Tensor, criterion: Criterion) -> Tensor:
    """The same of logits that are there, shape (tokens, vocabulary)."""
    return _OfLogits.apply(logits, criterion)  # type: ignore[no-any-return,no-untyped-call]


class _OfHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, criterion: Criterion) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        head = weight.to(hidden.dtype)
        train_head = ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=wide) if train_head else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        step = max(_LEAST_ROWS, _BYTES // (len(weight) * wide.itemsize))
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            loss, grad = criterion(F.linear(hidden[rows], head).to(wide), rows)
            grad = grad.to(hidden.dtype)
            total += loss
            grad_hidden[rows] = grad @ head
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[rows]
        saved = grad_weight.to(weight.dtype) if grad_weight is not None else None
        ctx.save_for_backward(grad_hidden, saved)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = upstream[0]
        for_head = grad_weight * scale.to(grad_weight.dtype) if grad_weight is not None else None
        return grad_hidden * scale.to(grad_hidden.dtype), for_head, None


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, criterion: Criterion) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        loss, gradient = criterion(logits.to(wide, copy=True), slice(0, len(logits)))
        ctx.save_for_backward(gradient.to(logits.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None
