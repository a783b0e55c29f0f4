"""Optimisers: one for random weights, one for weights that are trained further."""

from __future__ import annotations

import torch
from torch import nn

from metier.model.world import is_sharded

_EMBEDDINGS = ("embed", "wte", "wpe", "lm_head", "shared")


def muon_and_adam(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms and biases.

    Muon (Jordan et al. 2024) orthogonalises the momentum of each matrix; scaled to AdamW's usual
    update size (Liu et al. 2025, arXiv 2502.16982), both share one learning rate.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        embedding = any(part in name for part in _EMBEDDINGS)
        (matrices if parameter.ndim == 2 and not embedding else others).append(parameter)
    return [
        torch.optim.Muon(
            matrices,
            lr=learning_rate,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
    ]


def adamw(
    model: nn.Module, learning_rate: float, weight_decay: float, head_rate: float | None = None
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) over what is trained, with decay on matrices only.

    Args:
        model: whose parameters are trained.
        learning_rate: of all of them.
        weight_decay: of matrices.
        head_rate: learning rate of the model's `head` alone, where it has one of its own.

    """
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = learning_rate
            if head_rate is not None and name.startswith("head."):
                rate = head_rate
            # A fused step takes sharded parameters or whole ones, not both at once.
            kind = parameter.ndim >= 2, is_sharded(parameter), rate
            groups.setdefault(kind, []).append(parameter)
    settings = [
        {"params": alike, "weight_decay": weight_decay if matrix else 0.0, "lr": rate}
        for (matrix, _, rate), alike in groups.items()
    ]
    return torch.optim.AdamW(settings, lr=learning_rate, fused=True)
