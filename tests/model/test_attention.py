"""Attention by plain products is what the usual kernel computes."""

from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from metier.model.attention import Start, behind_start, by_products


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


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("queries", [1, 5])
def test_a_common_start_is_read_as_if_it_stood_in_every_row(kv_heads: int, queries: int) -> None:
    query = torch.randn(4, 6, queries, 8)
    key, value = torch.randn(2, 4, kv_heads, queries, 8)
    start_key, start_value = torch.randn(2, kv_heads, 7, 8)
    start = Start([(start_key, start_value)])
    module = SimpleNamespace(num_key_value_groups=6 // kv_heads, layer_idx=0, is_causal=False)
    with behind_start(start):
        ours = by_products(module, query, key, value, None)[0]
    assert start.was_read
    whole = [
        torch.cat((first.expand(4, -1, -1, -1), own), dim=2)
        for first, own in ((start_key, key), (start_value, value))
    ]
    mask = torch.ones(queries, 7 + queries, dtype=torch.bool).tril(7)[None, None]
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    theirs = usual(module, query, *whole, mask.expand(4, -1, -1, -1))[0]
    assert torch.allclose(ours, theirs, atol=1e-6)
    alone = usual(module, query, key, value, mask[..., 7:].expand(4, -1, -1, -1))[0]
    assert not torch.allclose(ours, alone, atol=1e-2), "control: the start matters"


def test_a_start_that_a_layer_passed_over_is_told() -> None:
    tensors = torch.randn(3, 4, 6, 1, 8)
    start = Start([(torch.randn(6, 7, 8), torch.randn(6, 7, 8))] * 2)
    for layers, complete in (((0, 1), True), ((0,), False), ((1, 7), False)):
        with behind_start(start):
            for place in layers:
                by_products(SimpleNamespace(layer_idx=place), *tensors, None)
        assert start.was_read == complete
        start = Start([(torch.randn(6, 7, 8), torch.randn(6, 7, 8))] * 2)
