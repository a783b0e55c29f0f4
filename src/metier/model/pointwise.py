"""The parts of a decoder layer that look at each number alone, with backwards of their own.

Left to itself, autograd would hold what each single operation read, in float32 for the norms: more
than half of the memory of a layer. Here what is cheap to compute again is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) of x, (tokens, hidden), in its dtype.

    Computed in float32 at least, as Transformers does; the weight, (hidden,), too.
    """
    return _Norm.apply(x, weight, eps)  # type: ignore[no-any-return,no-untyped-call]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split layout.

    Args:
        x: shape (tokens, heads, size).
        cos: shape (tokens, 1, size / 2).
        sin: the same.

    """
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return,no-untyped-call]


def swiglu(gate_up: Tensor) -> Tensor:
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): silu(gate) * up, shape (tokens, inner).

    Args:
        gate_up: both side by side, shape (tokens, 2 * inner).

    """
    return _SwiGLU.apply(gate_up)  # type: ignore[no-any-return,no-untyped-call]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        gradient = _wide(upstream[0])
        scaled = _wide(x) * inverse
        for_weight = (gradient * scaled).sum(0) if ctx.needs_input_grad[1] else None
        for_scaled = gradient * weight
        along = (for_scaled * scaled).mean(-1, keepdim=True)
        for_x = for_scaled.sub_(scaled.mul_(along)).mul_(inverse)
        return for_x.to(x.dtype), for_weight, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(upstream[0], cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Each pair of numbers turned by its angle, or back."""
    found = torch.empty_like(x)
    first, second = x.chunk(2, dim=-1)
    new_first, new_second = found.chunk(2, dim=-1)
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin, value=direction)
    return found


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        (gradient,) = upstream
        gate, up = gate_up.chunk(2, dim=-1)
        found = torch.empty_like(gate_up)
        for_gate, for_up = found.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=for_up)
        for_gate.copy_(torch.ops.aten.silu_backward(gradient * up, gate))
        return (found,)


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
