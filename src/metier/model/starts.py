"""What new adapters start from: functions of the seed and the base's weights alone.

Whatever is random is drawn on the CPU in float32, so that no start depends on device, number format
or global random state.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metier.errors import ConfigError, ModelError
from metier.model.decoder import evaluating, has_plain_cache

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Subspace iterations: as many as PEFT's documentation of PiSSA takes for models of seven billion.
_ITERATIONS = 16


def kaiming(adapted: PeftModel, seed: int) -> None:
    """Of LoRA: A Kaiming-uniform as in PEFT, B zero, so that the model starts as its base."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(adapted.named_parameters()):
        if "lora_A" in name:
            start = torch.empty(parameter.shape)
            torch.nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            parameter.data.copy_(start)


def principal(adapted: PeftModel, rank: int, seed: int) -> None:
    """Of PiSSA (Meng et al. 2024, arXiv 2404.02948): the principal singular parts of each weight.

    There W becomes W - s B0 A0, and A and B start at A0 and B0. Here W stays, and the adapter has
    twice the rank: its second half, which no gradient reaches, takes s B0 A0 away. That is the same
    function with the same gradients, without rounding of what is left of W, and is plain LoRA.

    Raises:
        ConfigError: a weight has fewer singular values than the rank.

    """
    for name, layer in adapted.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        weight = layer.get_base_layer().weight.detach().float().cpu()
        if rank > min(weight.shape):
            raise ConfigError(
                "training.lora.rank",
                f"{rank} is more than the singular values of {name}, {tuple(weight.shape)}",
                f"set it to at most {min(weight.shape)}, or use lora instead of pissa",
            )
        a, b = _principal_part(weight.T if layer.fan_in_fan_out else weight, rank, seed)
        scale = layer.scaling["default"] ** -0.5
        _halves(layer.lora_A["default"].weight, scale * torch.cat((a, a)), rank, 0)
        _halves(layer.lora_B["default"].weight, scale * torch.cat((b, -b), dim=1), rank, 1)


def vocabulary(adapted: PeftModel, seed: int) -> None:
    """Of prompt tuning: embeddings of words of the vocabulary (Lester et al. 2021)."""
    model: Any = adapted.get_base_model()
    weight = _virtual(adapted)
    ids = _drawn(model, len(weight), seed)
    with torch.no_grad():
        weight.copy_(model.get_input_embeddings()(ids))


def read_words(adapted: PeftModel, seed: int) -> None:
    """Of prefix tuning: what the base makes of words that it reads (Li and Liang 2021).

    Raises:
        ModelError: the base keeps something else than keys and values of one shape.

    """
    model: Any = adapted.get_base_model()
    weight = _virtual(adapted)
    with evaluating(model):
        read = model(input_ids=_drawn(model, len(weight), seed)[None], use_cache=True)
    kept = [part[0] for layer in read.past_key_values.layers for part in (layer.keys, layer.values)]
    if sum(part.numel() for part in kept) != weight.numel():
        raise ModelError(
            type(model).__name__, "keeps keys and values of several shapes", "use lora instead"
        )
    weight.data.copy_(torch.stack(kept).permute(2, 0, 1, 3).reshape(weight.shape))


def check_virtual(model: PreTrainedModel, count: int) -> None:
    """Refuse virtual tokens that a base has no place for.

    Raises:
        ConfigError: they would take more than half of its context.
        ModelError: what it remembers is more than keys and values.

    """
    if not has_plain_cache(model):
        raise ModelError(
            type(model).__name__,
            "remembers what it read in a way of its own, behind which no virtual tokens can stand",
            "use lora instead",
        )
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
    context = min((limit for limit in limits if limit), default=2 * count)
    if 2 * count > context:
        raise ConfigError(
            "training.virtual_tokens",
            f"{count:,} would take more than half of the {context:,} tokens the base looks back on",
            f"set it to at most {context // 2:,}",
        )


def _principal_part(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """A, shape (rank, inputs), and B, (outputs, rank), with B A the best of this rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, values, right = torch.svd_lowrank(weight, q=rank, niter=_ITERATIONS)
    return values.sqrt()[:, None] * right.T, left * values.sqrt()


def _halves(parameter: Tensor, start: Tensor, rank: int, along: int) -> None:
    """Start a parameter, and let no gradient reach what stands behind the first `rank`."""
    parameter.data.copy_(start)
    learned = torch.zeros_like(parameter.data)
    learned.narrow(along, 0, rank).fill_(1)
    parameter.register_hook(lambda gradient: gradient * learned)  # type: ignore[no-untyped-call]


def _virtual(adapted: PeftModel) -> Tensor:
    """What is learned of virtual tokens, one row for each."""
    encoder: Any = adapted.prompt_encoder["default"]
    weight: Tensor = encoder.embedding.weight
    return weight


def _drawn(model: Any, count: int, seed: int) -> Tensor:
    """Ids of the base's vocabulary, shape (count,)."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(model.get_input_embeddings().weight)
    return torch.randint(rows, (count,), generator=generator).to(model.device)
