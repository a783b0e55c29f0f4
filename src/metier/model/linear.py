"""Linear layers that read the same input, as one product, with or without LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Weights(NamedTuple):
    """What `project` computes with.

    Attributes:
        whole: weights of all layers, one below the other, shape (sum of outputs, inputs).
        sizes: outputs of each layer.
        a: first matrices of the adapters, one below the other, shape (sum of ranks, inputs);
            None where no layer has an adapter.
        b: second matrices of the adapters with their scale, (outputs, rank), or None, by layer.

    """

    whole: Tensor
    sizes: tuple[int, ...]
    a: Tensor | None
    b: tuple[Tensor | None, ...]


class Joined:
    """Linear layers without bias that read the same input.

    While all are frozen, their weights lie in one matrix, whose memory the layers then share.

    Args:
        layers: linear layers, or PEFT's LoRA around them.

    """

    def __init__(self, *layers: Any) -> None:
        bare = [getattr(layer, "base_layer", layer) for layer in layers]
        self._weights = [layer.weight for layer in bare]
        self._sizes = tuple(len(weight) for weight in self._weights)
        self._whole, self._places = torch.empty(0), [0] * len(bare)
        self._adapters = [_adapter(layer) for layer in layers]

    def weights(self, dtype: torch.dtype) -> Weights:
        """The weights as they are now; their parameters receive gradients."""
        firsts = [found[0] for found in self._adapters if found]
        return Weights(
            self._joined(dtype),
            self._sizes,
            _stacked(firsts, dtype) if firsts else None,
            tuple((f[1] * f[2]).to(dtype) if f else None for f in self._adapters),
        )

    def _joined(self, dtype: torch.dtype) -> Tensor:
        if any(weight.requires_grad for weight in self._weights):
            return _stacked(self._weights, dtype)
        # Whoever casts or moves a model, or joins its layers anew, gives the weights other memory.
        if [weight.data_ptr() for weight in self._weights] != self._places:
            self._whole = _share(self._weights)
            self._places = [weight.data_ptr() for weight in self._weights]
        return self._whole.to(dtype)


def project(x: Tensor, weights: Weights) -> Tensor:
    """Outputs of all layers side by side, (tokens, sum of outputs), of x, (tokens, inputs)."""
    if weights.a is None:
        return F.linear(x, weights.whole)
    return _Adapted.apply(x, weights.whole, weights.a, weights.sizes, *weights.b)  # type: ignore[no-any-return,no-untyped-call]


def _stacked(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Matrices one below the other; narrowed first, as less is copied then."""
    narrow = [matrix.to(dtype) for matrix in matrices]
    return torch.cat(narrow) if len(narrow) > 1 else narrow[0]


def _share(weights: Sequence[Tensor]) -> Tensor:
    """One matrix of all weights, of which each becomes a part."""
    if len(weights) == 1:
        return weights[0]
    whole = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, torch.split(whole, [len(w) for w in weights]), strict=True):
        weight.data = part
    return whole


def _adapter(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    """First and second matrix of a LoRA layer, and its scale."""
    if not hasattr(layer, "lora_A"):
        return None
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return first, second, layer.scaling["default"]


class _Adapted(torch.autograd.Function):
    """x Wᵀ + (x Aᵀ) Bᵀ (Hu et al. 2021, arXiv 2106.09685), the adapters' part added in place.

    Each B reads its own ranks and writes to its own layer's outputs. Left to itself, autograd would
    hold and add up an output for every product.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, whole: Tensor, a: Tensor, sizes: Sequence[int], *b: Any
    ) -> Tensor:
        reduced = x @ a.t()
        found = F.linear(x, whole)
        for layer, outputs, ranks in _places(sizes, b):
            found[:, outputs].addmm_(reduced[:, ranks], b[layer].t())
        ctx.save_for_backward(x, whole, a, reduced, *b)
        ctx.sizes = sizes
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        x, whole, a, reduced, *b = ctx.saved_tensors
        (gradient,) = upstream
        for_reduced = torch.empty_like(reduced)
        for_b: list[Tensor | None] = [None] * len(b)
        for layer, outputs, ranks in _places(ctx.sizes, b):
            for_reduced[:, ranks] = gradient[:, outputs] @ b[layer]
            for_b[layer] = gradient[:, outputs].t() @ reduced[:, ranks]
        for_x = (gradient @ whole).addmm_(for_reduced, a) if ctx.needs_input_grad[0] else None
        for_whole = gradient.t() @ x if ctx.needs_input_grad[1] else None
        return for_x, for_whole, for_reduced.t() @ x, None, *for_b


def _places(sizes: Sequence[int], b: Sequence[Tensor | None]) -> Iterator[tuple[int, slice, slice]]:
    """Of every layer with an adapter: its number, its outputs, and its ranks."""
    output = rank = 0
    for layer, (size, second) in enumerate(zip(sizes, b, strict=True)):
        if second is not None:
            yield layer, slice(output, output + size), slice(rank, rank + second.shape[1])
            rank += second.shape[1]
        output += size
