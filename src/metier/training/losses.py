"""Losses as pure functions. Every loss is a *sum*; the loop divides by the weight of the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS = 512


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of next-token cross-entropies through an output head, without ever holding all logits.

    The gradient is made in the forward pass, a few hundred rows at a time, so that logits stay in
    the processor's cache and nothing is computed twice.

    Args:
        hidden: shape (rows, hidden), the positions that are trained and no others.
        weight: output head, shape (vocabulary, hidden).
        targets: next tokens, shape (rows,).

    Returns:
        the sum over rows, in nats, float32 (float64 for float64 input).

    """
    return _LinearCrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-any-return,no-untyped-call]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        head = weight.to(hidden.dtype)
        train_head = ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=wide) if train_head else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, len(hidden), _ROWS):
            rows = slice(start, start + _ROWS)
            loss, grad = _cross_entropy(F.linear(hidden[rows], head).to(wide), targets[rows])
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


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax at the targets, and its gradient by the logits (in place of them)."""
    picked = logits.gather(1, targets[:, None]).squeeze(1)
    normaliser = torch.logsumexp(logits, dim=-1)
    loss = (normaliser - picked).sum()
    gradient = logits.sub_(normaliser[:, None]).exp_()
    gradient[torch.arange(len(targets), device=targets.device), targets] -= 1
    return loss, gradient
