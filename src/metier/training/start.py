"""What a pre-training starts from, and what it writes: a new base, or one that is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metier.model.adapters import add_adapter, load_adapter, save_adapter
from metier.model.device import compute_dtype
from metier.model.load import Base, base_config, load_base
from metier.progress import no_weight_bar
from metier.task import TUNINGS, Lora, Training
from metier.text.tokenizer import Tokenizer
from metier.training.optimizers import adamw, muon_and_adam
from metier.training.pretrain_config import PretrainConfig, Shape
from metier.training.sft import default_learning_rate

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM, PreTrainedModel

_NEW_RATE = 0.004
ADAPTER = "adapter"
"""Directory of the adapter beside the base that it was merged into."""


@dataclass(frozen=True)
class Start:
    """A model that is to be trained.

    Attributes:
        model: with the weights that are trained in float32.
        learning_rate: peak.
        optimizers: over its trained weights.
        write: writes a base into a directory, in Hugging Face layout, and gives it as it is
            written, in the device's compute dtype. The model is of no use afterwards.

    """

    model: PreTrainedModel | PeftModel
    learning_rate: float
    optimizers: list[torch.optim.Optimizer]
    write: Callable[[Path], PreTrainedModel]


def new_base(config: PretrainConfig, tokenizer_dir: Path, device: torch.device) -> Start:
    """Random weights. Muon suits their matrices, and they are kept in bfloat16."""
    shape = config.shape or Shape()
    model = _random(shape, Tokenizer.load(tokenizer_dir), config.seed).to(device)  # type: ignore[arg-type]

    def write(directory: Path) -> PreTrainedModel:
        _save(model.bfloat16(), directory)
        (directory / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
        settings = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
        settings["model_max_length"] = shape.context
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
        return model.to(compute_dtype(device))  # type: ignore[no-any-return]

    rate = config.learning_rate or _NEW_RATE
    return Start(model, rate, muon_and_adam(model, rate, config.weight_decay), write)


def _random(shape: Shape, tokenizer: Tokenizer, seed: int) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    # Drawn on the processor, so that every device starts from the same weights.
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            intermediate_size=shape.intermediate,
            max_position_embeddings=shape.context,
            tie_word_embeddings=True,
            rms_norm_eps=1e-6,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
        )
    )


def given_base(config: PretrainConfig, name: str, device: torch.device) -> Start:
    """A base's own weights, or an adapter of it.

    What is written is in the number format in which the base is stored.

    Args:
        config: the recipe.
        name: of the base.
        device: where it is trained.

    Raises:
        ModelError: it is missing, damaged, unsafe or of an unknown kind.

    """
    # Trained weights are kept in float32; frozen ones in what the device computes in.
    base = load_base(name, None if config.adapter else torch.float32, str(device))
    rate = config.learning_rate or default_learning_rate(
        base.model, TUNINGS["lora" if config.adapter else "full"]
    )
    stored = _stored_dtype(name)
    if config.adapter:
        return _adapted(base, config, config.adapter, rate, stored)
    model: Any = base.model.requires_grad_(requires_grad=True)

    def write(directory: Path) -> PreTrainedModel:
        return _write(model.to(stored), base, directory)

    return Start(model, rate, [adamw(model, rate, config.weight_decay)], write)


def _stored_dtype(name: str) -> torch.dtype:
    found = base_config(name).dtype
    return found if isinstance(found, torch.dtype) else torch.float32


def _adapted(
    base: Base, config: PretrainConfig, lora: Lora, rate: float, stored: torch.dtype
) -> Start:
    """An adapter, which is written beside the base that it is merged into."""
    model = add_adapter(base.model, "lora", Training(lora=lora), config.seed)
    device = base.model.device

    def write(directory: Path) -> PreTrainedModel:
        save_adapter(model, directory / ADAPTER, base)
        # Merged into the weights as they are stored, and rounded once.
        fresh = load_base(base.name, stored, str(device))
        merged: Any = load_adapter(fresh, directory / ADAPTER)
        return _write(merged.merge_and_unload(), base, directory)

    return Start(model, rate, [adamw(model, rate, config.weight_decay)], write)


def _write(model: Any, base: Base, directory: Path) -> PreTrainedModel:
    _save(model, directory)
    base.tokenizer.save(directory)
    written: PreTrainedModel = model.to(compute_dtype(model.device))
    return written


def _save(model: PreTrainedModel, directory: Path) -> None:
    with no_weight_bar():
        model.save_pretrained(directory)
