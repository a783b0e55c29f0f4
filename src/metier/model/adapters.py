"""Adapters in PEFT's format, bound to their base by hash, and what else of a base can be trained.

PEFT injects and computes; where adapters start (`starts`) and how they are read is ours, because a
PEFT config may name modules to import.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metier.errors import ConfigError, ModelError
from metier.model import starts
from metier.model.backbone import decoder_layers
from metier.model.encoder import is_encoder
from metier.runs import write_atomic
from metier.task import TUNINGS, Training

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from metier.model.load import Base

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_RECORD = "metier.json"
# By kind, what of a config is read.
_LORA = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora")
_FIELDS = {
    "LORA": (*_LORA, "target_modules", "fan_in_fan_out", "trainable_token_indices"),
    "IA3": ("target_modules", "feedforward_modules", "fan_in_fan_out"),
    "PROMPT_TUNING": ("num_virtual_tokens",),
    "PREFIX_TUNING": ("num_virtual_tokens",),
}


def add_adapter(
    model: PreTrainedModel, kind: str, training: Training, seed: int, new_ids: Sequence[int] = ()
) -> PeftModel:
    """Put a new adapter into a base, in all linear layers but the output head.

    The base is changed in place: its layers are wrapped and its weights frozen. What is trained is
    in float32.

    Args:
        model: the base.
        kind: a name of `task.TUNINGS` that has an adapter.
        training: its size, and the layers it goes into.
        seed: of its start.
        new_ids: tokens whose rows of the embeddings are learned as well.

    Raises:
        ConfigError: the base has no such layers, or no room for it.
        ModelError: the base cannot have an adapter of this kind.

    """
    from peft import get_peft_model

    tuning = TUNINGS[kind]
    if "virtual_tokens" in tuning.reads:
        starts.check_virtual(model, training.virtual_tokens)
    config = _new_config(model, kind, training, new_ids)
    adapted: PeftModel = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if kind == "pissa":
        starts.principal(adapted, training.lora.rank, seed)
    elif tuning.adapter == "LORA":
        starts.kaiming(adapted, seed)
    elif kind == "prompt-tuning":
        starts.vocabulary(adapted, seed)
    elif kind == "prefix-tuning":
        starts.read_words(adapted, seed)
    return adapted


def unfreeze(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Let a base's own weights be trained, all of them, or those of some layers alone.

    Raises:
        ConfigError: the base has no such layers.

    """
    model.requires_grad_(requires_grad=not layers)
    for number in _numbers(model, layers) if layers else ():
        decoder_layers(model)[1][number].requires_grad_(requires_grad=True)


def save_adapter(model: PeftModel, directory: Path, base: Base) -> None:
    """Write an adapter in plain PEFT format, and beside it which base it belongs to.

    Where it learned new tokens, the tokenizer that knows them is written as well.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    # Not the directory it lay in: that is a matter of this machine.
    config.base_model_name_or_path = base.name
    model.save_pretrained(str(directory), safe_serialization=True, save_embedding_layers=False)
    if _new_tokens(config):
        base.tokenizer.save(directory)
    record = {"base": base.name, "base_hash": base.hash}
    write_atomic(directory / _RECORD, json.dumps(record, indent=1))


def load_adapter(base: Base, directory: Path) -> PeftModel:
    """Put a saved adapter into its base (in place).

    Args:
        base: its base, with the tokens that the adapter learned (`vocabulary.with_tokens_of`).
        directory: what `save_adapter` wrote.

    Raises:
        ModelError: it is damaged, of another kind, or belongs to another base.

    """
    from peft import get_peft_model
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    _check_base(base, directory)
    config = _read_config(directory, _task_type(base.model))
    weights = _read_weights(directory)
    _check_tokens(base, config, directory)
    try:
        model: PeftModel = get_peft_model(base.model, config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _misfit(directory, str(error)) from None
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    if wrong := _difference(wanted, weights):
        if not config.is_prompt_learning:
            model.unload()
        raise _misfit(directory, f"tensor {wrong}")
    set_peft_model_state_dict(model, weights)
    return model.eval()


def _new_config(
    model: PreTrainedModel, kind: str, training: Training, new_ids: Sequence[int]
) -> PeftConfig:
    from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig
    from transformers.pytorch_utils import Conv1D

    tuning, task = TUNINGS[kind], _task_type(model)
    if tuning.adapter == "PROMPT_TUNING":
        return PromptTuningConfig(task_type=task, num_virtual_tokens=training.virtual_tokens)
    if tuning.adapter == "PREFIX_TUNING":
        return PrefixTuningConfig(task_type=task, num_virtual_tokens=training.virtual_tokens)
    linear = _linear_layers(model, training.layers)
    turned = isinstance(next(iter(linear.values())), Conv1D)
    if tuning.adapter == "IA3":
        targets, forward = _ia3_targets(model, linear)
        return IA3Config(
            task_type=task,
            target_modules=targets,
            feedforward_modules=forward,
            fan_in_fan_out=turned,
        )
    size = 2 if kind == "pissa" else 1
    return LoraConfig(
        task_type=task,
        r=size * training.lora.rank,
        lora_alpha=size * training.lora.alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=training.lora.dropout,
        target_modules=list(linear),
        fan_in_fan_out=turned,
        trainable_token_indices=_token_places(model, new_ids) if new_ids else None,
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
    )


def _task_type(model: PreTrainedModel) -> str:
    """PEFT's name of what a model is for; an encoder has no head of PEFT's own."""
    if is_encoder(model.config):
        return "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def _numbers(model: PreTrainedModel, layers: Sequence[int]) -> list[int]:
    """Numbers of layers, those from the end counted from the start.

    Raises:
        ConfigError: the base has no such layer.

    """
    count = len(decoder_layers(model)[1])
    for number in layers:
        if not -count <= number < count:
            raise ConfigError(
                "training.layers",
                f"names layer {number}, but the base has {count} layers",
                f"give numbers from 0 to {count - 1}, or from -1 to -{count} to count from the end",
            )
    return sorted({number % count for number in layers})


def _linear_layers(model: PreTrainedModel, layers: Sequence[int]) -> dict[str, Any]:
    """The linear layers but the output head by name, of some layers or of all.

    Raises:
        ConfigError: the base has no such layer.
        ModelError: there is none.

    """
    from transformers.pytorch_utils import Conv1D

    language_model: Any = model
    head = language_model.get_output_embeddings()
    start: tuple[str, ...] = ("",)
    if layers:
        name = decoder_layers(model)[0]
        start = tuple(f"{name}.{number}." for number in _numbers(model, layers))
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
        and module is not head
        and name.startswith(start)
    }
    if not found:
        raise ModelError(type(model).__name__, "has no linear layers", "use full")
    return found


def _ia3_targets(model: PreTrainedModel, linear: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What IA3 (Liu et al. 2022, arXiv 2205.05638) scales: outputs of attention, inputs of MLPs.

    Which layers these are PEFT knows by family.
    """
    from peft.utils import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FORWARD,
    )
    from peft.utils import (
        TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS,
    )

    family = model.config.get_text_config().model_type

    def of(known: dict[str, list[str]]) -> list[str]:
        ends = tuple(f".{end}" for end in known.get(family, ()))
        return [name for name in linear if name.endswith(ends)]

    if not (targets := of(TARGETS)):
        raise ModelError(
            type(model).__name__,
            f"is of the family '{family}', for which PEFT names no layers that IA3 scales",
            "use lora instead",
        )
    return targets, of(FORWARD)


