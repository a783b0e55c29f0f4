"""Train a byte-level BPE tokenizer (Sennrich et al. 2016, arXiv 1508.07909) from streamed text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from metier.errors import ConfigError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CONTROL_TOKENS = (BOS, EOS, PAD, *ROLES)
SMALLEST = 256 + len(CONTROL_TOKENS)
"""Tokens of the smallest vocabulary: control tokens and all bytes."""

# Words with one leading space, numbers in runs of at most three digits, punctuation, line breaks:
# the split that GPT-4-style tokenizers use, so that no token mixes these.
_SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Template of every tokenizer trained here; pre-training on documents does not teach it."""


def train_bpe(texts: Iterable[str], vocabulary: int, directory: Path) -> None:
    """Train a tokenizer and write it in Hugging Face files.

    Args:
        texts: documents, read once as a stream.
        vocabulary: number of tokens, control tokens and the 256 bytes included.
        directory: receives tokenizer.json and tokenizer_config.json.

    Raises:
        ConfigError: the vocabulary cannot even hold all bytes.

    """
    from tokenizers import Regex as Pattern
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocabulary < SMALLEST:
        raise ConfigError(
            "vocabulary", f"is {vocabulary}, below {SMALLEST}", f"give at least {SMALLEST}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Pattern(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    (directory / "tokenizer_config.json").write_text(json.dumps(_settings(), indent=1))


def _settings() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": list(ROLES),
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
