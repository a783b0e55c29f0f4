"""The forward pass that training uses: the quickest one that computes what the model computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metier.model.backbone import hidden_states
from metier.model.device import compute_dtype
from metier.model.llama import LlamaForward, has_compiler, supports
from metier.model.world import is_in_parts

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


Forward = Callable[[Tensor, Sequence[int]], Tensor]
"""Ids of rows one behind the other, shape (tokens,), and the rows' lengths, longest first, to final
hidden states in the compute dtype, shape (tokens, hidden)."""


def forward_of(model: PreTrainedModel | PeftModel, *, compiled: bool = False) -> Forward:
    """The forward pass of a model.

    Args:
        model: whose it is.
        compiled: compile it for every new shape of input, where that can be done: worth it for a
            long training on rows of a few fixed lengths.

    """
    dtype = torch.bfloat16 if computes_bfloat16(model) else next(model.parameters()).dtype
    if model.device.type == "cpu" and not is_in_parts(model) and supports(model):
        return LlamaForward(model, dtype, compiled=compiled and has_compiler())

    def forward(ids: Tensor, lengths: Sequence[int]) -> Tensor:
        with mixed_precision(model):
            return hidden_states(model, ids, lengths).to(dtype)

    return forward


def computes_bfloat16(model: torch.nn.Module) -> bool:
    """Whether the device is native in bfloat16, and the model is not in float64 for a check."""
    parameters = list(model.parameters())
    narrow = all(p.dtype in (torch.float32, torch.bfloat16) for p in parameters)
    return narrow and compute_dtype(parameters[0].device) is torch.bfloat16


def mixed_precision(model: torch.nn.Module) -> torch.autocast:
    """Compute in bfloat16 where the device does natively; trained weights stay in float32."""
    device = next(model.parameters()).device
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_bfloat16(model))
