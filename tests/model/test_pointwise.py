"""The parts of a layer that look at each number alone, against plain operations of PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from metier.model.pointwise import rms_norm, rotate, swiglu

TOKENS = 5


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def angles() -> tuple[Tensor, Tensor]:
    angle = torch.randn(TOKENS, 1, 4, dtype=torch.float64)
    return angle.cos(), angle.sin()


def swiglu_by_parts(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate_by_transformers(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    whole = (torch.cat((part, part), -1).transpose(0, 1) for part in (cos, sin))
    batch = x.transpose(0, 1)[None]
    turned, _ = apply_rotary_pos_emb(batch, batch, *whole)
    found: Tensor = turned[0].transpose(0, 1)
    return found


CASES = {
    "norm": (
        lambda x, weight: rms_norm(x, weight, 1e-5),
        lambda x, weight: F.rms_norm(x, (6,), weight, 1e-5),
        ((TOKENS, 6), (6,)),
    ),
    "rotate": (
        lambda x: rotate(x, *angles()),
        lambda x: rotate_by_transformers(x, *angles()),
        ((TOKENS, 3, 8),),
    ),
    "swiglu": (swiglu, swiglu_by_parts, ((TOKENS, 12),)),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_plain_operations(name: str) -> None:
    ours, plain, shapes = CASES[name]
    given = [random(*shape) for shape in shapes]

    def gradients(function: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(1)
        found = function(*given)
        weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
        return [found, *torch.autograd.grad((found * weights).sum(), given)]

    torch.testing.assert_close(gradients(ours), gradients(plain), rtol=1e-12, atol=1e-12)


def test_a_norm_in_bfloat16_is_computed_in_float32() -> None:
    """Oracle: Llama's own norm, whose last product alone is in bfloat16."""
    x = torch.randn(64, 96).bfloat16()
    theirs = LlamaRMSNorm(96, eps=1e-5)
    found = rms_norm(x, theirs.weight, 1e-5)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, theirs(x.float()).bfloat16())


def test_a_frozen_weight_costs_nothing() -> None:
    x, weight = random(TOKENS, 6), torch.ones(6, dtype=torch.float64)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
