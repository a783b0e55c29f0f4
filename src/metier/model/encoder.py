"""Encoders: models that read a text in both directions and write none (BERT, ModernBERT, MiniLM).

Every token looks at all others of its row, so padding must be kept from them: rows are read with
an attention mask, and a family that looks at padding all the same is refused when it is loaded.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from metier.errors import ModelError

_PROBED = 8
# Rounding in bfloat16 moves hidden states by about a hundredth; padding that is read, by tenths.
_ROUNDING = 0.05


def is_encoder(config: Any) -> bool:
    """Whether a config is that of an encoder: trained on masked words, and not set to write."""
    from transformers import AutoModelForMaskedLM

    known: Any = AutoModelForMaskedLM._model_mapping
    writes = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    return type(config) in known and not writes


def encoder_class(config: Any) -> tuple[Any, dict[str, Any]]:
    """The class of an encoder without any head, and what it is to be built with."""
    from transformers import AutoModel

    known: Any = AutoModel._model_mapping
    found = known[type(config)]
    kind = found[0] if isinstance(found, tuple) else found
    # BERT's pooler reads the first token alone; it is of no use here, and some bases lack it.
    pools = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return kind, {"add_pooling_layer": False} if pools else {}


def marked(ids: Tensor) -> Tensor:
    """Ids, shape (tokens,), each with a one behind it, (tokens, 2): padding will have a zero."""
    return torch.stack((ids, torch.ones_like(ids)), -1)


def read(model: Any, padded: Tensor) -> Tensor:
    """Final hidden states, shape (rows, length, hidden), of `marked` ids, (rows, length, 2)."""
    ids, mask = padded.unbind(-1)
    found: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return found


def first_position(model: Any) -> int:
    """Places of the table of positions that no token gets: RoBERTa's kin count behind padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


@torch.inference_mode()
def check_padding(model: Any, place: str) -> None:
    """Refuse an encoder that reads a row otherwise where padding stands behind it.

    Raises:
        ModelError: it does, or it wants more than ids and a mask.

    """
    row = marked(torch.arange(_PROBED, device=model.device))[None]
    try:
        alone = read(model, row)[0].float()
        beside = read(model, torch.cat((row, torch.zeros_like(row)), 1))[0, :_PROBED].float()
    except Exception as error:  # whatever a family of its own kind raises
        cause = f"does not read rows of ids under a mask ({str(error).splitlines()[0]})"
        raise ModelError(place, cause, "choose another encoder") from None
    if not (beside - alone).norm() < _ROUNDING * alone.norm():
        raise ModelError(
            place,
            f"is a {model.config.model_type} model, which looks at padding behind a text, so that "
            "answers would depend on what else is asked",
            "choose another encoder",
        )