def _token_places(model: PreTrainedModel, new_ids: Sequence[int]) -> dict[str, list[int]]:
    """The tables whose rows of new tokens are learned: the embeddings, and a head of its own.

    Raises:
        ModelError: the head has a bias, which PEFT would leave out.

    """
    language_model: Any = model
    embeddings = language_model.get_input_embeddings()
    head = language_model.get_output_embeddings()
    tables: list[Any] = [embeddings]
    if head is not None and head.weight is not embeddings.weight:
        tables.append(head)
        if getattr(head, "bias", None) is not None:
            raise ModelError(
                type(model).__name__,
                "has an output head with a bias, beside which PEFT cannot learn new tokens",
                "use full, or leave out training.added_tokens",
            )
    return {
        name: list(new_ids)
        for name, module in model.named_modules()
        if any(module is table for table in tables)
    }


def _check_base(base: Base, directory: Path) -> None:
    recorded = _read_json(directory / _RECORD).get("base_hash")
    if recorded != base.hash:
        raise ModelError(
            str(directory),
            f"belongs to another base (hash {str(recorded)[:12]}) than '{base.name}' "
            f"(hash {base.hash[:12]})",
            "load the base it was trained on",
        )


def _read_config(directory: Path, task: str) -> PeftConfig:
    """Only the fields that matter, so that nothing in the file can name code to import."""
    from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig

    file = directory / _CONFIG
    values = _read_json(file)
    kinds = {
        "LORA": LoraConfig,
        "IA3": IA3Config,
        "PROMPT_TUNING": PromptTuningConfig,
        "PREFIX_TUNING": PrefixTuningConfig,
    }
    kind = str(values.get("peft_type"))
    if kind not in kinds:
        raise ModelError(str(file), f"is of kind {kind!r}", f"known are {', '.join(kinds)}")
    if "target_modules" in _FIELDS[kind] and not values.get("target_modules"):
        raise ModelError(str(file), "names no target_modules", "train or fetch the adapter again")
    known = {name: values[name] for name in _FIELDS[kind] if name in values}
    try:
        config: PeftConfig = kinds[kind](task_type=task, inference_mode=True, **known)
    except (TypeError, ValueError) as error:
        raise _misfit(directory, str(error)) from None
    return config


def _new_tokens(config: PeftConfig) -> list[int]:
    """Ids whose rows an adapter learned."""
    places = getattr(config, "trainable_token_indices", None) or {}
    return [number for numbers in places.values() for number in numbers]


def _check_tokens(base: Base, config: PeftConfig, directory: Path) -> None:
    try:
        last = max(_new_tokens(config), default=-1)
    except (AttributeError, TypeError):
        raise _misfit(directory, "trainable_token_indices is no table of numbers") from None
    if last >= base.tokenizer.vocab_size:
        raise _misfit(directory, f"it learned token {last}, which the tokenizer does not have")


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


def _difference(wanted: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> str | None:
    """Name of a tensor that is missing, too many or of another shape."""
    shapes = [{name: t.shape for name, t in tensors.items()} for tensors in (wanted, given)]
    return min((name for name, _ in shapes[0].items() ^ shapes[1].items()), default=None)


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
