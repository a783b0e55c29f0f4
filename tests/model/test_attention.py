"""Attention by plain products is what the usual kernel computes."""

from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from metier.model.attention import by_products


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize(("queries", "others"), [(1, {}), (3, {}), (1, {"position_bias": 1.0})])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("masks", [1, 6])
def test_equals_the_usual_kernel(
    kv_heads: int, queries: int, others: dict[str, float], scaling: float | None, masks: int
) -> None:
    query = torch.randn(4, 6, queries, 8)
    key, value = torch.randn(2, 4, kv_heads, 9, 8)
    mask = torch.rand(4, masks, queries, 9) < 0.7
    mask[..., 0] = True
    found = {name: torch.randn(4, 6, queries, 9) * size for name, size in others.items()}
    module = SimpleNamespace(num_key_value_groups=6 // kv_heads)
    ours = by_products(module, query, key, value, mask, scaling=scaling, **found)[0]
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    theirs = usual(module, query, key, value, mask, scaling=scaling, **found)[0]
    assert ours.shape == theirs.shape == (4, queries, 6, 8)
    assert torch.allclose(ours, theirs, atol=1e-6)
