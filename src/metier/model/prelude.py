"""What stands before every row that a model reads: keys and values of virtual tokens.

Prefix tuning (Li and Liang 2021, arXiv 2101.00190) learns them; prompt tuning (Lester et al. 2021,
arXiv 2104.08691) learns embeddings, which are read into them: no token looks at what stands behind
it, so virtual tokens that are read once are what they would be before each row. All other models
have none.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import Cache, DynamicCache


def virtual_tokens(model: Any) -> int:
    """How many tokens stand before every row; 0 but for prompt and prefix tuning."""
    config = getattr(model, "peft_config", {}).get("default")
    return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0


def prelude(model: Any) -> Cache | None:
    """Cache of the virtual tokens for `repeated`, or None; gradients flow into what is learned."""
    if not virtual_tokens(model):
        return None
    given: Any = model.get_prompt(batch_size=1)
    cache = DynamicCache()
    if isinstance(given, Cache):
        layers: Any = given.layers
        for number, layer in enumerate(layers):
            cache.update(layer.keys, layer.values, number)
        return cache
    language_model = model.get_base_model()
    embedded = given.to(language_model.get_input_embeddings().weight.dtype)
    backbone = getattr(language_model, language_model.base_model_prefix)
    read: Cache = backbone(
        inputs_embeds=embedded, past_key_values=cache, use_cache=True
    ).past_key_values
    return read


def repeated(cache: Any, rows: int) -> Any:
    """A cache of one row seen by several; reading on copies it, so it can be used again."""
    seen = copy.copy(cache)
    seen.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in seen.layers:
        layer.keys = layer.keys.expand(rows, -1, -1, -1)
        layer.values = layer.values.expand(rows, -1, -1, -1)
    return seen


def behind(cache: Any, rows: int) -> dict[str, Any]:
    """Arguments of a forward pass that let rows be read behind a cache of one row, or None."""
    if cache is None:
        return {"use_cache": False}
    return {"past_key_values": repeated(cache, rows), "use_cache": True}
