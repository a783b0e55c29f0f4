"""A model of a family without a forward pass of our own, with a real tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel


@pytest.fixture(scope="session")
def gpt2(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with GPT-2's real tokenizer, which has no beginning-of-sequence token."""
    directory = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64, bos_token_id=50256)
    GPT2LMHeadModel(config).save_pretrained(directory)
    source = data_dir / "tokenizers" / "gpt2" / "tokenizer.json"
    (directory / "tokenizer.json").write_bytes(source.read_bytes())
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return directory
