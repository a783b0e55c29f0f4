"""The forward pass of Llama for training, over a Transformers or PEFT model's own weights.

It computes what `LlamaModel` computes (Touvron et al. 2023, arXiv 2302.13971), with or without
LoRA (Hu et al. 2021, arXiv 2106.09685), but quicker on a processor: q, k and v are one product,
and so are gate and up; the adapters of modules that read the same input share one product; and
attention is two plain matrix products (the backward of the fused CPU kernel is slow for short
windows). Padding must stand on the right, where causal attention never looks. Left out:
key-value cache, dropout, biases, other families.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.model.backbone import inner

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Linear = tuple[Tensor, Tensor | None, Tensor | None, float]
"""Weight, A and B of an adapter or None, and its scale."""


class LlamaForward:
    """Hidden states of whole windows.

    Args:
        model: a LlamaForCausalLM for which `supports` holds; its parameters receive gradients.
        dtype: compute dtype; norms and softmax are in float32 at least.
        compiled: compile each layer for every new shape of input: worth it for windows of a few
            fixed lengths.

    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, dtype: torch.dtype, *, compiled: bool = False
    ) -> None:
        language_model = inner(model)
        self._model = language_model.model
        self._config = language_model.config
        self._dtype = dtype
        self._tables = (torch.empty(0),) * 3
        self._layer: Callable[..., Tensor] = (
            torch.compile(_layer, dynamic=False) if compiled else _layer
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
        """Rotary tables, shape (1, length, 1, head/2), and the causal mask (length, length).

        They are kept for the longest input so far; a shorter one uses a part of them.
        """
        if length > len(self._tables[2]):
            inverse = self._model.rotary_emb.inv_freq
            angle = torch.arange(length, device=device)[:, None] * _wide(inverse)
            cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
            mask = torch.full((length, length), float("-inf"), device=device).triu(1)
            self._tables = (cos.to(self._dtype), sin.to(self._dtype), mask)
        cos, sin, mask = self._tables
        return cos[:, :length], sin[:, :length], mask[:length, :length]


def supports(model: PreTrainedModel | PeftModel) -> bool:
    """Whether `LlamaForward` computes exactly what this model computes."""
    config = inner(model).config
    rope = getattr(config, "rope_parameters", None) or {}
    plain = (
        config.model_type == "llama"
        and rope.get("rope_type", "default") == "default"
        and config.hidden_act == "silu"
        and not (config.attention_bias or config.mlp_bias)
    )
    return plain and all(_is_plain_lora(module) for module in inner(model).model.modules())


def _is_plain_lora(module: Any) -> bool:
    """Whether a module is no adapter layer, or one with a single LoRA without extras."""
    if not hasattr(module, "lora_A"):
        return True
    return (
        list(module.lora_A) == ["default"]
        and not module.merged
        and not module.disable_adapters
        and not getattr(module, "lora_variant", None)
        and isinstance(module.lora_dropout["default"], torch.nn.Identity)
        and module.lora_B["default"].bias is None
    )


def has_compiler() -> bool:
    """Whether torch.compile can build for a processor here."""
    return any(shutil.which(name) for name in ("g++", "c++", "clang++"))


def _weights(layer: Any) -> tuple[Tensor | Linear, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        layer.input_layernorm.weight,
        _linear(attention.q_proj),
        _linear(attention.k_proj),
        _linear(attention.v_proj),
        _linear(attention.o_proj),
        layer.post_attention_layernorm.weight,
        _linear(mlp.gate_proj),
        _linear(mlp.up_proj),
        _linear(mlp.down_proj),
    )


def _linear(module: Any) -> Linear:
    if not hasattr(module, "lora_A"):
        return module.weight, None, None, 1.0
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    return module.base_layer.weight, a, b, module.scaling["default"]


def _layer(
    x: Tensor,
    weights: tuple[Any, ...],
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    sizes: tuple[int, int, int],
    eps: float,
) -> Tensor:
    first_norm, q, k, v, o, second_norm, gate, up, down = weights
    projected = _project(_norm(x, first_norm, eps), q, k, v)
    x = x + _project(_attention(projected, cos, sin, mask, sizes), o)[0]
    gated, raised = _project(_norm(x, second_norm, eps), gate, up)
    return x + _project(F.silu(gated) * raised, down)[0]


def _project(x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
    """Products of one input with several linear layers, each with its adapter."""
    frozen = [weight for weight, *_ in linears]
    whole = F.linear(x, torch.cat(frozen).to(x.dtype) if len(frozen) > 1 else frozen[0].to(x.dtype))
    found = _split(whole, frozen)
    adapters = [a for _, a, _, _ in linears if a is not None]
    if not adapters:
        return found
    reduced = iter(_split(F.linear(x, torch.cat(adapters).to(x.dtype)), adapters))
    return tuple(
        y if b is None else y + F.linear(next(reduced), (b * scale).to(x.dtype))
        for y, (_, _, b, scale) in zip(found, linears, strict=True)
    )


def _split(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Cut the last dimension into the outputs of each weight."""
    return torch.split(x, [len(weight) for weight in weights], dim=-1)


def _attention(
    projected: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    sizes: tuple[int, int, int],
) -> Tensor:
    """Causal attention of q, k, v, each of shape (batch, length, its heads * size)."""
    heads, kv_heads, size = sizes
    batch, length, _ = projected[0].shape
    q, k, v = (part.view(batch, length, -1, size) for part in projected)
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
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) in float32 at least."""
    wide = _wide(x)
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (scaled * weight).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
