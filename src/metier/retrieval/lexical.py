"""BM25 over words: the index of the core, with no model and no file."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np

from metier.errors import DataError
from metier.retrieval.index import Hit, require_texts

# Scripts written without spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_HUMPS = re.compile(r"_+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_LAST_MARK = 0x1FFFF


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    r"""Patterns of words and of runs of an unspaced script.

    Python's ``\w`` leaves out combining marks, which would cut Hindi or Tamil inside a word.
    """
    characters = map(chr, range(_LAST_MARK))
    marks = "".join(c for c in characters if unicodedata.category(c).startswith("M"))
    word = re.compile(rf"\w[\w{re.escape(marks)}]*")
    return word, re.compile(rf"[{_UNSPACED}]+")


def tokenize(text: str) -> list[str]:
    """Words of a text, case folded, each as often as it occurs.

    A compound identifier gives itself and its parts (``getUserName``: getusername, get, user,
    name); a run of a script written without spaces gives its pairs of neighbouring characters.
    """
    words, unspaced = _patterns()
    tokens: list[str] = []
    for word in words.findall(unicodedata.normalize("NFKC", text)):
        spaced = unspaced.sub(" ", word).split()
        for run in unspaced.findall(word):
            tokens.extend(run[at : at + 2] for at in range(max(1, len(run) - 1)))
        for part in spaced:
            tokens.extend(_identifier(part))
    return tokens


def _identifier(word: str) -> list[str]:
    parts = [part.casefold() for part in _HUMPS.split(word) if part]
    whole = word.casefold()
    return [whole] if parts in ([whole], []) else [whole, *parts]


class LexicalIndex:
    """Okapi BM25 (k1 1.5, b 0.75, Lucene's idf) over `tokenize`.

    Raises:
        DataError: there is no text, or no text holds a word.

    """

    def __init__(self, texts: Sequence[str]) -> None:
        require_texts(texts)
        import bm25s

        tokens = [tokenize(text) for text in texts]
        if not any(tokens):
            raise DataError("retrieval", "no text holds a word", "give texts with words in them")
        self._bm25 = bm25s.BM25(method="lucene", k1=1.5, b=0.75, dtype="float64")
        self._bm25.index(tokens, show_progress=False)

    def search(self, query: str, k: int) -> list[Hit]:
        """The at most `k` best texts that share a word with the query, best first."""
        tokens = tokenize(query)
        if not tokens:
            return []
        scores = self._bm25.get_scores(tokens)
        matching = np.flatnonzero(scores > 0)
        best = matching[np.argsort(-scores[matching], kind="stable")][:k]
        return [Hit(int(position), float(scores[position])) for position in best]
