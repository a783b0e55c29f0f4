"""The forward pass of Llama for training, over a Transformers or PEFT model's own weights.

It computes what `LlamaModel` computes (Touvron et al. 2023, arXiv 2302.13971), with or without
LoRA, but quicker on a processor: no padding but in attention; q, k and v are one product, and so
are gate and up (`linear`); and attention has a backward of its own (`causal`; that of the fused CPU
kernel is slow for short windows). Left out: key-value cache, dropout, biases, other families.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.model.backbone import inner
from metier.model.causal import causal_attention
from metier.model.linear import Joined, Weights, project
from metier.model.pointwise import rms_norm, rotate, swiglu
from metier.model.prelude import virtual_tokens
from metier.model.rows import Group, groups, padded, parted

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class Layout(NamedTuple):
    """How the tokens of one forward pass lie.

    Attributes:
        groups: in which attention reads them.
        spare: tokens behind the last row, which nothing reads.
        cos: rotary table, shape (tokens, 1, head / 2).
        sin: the same.
        mask: causal, of the longest row so far or longer, shape (longest, longest).

    """

    groups: tuple[Group, ...]
    spare: int
    cos: Tensor
    sin: Tensor
    mask: Tensor


class LlamaForward:
    """Hidden states of whole rows.

    Args:
        model: a LlamaForCausalLM for which `supports` holds; its parameters receive gradients.
        dtype: compute dtype; norms are in float32 at least.
        compiled: compile each layer for every new shape of input: worth it for rows of a few
            fixed lengths.

    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, dtype: torch.dtype, *, compiled: bool = False
    ) -> None:
        language_model = inner(model)
        self._model = language_model.model
        self._config = language_model.config
        self._dtype = dtype
        self._layers = [_Layer(layer) for layer in self._model.layers]
        self._tables = (torch.empty(0),) * 3
        self._compute: Callable[..., Tensor] = (
            torch.compile(_compute, dynamic=False) if compiled else _compute
        )

    def __call__(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Final hidden states, shape (tokens, hidden).

        Args:
            ids: of rows that stand one behind the other, shape (tokens,).
            lengths: of the rows, longest first.

        """
        layout = self._layout(lengths, ids.device)
        x = F.embedding(F.pad(ids, (0, layout.spare)), self._model.embed_tokens.weight)
        x, eps = x.to(self._dtype), self._config.rms_norm_eps
        for layer in self._layers:
            x = self._compute(x, layer.weights(self._dtype), layout, self._head_sizes(), eps)
        return rms_norm(x, self._model.norm.weight, eps)[: len(ids)]

    def _head_sizes(self) -> tuple[int, int, int]:
        heads: int = self._config.num_attention_heads
        size = getattr(self._config, "head_dim", None) or self._config.hidden_size // heads
        return heads, self._config.num_key_value_heads or heads, size

    def _layout(self, lengths: Sequence[int], device: torch.device) -> Layout:
        """Rotary tables and mask are kept for the longest row so far; others use a part of them."""
        found = tuple(groups(lengths, device))
        longest = found[0].length
        if longest > len(self._tables[2]):
            # In float32 whatever the model is in, as Transformers does.
            frequencies = self._model.rotary_emb.inv_freq.float()
            angle = torch.arange(longest, device=device)[:, None] * frequencies
            cos, sin = angle.cos()[:, None], angle.sin()[:, None]
            mask = torch.full((longest, longest), float("-inf"), device=device).triu(1)
            self._tables = (cos.to(self._dtype), sin.to(self._dtype), mask.to(self._dtype))
        spare = padded(sum(lengths)) - sum(lengths)
        nowhere = torch.zeros(spare, dtype=torch.long)
        positions = torch.cat([*(torch.arange(n) for n in lengths), nowhere]).to(device)
        cos, sin, mask = self._tables
        return Layout(found, spare, cos[positions], sin[positions], mask)


def supports(model: PreTrainedModel | PeftModel) -> bool:
    """Whether `LlamaForward` computes exactly what this model computes."""
    if virtual_tokens(model):
        return False
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
    """Whether a module is no adapter layer, or one with a single LoRA without extras.

    New tokens are rows of the weight that the embeddings show, so they need nothing here.
    """
    if not hasattr(module, "lora_A"):
        return not hasattr(module, "ia3_l") and not _is_packed(module)
    return (
        list(module.lora_A) == ["default"]
        and not module.merged
        and not module.disable_adapters
        and not getattr(module, "lora_variant", None)
        and isinstance(module.lora_dropout["default"], torch.nn.Identity)
        and module.lora_B["default"].bias is None
    )


def _is_packed(module: Any) -> bool:
    """Whether a weight is not stored as numbers: that of a base in four bits."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not weight.is_floating_point()


def has_compiler() -> bool:
    """Whether torch.compile can build for a processor here."""
    return any(shutil.which(name) for name in ("g++", "c++", "clang++"))


class _LayerWeights(NamedTuple):
    """Weights of one decoder layer."""

    attention_norm: Tensor
    qkv: Weights
    output: Weights
    mlp_norm: Tensor
    gate_up: Weights
    down: Weights


class _Layer:
    """A decoder layer of Transformers, its products joined."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._attention_norm, self._mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self._qkv = Joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self._output = Joined(attention.o_proj)
        self._gate_up = Joined(mlp.gate_proj, mlp.up_proj)
        self._down = Joined(mlp.down_proj)

    def weights(self, dtype: torch.dtype) -> _LayerWeights:
        """The weights as they are now."""
        return _LayerWeights(
            self._attention_norm.weight,
            self._qkv.weights(dtype),
            self._output.weights(dtype),
            self._mlp_norm.weight,
            self._gate_up.weights(dtype),
            self._down.weights(dtype),
        )


def _compute(
    x: Tensor, weights: _LayerWeights, layout: Layout, sizes: tuple[int, int, int], eps: float
) -> Tensor:
    """One decoder layer, shape (tokens, hidden) to the same."""
    projected = project(rms_norm(x, weights.attention_norm, eps), weights.qkv)
    x = x + project(_attention(projected, layout, sizes), weights.output)
    gate_up = project(rms_norm(x, weights.mlp_norm, eps), weights.gate_up)
    return x + project(swiglu(gate_up), weights.down)


def _attention(projected: Tensor, layout: Layout, sizes: tuple[int, int, int]) -> Tensor:
    """Causal attention of q, k and v of every token, side by side."""
    heads, kv_heads, size = sizes
    tokens = projected.view(len(projected), -1, size)
    queries_and_keys, values = torch.split(tokens, [heads + kv_heads, kv_heads], dim=1)
    turned = rotate(queries_and_keys, layout.cos, layout.sin)
    mixed = [
        group.gather(causal_attention(group.spread(own), group.spread(found), layout.mask))
        for group, own, found in zip(
            layout.groups, parted(turned, layout.groups), parted(values, layout.groups), strict=True
        )
    ]
    if layout.spare:
        mixed.append(projected.new_zeros(layout.spare, heads * size))
    return torch.cat(mixed) if len(mixed) > 1 else mixed[0]
