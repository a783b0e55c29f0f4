"""Attention of single queries, as they come when text is written token by token on a processor.

PyTorch's fused kernel takes nine times as long in bfloat16 for one query a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BY_PRODUCTS = "metier_by_products"
"""The name under which models find `by_products`."""


def by_products(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Two plain products, of one query with all keys and of the weights with all values.

    Heads that share keys are read together, so that nothing is copied. What is more than this is
    left to the usual kernel.

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
    by_head = attention_mask is not None and attention_mask.shape[1] > 1
    more = any(others.get(name) is not None for name in ("position_bias", "softcap"))
    if queries > 1 or by_head or more:
        usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return usual(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
    shared = query.reshape(rows, key.shape[1], -1, size)
    scores = (shared @ key.transpose(2, 3)).float() * (scaling or size**-0.5)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    mixed = torch.softmax(scores, dim=-1).to(value.dtype) @ value
    return mixed.view(rows, 1, heads, -1), None


AttentionInterface.register(BY_PRODUCTS, by_products)
AttentionMaskInterface.register(BY_PRODUCTS, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
