"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685) in PEFT's format, bound to their base by hash.

PEFT injects and computes; reading is ours, because a PEFT config may name modules to import.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metier.errors import ModelError
from metier.runs import write_atomic
from metier.task import Lora

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from metier.model.load import Base

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_RECORD = "metier.json"


def add_lora(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """Put a new adapter into all linear layers but the output head.

    The base is changed in place: its linear layers are wrapped and its weights frozen.
    A starts Kaiming-uniform and B at zero, as in PEFT, but drawn on the CPU in float32, so the
    start depends on the seed alone and not on device, number format or global random state.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT computes with any number
        lora_dropout=lora.dropout,
        target_modules="all-linear",
    )
    adapted: PeftModel = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(adapted.named_parameters()):
        if "lora_A" in name:
            start = torch.empty(parameter.shape)
            torch.nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            parameter.data.copy_(start)
    return adapted


def save_adapter(model: PeftModel, directory: Path, base: Base) -> None:
    """Write an adapter in plain PEFT format, and beside it which base it belongs to."""
    directory.mkdir(parents=True, exist_ok=True)
    # Not the directory it lay in: that is a matter of this machine.
    model.peft_config["default"].base_model_name_or_path = base.name
    model.save_pretrained(str(directory), safe_serialization=True, save_embedding_layers=False)
    record = {"base": base.name, "base_hash": base.hash}
    write_atomic(directory / _RECORD, json.dumps(record, indent=1))


def load_adapter(base: Base, directory: Path) -> PeftModel:
    """Put a saved adapter into its base (in place).

    Raises:
        ModelError: it is damaged, of another kind, or belongs to another base.

    """
    from peft import get_peft_model
    from peft.utils import set_peft_model_state_dict

    _check_base(base, directory)
    config = _read_config(directory)
    weights = _read_weights(directory)
    try:
        model: PeftModel = get_peft_model(base.model, config)
    except (TypeError, ValueError) as error:
        raise _misfit(directory, str(error)) from None
    try:
        result: Any = set_peft_model_state_dict(model, weights)
        missing = [key for key in result.missing_keys if "lora_" in key]
        wrong = [f"tensor {key}" for key in missing + result.unexpected_keys]
    except RuntimeError as error:
        wrong = [str(error).splitlines()[-1].strip()]
    if wrong:
        model.unload()
        raise _misfit(directory, wrong[0])
    return model.eval()


def _check_base(base: Base, directory: Path) -> None:
    recorded = _read_json(directory / _RECORD).get("base_hash")
    if recorded != base.hash:
        raise ModelError(
            str(directory),
            f"belongs to another base (hash {str(recorded)[:12]}) than '{base.name}' "
            f"(hash {base.hash[:12]})",
            "load the base it was trained on",
        )


def _read_config(directory: Path) -> LoraConfig:
    """Only the fields that matter, so that nothing in the file can name code to import."""
    from peft import LoraConfig

    file = directory / _CONFIG
    values = _read_json(file)
    if values.get("peft_type") != "LORA":
        raise ModelError(
            str(file), f"is of kind {values.get('peft_type')!r}", "only LORA adapters are known"
        )
    if not values.get("target_modules"):
        raise ModelError(str(file), "names no target_modules", "train or fetch the adapter again")
    fields = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora")
    return LoraConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        **{name: values[name] for name in fields if name in values},
    )


def _read_weights(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = directory / _WEIGHTS
    try:
        weights: dict[str, torch.Tensor] = load_file(str(file))
    except (SafetensorError, OSError) as error:
        raise ModelError(
            str(file), f"is missing or damaged ({error})", "train or fetch the adapter again"
        ) from None
    return weights


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            str(file), f"is missing or unreadable ({error})", "train or fetch the adapter again"
        ) from None
    return values if isinstance(values, dict) else {}


def _misfit(directory: Path, cause: str) -> ModelError:
    return ModelError(
        str(directory), f"does not fit the base ({cause})", "load the base it was trained on"
    )
