from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.errors import DataError
from metier.retrieval.lexical import LexicalIndex, tokenize

TEXTS = (
    "the card has not arrived",
    "the card was stolen, the card is gone",
    "where is my refund",
    "call get_user_name() or parseHTTPResponse",
)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The CARD, the card.", ["the", "card", "the", "card"]),
        ("getUserName", ["getusername", "get", "user", "name"]),
        ("parseHTTPResponse_v2", ["parsehttpresponse_v2", "parse", "http", "response", "v2"]),
        ("__init__", ["__init__", "init"]),
        ("os.path.join", ["os", "path", "join"]),
        ("HTTP", ["http"]),
        ("Straße", ["strasse"]),
        ("ﬁne café", ["fine", "café"]),
        ("cafe\u0301", ["café"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("перевод денег", ["перевод", "денег"]),
        ("東京都", ["東京", "京都"]),
        ("水", ["水"]),
        ("ไทย", ["ไท", "ทย"]),
        ("", []),
        ("?! --", []),
    ],
)
def test_tokens(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens


def _bm25(query: str, texts: tuple[str, ...]) -> list[float]:
    """Robertson and Zaragoza (2009, eq. 3.15) with the idf of Lucene, term by term."""
    documents = [tokenize(text) for text in texts]
    average = sum(map(len, documents)) / len(documents)
    scores = []
    for words in documents:
        total = 0.0
        for term in tokenize(query):
            holding = sum(term in other for other in documents)
            idf = math.log1p((len(documents) - holding + 0.5) / (holding + 0.5))
            length = 1 - 0.75 + 0.75 * len(words) / average
            total += idf * words.count(term) / (words.count(term) + 1.5 * length)
        scores.append(total)
    return scores


@pytest.mark.parametrize("query", ["card", "the card arrived", "USER name", "refund card card"])
def test_scores_are_bm25(query: str) -> None:
    expected = _bm25(query, TEXTS)
    hits = LexicalIndex(TEXTS).search(query, len(TEXTS))
    assert {hit.position: hit.score for hit in hits} == pytest.approx(
        {at: score for at, score in enumerate(expected) if score > 0}
    )
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_equal_scores_keep_the_order_of_the_texts() -> None:
    index = LexicalIndex(["a b", "card x", "card y", "c d", "card z"])
    assert [hit.position for hit in index.search("card", 2)] == [1, 2]


def test_only_texts_that_share_a_word_are_found() -> None:
    index = LexicalIndex(TEXTS)
    assert index.search("zebra", 3) == []
    assert index.search("?!", 3) == []


@pytest.mark.parametrize(("texts", "cause"), [((), "no text to search"), (("", "…"), "a word")])
def test_nothing_to_index_is_refused(texts: tuple[str, ...], cause: str) -> None:
    with pytest.raises(DataError, match=cause):
        LexicalIndex(texts)


@given(st.lists(st.text(max_size=40), max_size=8), st.text(max_size=40), st.integers(1, 5))
def test_any_text_can_be_indexed_and_searched(texts: list[str], query: str, k: int) -> None:
    hits = LexicalIndex([*texts, "card"]).search(query, k)
    assert len(hits) <= k
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    for hit in hits:
        assert set(tokenize([*texts, "card"][hit.position])) & set(tokenize(query))


def test_ranking_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "import json; from metier.retrieval.lexical import LexicalIndex;"
        f"hits = LexicalIndex({TEXTS!r}).search('the card name is gone', 4);"
        "print(json.dumps([(h.position, h.score) for h in hits]))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert len(json.loads(runs[0])) >= 3
