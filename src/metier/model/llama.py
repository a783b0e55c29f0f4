"""The forward pass of Llama for training on a processor, over a Transformers model's own weights.

It computes what `LlamaModel` computes (Touvron et al. 2023, arXiv 2302.13971), but quicker:
weights are read in the compute dtype once a layer, q, k and v are one product, attention is two
plain matrix products (the backward of the fused CPU kernel is slow for short windows), and each
layer is compiled where a compiler is at hand. Left out: key-value cache, padding, other families.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class LlamaForward:
    """Hidden states of whole windows.

    Args:
        model: a plain LlamaForCausalLM; its parameters receive the gradients.
        dtype: compute dtype; norms and softmax are in float32.
        compiled: compile each layer; by default where a C++ compiler is installed.

    """

    def __init__(
        self, model: LlamaForCausalLM, dtype: torch.dtype, *, compiled: bool | None = None
    ) -> None:
        self._model = model.model
        self._config = model.config
        self._dtype = dtype
        self._tables: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        wanted = has_compiler() if compiled is None else compiled
        self._layer: Callable[..., Tensor] = (
            torch.compile(_layer, dynamic=False) if wanted else _layer
        )

    def __call__(self, ids: Tensor) -> Tensor:
        """Final hidden states, shape (batch, length, hidden), of ids, shape (batch, length)."""
        cos, sin, mask = self._positions(ids.shape[1], ids.device)
        x = F.embedding(ids, self._model.embed_tokens.weight).to(self._dtype)
        for layer in self._model.layers:
            x = self._layer(
                x, _weights(layer), cos, sin, mask, self._head_sizes(), self._config.rms_norm_eps
            )
        return _norm(x, self._model.norm.weight, self._config.rms_norm_eps)

    def _head_sizes(self) -> tuple[int, int, int]:
        heads: int = self._config.num_attention_heads
        size = getattr(self._config, "head_dim", None) or self._config.hidden_size // heads
        return heads, self._config.num_key_value_heads or heads, size

    def _positions(self, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Rotary tables, shape (1, length, 1, head/2), and the causal mask (length, length)."""
        if length not in self._tables:
            inverse = self._model.rotary_emb.inv_freq
            angle = torch.arange(length, device=device)[:, None] * _wide(inverse)
            cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
            mask = torch.full((length, length), float("-inf"), device=device).triu(1)
            self._tables[length] = (cos.to(self._dtype), sin.to(self._dtype), mask)
        return self._tables[length]


def has_compiler() -> bool:
    """Whether torch.compile can build for a processor here."""
    return any(shutil.which(name) for name in ("g++", "c++", "clang++"))


def _weights(layer: Any) -> tuple[Tensor, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        layer.input_layernorm.weight,
        attention.q_proj.weight,
        attention.k_proj.weight,
        attention.v_proj.weight,
        attention.o_proj.weight,
        layer.post_attention_layernorm.weight,
        mlp.gate_proj.weight,
        mlp.up_proj.weight,
        mlp.down_proj.weight,
    )


def _layer(
    x: Tensor,
    weights: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    sizes: tuple[int, int, int],
    eps: float,
) -> Tensor:
    first_norm, q, k, v, o, second_norm, gate, up, down = weights
    qkv = F.linear(_norm(x, first_norm, eps), torch.cat((q, k, v)).to(x.dtype))
    x = x + F.linear(_attention(qkv, cos, sin, mask, sizes), o.to(x.dtype))
    h = _norm(x, second_norm, eps)
    h = F.silu(F.linear(h, gate.to(x.dtype))) * F.linear(h, up.to(x.dtype))
    return x + F.linear(h, down.to(x.dtype))


def _attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, sizes: tuple[int, int, int]
) -> Tensor:
    """Causal attention of packed projections, shape (batch, length, (heads + 2 kv) * size)."""
    heads, kv_heads, size = sizes
    batch, length, _ = qkv.shape
    packed = qkv.view(batch, length, heads + 2 * kv_heads, size)
    q, k, v = torch.split(packed, [heads, kv_heads, kv_heads], dim=2)
    q, k = _rotate(q, cos, sin).transpose(1, 2), _rotate(k, cos, sin).transpose(1, 2)
    v = v.transpose(1, 2)
    if kv_heads != heads:
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
    scores = _wide(q @ k.transpose(2, 3)) * size**-0.5 + mask
    mixed: Tensor = torch.softmax(scores, dim=-1).to(v.dtype) @ v
    return mixed.transpose(1, 2).reshape(batch, length, heads * size)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split layout."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) in float32."""
    wide = _wide(x)
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (scaled * weight).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
