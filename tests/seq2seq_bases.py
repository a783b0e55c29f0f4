"""Small encoder-decoders of the T5 family with random weights and a tokenizer of T5's kind."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from metier.data.builtin import topics

_SPECIAL = ["<pad>", "</s>", "<unk>"]
_SENTINELS = [f"<extra_id_{number}>" for number in range(8)]
_WORDS, _RARE = 300, -12.0
_SIZE = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "T5-1.0": {"feed_forward_proj": "relu"},
    "T5-1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "MT5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
"""The first with the embeddings as its output head, the others, as Flan-T5, with a head of their
own."""


def write_tokenizer(directory: Path, texts: list[str]) -> int:
    """A Unigram tokenizer that works as T5's does; returns how many ids it has.

    White space is one blank, a text begins with one, EOS ends it, and characters that the texts do
    not have are unknown. Its pieces are their commonest words, by their share, and all characters.
    It is not trained, as training one gives another each time.
    """
    words = Counter(f"▁{word}" for text in texts for word in text.split())
    common = sorted(words, key=lambda word: (-words[word], word))[:_WORDS]
    pieces = [(word, math.log(words[word] / words.total())) for word in common]
    characters = sorted({*"".join(words)} - set(common))
    pieces += [(character, _RARE) for character in characters]
    special = [(token, 0.0) for token in _SPECIAL]
    tokenizer = Tokenizer(Unigram([*special, *pieces], unk_id=2, byte_fallback=False))
    blanks = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), blanks])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=_SENTINELS,
    )
    fast.save_pretrained(directory)
    return len(fast)


def write_seq2seq(
    directory: Path, family: str, texts: list[str] | None = None, **changes: Any
) -> Path:
    """A base in Hugging Face layout; its output head is told from the embeddings by its values."""
    size = write_tokenizer(directory, texts or topics()[:12])
    kind = family.split("-")[0]
    values = _SIZE | SEQ2SEQ[family] | {"vocab_size": size + 12} | changes
    config = getattr(transformers, f"{kind}Config")(**values)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForSeq2SeqLM.from_config(config).float()
        if "tie_word_embeddings" in SEQ2SEQ[family]:  # the library ties them in a new model
            own = torch.randn_like(model.lm_head.weight) * config.d_model**-0.5
            model.lm_head.weight = torch.nn.Parameter(own)
    model.save_pretrained(directory)
    return directory
