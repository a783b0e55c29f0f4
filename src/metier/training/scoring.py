"""Sums of a criterion over some tokens of rows, by the quickest way a model allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metier.model.backbone import context_of, inner, output_weight
from metier.model.prelude import behind, prelude
from metier.model.rows import side_by_side
from metier.model.seq2seq import answer_states, head_scale, is_seq2seq
from metier.model.world import is_in_parts
from metier.training.forward import Forward, computes_bfloat16, forward_of, mixed_precision
from metier.training.losses import Criterion, of_head, of_logits

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class Scorer:
    """Gives sums of criteria over a model's logits, made only for the tokens that count.

    A model needs one: another would lay out the model's weights anew, and each its own way.

    Attributes:
        model: whose logits they are.

    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, compiled: bool = False) -> None:
        """Lay out a model; `compiled` is that of `forward.forward_of`."""
        self.model = model
        self._sum: Callable[[Tensor, Sequence[int], Tensor, Criterion], Tensor]
        if is_seq2seq(model):
            self._sum = partial(_through_decoder, model, head_scale(model))
            return
        weight = output_weight(model)
        self._sum = (
            partial(_through_logits, model)
            if weight is None
            else partial(_through_head, forward_of(model, compiled=compiled), weight)
        )

    @property
    def device(self) -> torch.device:
        """Where ids and criteria must be."""
        return self.model.device

    def __call__(
        self, ids: Tensor, lengths: Sequence[int], wanted: Tensor, criterion: Criterion
    ) -> Tensor:
        """The sum of a criterion.

        Args:
            ids: of rows one behind the other, shape (tokens,).
            lengths: of the rows, longest first.
            wanted: which tokens count, shape (tokens,); of an encoder-decoder's row the first of
                them ends the prompt.
            criterion: of the tokens that count.

        """
        return self._sum(ids, lengths, wanted, criterion)


def _through_head(
    forward: Forward,
    weight: Callable[[], Tensor],
    ids: Tensor,
    lengths: Sequence[int],
    wanted: Tensor,
    criterion: Criterion,
) -> Tensor:
    return of_head(forward(ids, lengths)[wanted], weight(), criterion)


def _through_decoder(
    model: PreTrainedModel | PeftModel,
    scale: float,
    ids: Tensor,
    lengths: Sequence[int],
    wanted: Tensor,
    criterion: Criterion,
) -> Tensor:
    """The same for an encoder-decoder, whose states are scaled before the head."""
    with mixed_precision(model):
        states = answer_states(model, ids, lengths, wanted) * scale
    if computes_bfloat16(model):
        states = states.bfloat16()
    return of_head(states, inner(model).get_output_embeddings().weight, criterion)


def _through_logits(
    model: PreTrainedModel | PeftModel,
    ids: Tensor,
    lengths: Sequence[int],
    wanted: Tensor,
    criterion: Criterion,
) -> Tensor:
    """The same for a family whose logits are not just a product with the head."""

    def read(padded: Tensor) -> Tensor:
        found: Tensor = inner(model)(input_ids=padded, **behind(before, len(padded))).logits
        return found

    with mixed_precision(model):
        before, together = prelude(model), is_in_parts(model)
        logits = side_by_side(read, ids, lengths, context_of(model), wanted, at_once=together)
    return of_logits(logits, criterion)
