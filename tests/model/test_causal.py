"""Attention with its written-out backward, against PyTorch's own with autograd."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from metier.model.causal import causal_attention


@pytest.mark.parametrize("length", [1, 7, 256, 257, 600])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_equals_the_usual_attention_forward_and_backward(length: int, kv_heads: int) -> None:
    torch.manual_seed(length)
    rows, heads, size = 2, 4, 6
    turned = torch.randn(rows, length, heads + kv_heads, size, dtype=torch.float64)
    values = torch.randn(rows, length, kv_heads, size, dtype=torch.float64)
    probe = torch.randn(rows, length, heads * size, dtype=torch.float64)
    turned.requires_grad_(), values.requires_grad_()

    q, k = turned.transpose(1, 2).split([heads, kv_heads], dim=1)
    usual = F.scaled_dot_product_attention(
        q, k, values.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    expected = usual.transpose(1, 2).flatten(2)
    gradients = torch.autograd.grad((expected * probe).sum(), (turned, values))

    mask = torch.full((length + 3, length + 3), float("-inf"), dtype=torch.float64).triu(1)
    found = causal_attention(turned, values, mask)
    assert torch.allclose(found, expected, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad((found * probe).sum(), (turned, values)), gradients, strict=True
    ):
        assert torch.allclose(one, other, atol=1e-11)


def test_in_bfloat16_it_rounds_as_little_as_plain_products() -> None:
    torch.manual_seed(0)
    turned, values = torch.randn(2, 300, 8, 64), torch.randn(2, 300, 4, 64)
    mask = torch.full((300, 300), float("-inf")).triu(1)
    exact = causal_attention(turned.double(), values.double(), mask.double())
    found = causal_attention(turned.bfloat16(), values.bfloat16(), mask.bfloat16())

    q, k, v = (t.bfloat16().transpose(1, 2) for t in (*turned.split([4, 4], dim=2), values))
    plain = torch.softmax((q @ k.transpose(2, 3)).float() / 8 + mask, dim=-1).bfloat16() @ v
    plain = plain.transpose(1, 2).flatten(2)
    errors = [(x.double() - exact).norm() / exact.norm() for x in (found, plain)]
    assert errors[0] < 1.1 * errors[1]
    assert errors[1] > 1e-3, "control: there is something to round"
