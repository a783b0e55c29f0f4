"""New tokens for a base: its tokenizer knows them, its embeddings have rows for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metier.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from metier.model.load import Base

_TOKENIZER = "tokenizer.json"


def add_tokens(base: Base, tokens: Sequence[str]) -> Base:
    """A base with new tokens; its model is changed in place.

    Their rows, in the embeddings and in an output head of its own, start at the mean of all others
    (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"): a new token
    is then no likelier than the others are on average. No other row changes.

    Raises:
        ConfigError: one is a token already.

    """
    known = base.tokenizer.vocab_size
    tokenizer = base.tokenizer.extended(tokens)
    _grow(base.model, tokenizer.vocab_size)
    with torch.no_grad():
        for weight in _rows(base.model):
            mean = weight[:known].float().mean(0)
            weight[known : tokenizer.vocab_size] = mean.to(weight.dtype)
    return replace(base, tokenizer=tokenizer)


def with_tokens_of(base: Base, directory: Path) -> Base:
    """A base with the tokenizer that lies beside an adapter, where that learned new tokens.

    Its model gets rows for them in place; what stands there comes with the adapter.
    """
    if not (directory / _TOKENIZER).is_file():
        return base
    encoder = base.tokenizer.frame is not None
    tokenizer = Tokenizer.load(directory, base.tokenizer.stop_ids, encoder=encoder)
    _grow(base.model, tokenizer.vocab_size)
    return replace(base, tokenizer=tokenizer)


def _grow(model: PreTrainedModel, rows: int) -> None:
    """Give the embeddings at least so many rows; some models have more than tokens already."""
    if rows > len(_rows(model)[0]):
        model.resize_token_embeddings(rows, mean_resizing=False)


def _rows(model: PreTrainedModel) -> list[Any]:
    """Weights and biases with one row for each token; those that are tied once."""
    language_model: Any = model
    embeddings, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    found = [embeddings.weight, getattr(head, "weight", None), getattr(head, "bias", None)]
    return list({id(rows): rows for rows in found if rows is not None}.values())
