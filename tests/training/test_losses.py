from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metier.training.losses import Criterion, next_tokens, of_head, of_logits, other_opinion

VOCABULARY = 31


def cross_entropy(rows: int) -> tuple[Criterion, Callable[[Tensor], Tensor]]:
    targets = torch.randint(0, VOCABULARY, (rows,))
    return next_tokens(targets), lambda z: F.cross_entropy(z, targets, reduction="sum")


def divergence(rows: int) -> tuple[Criterion, Callable[[Tensor], Tensor]]:
    """All tokens are looked at, in some order, one of them as two halves."""
    teacher = torch.log_softmax(2 * torch.randn(rows, VOCABULARY, dtype=torch.float64), dim=-1)
    order = torch.randperm(VOCABULARY)
    looked = torch.cat([order, order[:1]])[None].expand(rows, -1)
    logprobs = teacher.gather(1, looked)
    weights = logprobs.exp()
    weights[:, [0, -1]] /= 2
    return (
        other_opinion(looked, weights, logprobs),
        lambda z: F.kl_div(z.log_softmax(-1), teacher, reduction="sum", log_target=True),
    )


@pytest.mark.parametrize("rows", [1, 7, 512, 1100])
@pytest.mark.parametrize("kind", [cross_entropy, divergence])
def test_value_and_gradients_equal_those_of_autograd(
    rows: int, kind: Callable[[int], tuple[Criterion, Callable[[Tensor], Tensor]]]
) -> None:
    torch.manual_seed(rows)
    hidden = torch.randn(rows, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCABULARY, 12, dtype=torch.float64, requires_grad=True)
    criterion, oracle = kind(rows)
    expected = oracle(hidden @ weight.t())
    gradients = torch.autograd.grad(3 * expected, (hidden, weight))
    for found in (of_head(hidden, weight, criterion), of_logits(hidden @ weight.t(), criterion)):
        assert found.item() == pytest.approx(expected.item(), abs=1e-7)
        for ours, theirs in zip(
            torch.autograd.grad(3 * found, (hidden, weight)), gradients, strict=True
        ):
            assert (ours - theirs).abs().max() < 1e-7


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden = torch.randn(5, 4, requires_grad=True)
    weight = torch.randn(9, 4)
    of_head(hidden, weight, next_tokens(torch.arange(5))).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_logits_stay_as_they_are() -> None:
    logits = torch.randn(5, 9)
    before = logits.clone()
    of_logits(logits, next_tokens(torch.arange(5)))
    assert torch.equal(logits, before)
