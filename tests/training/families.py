"""Small bases of real families with random weights and the starter's tokenizer, on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from metier.model import load

_TOKENS = {"vocab_size": 8192, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = _SIZE | {"intermediate_size": 48, "num_key_value_heads": 2}
_WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24}

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": _GROUPED | {"tie_word_embeddings": True},
    "Mistral": _GROUPED | {"sliding_window": 24},
    "Qwen3": _GROUPED | {"head_dim": 8},
    "Gemma3Text": _GROUPED | _WINDOW | {"head_dim": 8},
    "Phi": _SIZE | {"intermediate_size": 48},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "GPTNeoX": _SIZE | {"intermediate_size": 48, "max_position_embeddings": 128},
}
"""By the name of their config."""

ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": _SIZE | {"intermediate_size": 48, "max_position_embeddings": 128},
    "Roberta": _SIZE | {"intermediate_size": 48, "max_position_embeddings": 131},
    "ModernBert": _SIZE
    | {"intermediate_size": 48, "local_attention": 8, "global_attn_every_n_layers": 2},
}
"""The same of encoders; ModernBERT's second layer looks at four tokens to each side."""


def tokenizer_files() -> list[Path]:
    """Those of the starter, which is part of every checkout."""
    directory = Path(load.__file__).parent / "starter"
    return [directory / "tokenizer.json", directory / "tokenizer_config.json"]


def write_base(directory: Path, family: str, **changes: Any) -> Path:
    """A base in Hugging Face layout, its weights a function of the family alone."""
    values = _TOKENS | (FAMILIES | ENCODERS)[family] | changes
    config = getattr(transformers, f"{family}Config")(**values)
    kind = "MaskedLM" if family in ENCODERS else "CausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"AutoModelFor{kind}").from_config(config).float()
        for parameter in model.parameters():  # larger, so that inputs matter from the start
            if parameter.ndim == 2:
                parameter.data.normal_(0, parameter.shape[1] ** -0.5)
    model.save_pretrained(directory)
    for file in tokenizer_files():
        shutil.copy(file, directory)
    if family in ENCODERS:
        _frame(directory / "tokenizer.json")
    return directory


def _frame(file: Path) -> None:
    """Let a tokenizer put its first two control tokens around a text, as those of encoders do."""
    tokenizer = Tokenizer.from_file(str(file))
    around = [("<|bos|>", 0), ("<|eos|>", 1)]
    tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=around
    )
    tokenizer.save(str(file))
