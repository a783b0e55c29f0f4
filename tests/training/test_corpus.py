"""A corpus ten times as large is tokenised in the same memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from metier import runs
from metier.data import stream
from metier.model.load import starter_path
from metier.model.memory import PeakMemory, give_back
from metier.progress import Silent
from metier.text.tokenizer import Tokenizer
from metier.training.corpus import Corpus
from metier.training.pretrain_config import PretrainConfig
from tests.scripts import load_script

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "constant_memory.py"
NOISE = 5e6
"""Bytes that the allocator makes of chance."""


def peak(tokenizer: Tokenizer, directory: Path, megabytes: float) -> int:
    """Most memory held while a corpus of that size is made into tokens and held-out windows."""
    directory.mkdir()
    assert load_script(SCRIPT).write_corpus(directory, megabytes) >= megabytes * 1e6
    config = PretrainConfig.load(directory / "recipe.yaml")
    give_back()
    with runs.Run(directory / "out") as run, PeakMemory() as memory:
        corpus = Corpus.of(run, config, directory, Silent())
        read = corpus.read(config.sources[0])
        path = corpus.tokens(config.sources[0], tokenizer, read.left)
    assert len(read.windows) == config.evaluation_windows
    assert stream.TokenFile(path).text_bytes == read.left
    return memory.peak


def test_ten_times_the_text_takes_the_same_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.load(starter_path())
    monkeypatch.setattr(stream, "_BATCH", 16)  # a small share of the small corpus too
    peak(tokenizer, tmp_path / "warm", 1)  # fills what remembers words
    small, large = (peak(tokenizer, tmp_path / f"{size}", size) for size in (0.8, 8))
    assert large - small < NOISE
    kept, read = [], stream.documents

    def hoarded(source: stream.Source, base: Path) -> Iterator[stream.Document]:
        for document in read(source, base):
            kept.append(document)
            yield document

    monkeypatch.setattr(stream, "documents", hoarded)
    assert peak(tokenizer, tmp_path / "hoarded", 8) - small > NOISE, "control"
