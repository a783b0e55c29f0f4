"""Sums of a criterion over some tokens of rows, by the quickest way a model allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from metier.model.backbone import context_of, inner, output_weight
from metier.model.rows import side_by_side
from metier.training.forward import forward_of, mixed_precision
from metier.training.losses import Criterion, of_head, of_logits

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Scorer = Callable[[Tensor, Sequence[int], Tensor, Criterion], Tensor]
"""Ids of rows one behind the other, shape (tokens,), their lengths, longest first, which tokens
count, shape (tokens,), and a criterion of those, to its sum."""


def scorer(model: PreTrainedModel | PeftModel) -> Scorer:
    """What gives sums of criteria over a model's logits, made only for the tokens that count."""
    weight = output_weight(model)
    if weight is None:
        return _scorer_of_logits(model)
    forward = forward_of(model)

    def score(ids: Tensor, lengths: Sequence[int], wanted: Tensor, criterion: Criterion) -> Tensor:
        return of_head(forward(ids, lengths)[wanted], weight, criterion)

    return score


def _scorer_of_logits(model: PreTrainedModel | PeftModel) -> Scorer:
    """The same for a family whose logits are not just a product with the head."""

    def read(padded: Tensor) -> Tensor:
        found: Tensor = inner(model)(input_ids=padded, use_cache=False).logits
        return found

    def score(ids: Tensor, lengths: Sequence[int], wanted: Tensor, criterion: Criterion) -> Tensor:
        with mixed_precision(model):
            logits = side_by_side(read, ids, lengths, context_of(model), wanted)
        return of_logits(logits, criterion)

    return score
