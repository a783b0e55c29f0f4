"""A base in four bits, for QLoRA (Dettmers et al. 2023, arXiv 2305.14314): NF4 by bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from metier.errors import ConfigError, MissingExtraError
from metier.model.device import choose_device


def check_four_bit() -> None:
    """Refuse what needs a base in four bits where there can be none, before any work.

    Raises:
        ConfigError: there is no CUDA device: elsewhere four bits would be slower than sixteen.
        MissingExtraError: bitsandbytes is not installed.

    """
    device = choose_device()
    if device.type != "cuda":
        raise ConfigError(
            "arm 'qlora'",
            f"holds its base in four bits, which takes a CUDA device; this machine has {device}",
            "use lora, or run it on a machine with such a device",
        )
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "qlora")


def arguments(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` needs besides: 4-bit NormalFloat, its constants quantised as well.

    Args:
        dtype: in which products are computed.
        device: where the model goes: it is quantised there.

    """
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}
