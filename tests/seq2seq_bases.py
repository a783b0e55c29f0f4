"""Small encoder-decoders of the T5 family with random weights and a tokenizer of T5's kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from tokenizers.trainers import UnigramTrainer

from metier.data.builtin import topics

_SPECIAL = ["<pad>", "</s>", "<unk>"]
_SENTINELS = [f"<extra_id_{number}>" for number in range(8)]
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
    """Train a Unigram tokenizer that works as T5's does; returns how many ids it has.

    White space is one blank, a text begins with one, EOS ends it, and characters that the texts do
    not have are unknown.
    """
    tokenizer = Tokenizer(Unigram())
    blanks = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), blanks])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = UnigramTrainer(
        vocab_size=400, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
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
    size = write_tokenizer(directory, texts or topics())
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
