"""Hidden states and output head of a causal language model, with or without an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
    """Longest sequence a model can read, or None where it names no limit."""
    return context_in(model.config)


def context_in(config: PretrainedConfig) -> int | None:
    """The same from a model's config."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit


def hidden_states(
    model: PreTrainedModel | PeftModel, ids: Tensor, lengths: Sequence[int]
) -> Tensor:
    """Final hidden states, shape (tokens, hidden).

    Args:
        model: any causal language model.
        ids: of rows that stand one behind the other, shape (tokens,).
        lengths: of the rows, longest first.

    """
    language_model = inner(model)
    backbone: Any = getattr(language_model, language_model.base_model_prefix)

    def read(padded: Tensor) -> Tensor:
        found: Tensor = backbone(input_ids=padded, use_cache=False).last_hidden_state
        return found

    return side_by_side(read, ids, lengths, context_of(model), at_once=is_in_parts(language_model))


def output_weight(model: PreTrainedModel | PeftModel) -> Tensor | None:
    """Weight of the output head, shape (vocabulary, hidden), when logits are just its product.

    Some families scale or cap their logits; for them the answer is None.
    """
    head = inner(model).get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        return None
    # Several tokens: that of padding may be nothing, which no scale changes.
    probe = torch.arange(min(8, len(head.weight)), device=head.weight.device)
    with torch.no_grad():
        expected = inner(model)(input_ids=probe[None], use_cache=False).logits[0]
        found = head(hidden_states(model, probe, [len(probe)]))
    return (
        head.weight
        if torch.allclose(expected.float(), found.float(), rtol=1e-3, atol=1e-3)
        else None
    )
