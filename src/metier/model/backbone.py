"""Hidden states and output head of a language model, with or without an adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metier.errors import ModelError
from metier.model import encoder
from metier.model.prelude import behind, prelude, virtual_tokens
from metier.model.rows import side_by_side
from metier.model.world import is_in_parts

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel


def inner(model: PreTrainedModel | PeftModel) -> Any:
    """The Transformers model, adapter layers inside it included."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(model, "peft_config") else model


def context_of(model: Any) -> int | None:
    """Longest sequence a model can read, or None where it names no limit.

    Virtual tokens take their places first.
    """
    limit = context_in(model.config)
    if limit is None:
        return None
    if encoder.is_encoder(model.config):
        return limit - encoder.first_position(model)
    return limit - virtual_tokens(model)


def context_in(config: PretrainedConfig) -> int | None:
    """The same from the config of a base."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit


def decoder_layers(model: PreTrainedModel | PeftModel) -> tuple[str, torch.nn.ModuleList]:
    """The layers of a language model in their order, and the name of their list.

    Raises:
        ModelError: the model has no list of as many layers as its config names.

    """
    count = model.config.get_text_config().num_hidden_layers
    for name, module in inner(model).named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return name, module
    raise ModelError(
        type(inner(model)).__name__, f"has no list of {count} layers", "choose another base"
    )


def hidden_states(
    model: PreTrainedModel | PeftModel, ids: Tensor, lengths: Sequence[int]
) -> Tensor:
    """Final hidden states, shape (tokens, hidden).

    Args:
        model: any causal language model, or an encoder.
        ids: of rows that stand one behind the other, shape (tokens,).
        lengths: of the rows, longest first.

    """
    language_model = inner(model)
    backbone: Any = language_model.base_model
    context, at_once = context_of(model), is_in_parts(language_model)
    if encoder.is_encoder(language_model.config):
        both_ways = partial(encoder.read, backbone)
        return side_by_side(both_ways, encoder.marked(ids), lengths, context, at_once=at_once)
    before = prelude(model)

    def read(padded: Tensor) -> Tensor:
        past = behind(before, len(padded))
        found: Tensor = backbone(input_ids=padded, **past).last_hidden_state
        return found

    return side_by_side(read, ids, lengths, context, at_once=at_once)


def output_weight(model: PreTrainedModel | PeftModel) -> Callable[[], Tensor] | None:
    """The weight of the output head, when logits are just its product.

    Returns:
        a function that gives it as it is now, shape (vocabulary, hidden): rows of new tokens are
        put into it anew each time. None for families that scale or cap their logits.

    """
    head = inner(model).get_output_embeddings()
    bare = getattr(head, "original_module", head)  # beneath rows of new tokens
    if not isinstance(bare, torch.nn.Linear) or bare.bias is not None:
        return None
    # Several tokens: that of padding may be nothing, which no scale changes.
    probe = torch.arange(min(8, len(bare.weight)), device=bare.weight.device)
    with torch.no_grad():
        expected = inner(model)(input_ids=probe[None], **behind(prelude(model), 1)).logits[0]
        found = head(hidden_states(model, probe, [len(probe)]))
    if not torch.allclose(expected.float(), found.float(), rtol=1e-3, atol=1e-3):
        return None
    return lambda: head.weight
