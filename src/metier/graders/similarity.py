"""Graders of likeness between two texts: OpenAI's `text_similarity`, with token F1 and chrF.

Words are runs of letters and digits in lower case; characters of scripts written without spaces
(Chinese, Japanese, Thai, Lao, Khmer, Burmese) are words of their own. Two texts without any word
are alike (1) when both are empty of words, else 0.

Not offered, because each would need a model or a word net: `cosine` and `meteor`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from pydantic import field_validator

from metier.graders.base import Comparison
from metier.graders.wording import quote
from metier.records import Score

Metric = Literal[
    "fuzzy_match",
    "bleu",
    "gleu",
    "rouge_1",
    "rouge_2",
    "rouge_3",
    "rouge_4",
    "rouge_5",
    "rouge_l",
    "token_f1",
    "chrf",
]

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_SQUAD_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class TextSimilarity(Comparison):
    """OpenAI's `text_similarity`: how alike the answer and the reference are, 0 to 1."""

    type: Literal["text_similarity"] = "text_similarity"
    """Always `text_similarity`."""
    name: str = "text_similarity"
    """How reports call it."""
    evaluation_metric: Metric
    """token_f1 (SQuAD), rouge_l, rouge_1 to rouge_5 (F1), chrf (chrF2), bleu, gleu, fuzzy_match."""

    @field_validator("evaluation_metric", mode="before")
    @classmethod
    def _offered(cls, metric: Any) -> Any:
        if metric in ("cosine", "meteor"):
            raise ValueError(
                f"'{metric}' needs a model and is not offered; use {', '.join(get_args(Metric))}"
            )
        return metric

    def compare(self, given: str, expected: str) -> Score:
        """Likeness under the metric, with precision and recall where it has them."""
        parts = _METRICS[self.evaluation_metric](given, expected)
        value = parts.pop("value")
        details = "".join(f", {name} {part:.2f}" for name, part in parts.items())
        explanation = (
            f"{self.evaluation_metric} {value:.2f}{details} against the expected {quote(expected)}"
        )
        return Score(value, given, explanation, parts)


def words(text: str) -> list[str]:
    """Words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def token_f1(given: str, expected: str) -> dict[str, float]:
    """F1 of shared words after lower-casing and removing punctuation and articles.

    The measure of SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250).
    """
    return _overlap(Counter(_squad_words(given)), Counter(_squad_words(expected)))


def rouge_l(given: str, expected: str) -> dict[str, float]:
    """F1 of the longest common subsequence of words (Lin 2004, ROUGE-L of one sentence)."""
    from rapidfuzz.distance import LCSseq

    first, second = words(given), words(expected)
    return _f1(LCSseq.similarity(first, second), len(first), len(second))


def chrf(given: str, expected: str) -> dict[str, float]:
    """Mean F2 of shared character n-grams, n = 1 to 6 (Popović 2015), as sacrebleu has it."""
    from sacrebleu import sentence_chrf

    if not given.strip() and not expected.strip():
        return {"value": 1.0}
    return {"value": min(1.0, sentence_chrf(given, [expected]).score / 100)}


def _squad_words(text: str) -> list[str]:
    text = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))
    return _SQUAD_WORD.findall(text)


def _rouge_n(n: int) -> Callable[[str, str], dict[str, float]]:
    def measure(given: str, expected: str) -> dict[str, float]:
        first, second = words(given), words(expected)
        if first == second:  # also where the text is shorter than n words
            return _f1(1, 1, 1)
        if max(len(first), len(second)) < n:
            return _f1(0, 1, 1)
        return _overlap(Counter(_ngrams(first, n)), Counter(_ngrams(second, n)))

    return measure


def _gleu(given: str, expected: str) -> dict[str, float]:
    """The smaller of precision and recall of 1- to 4-grams (Wu et al. 2016, arXiv 1609.08144)."""
    first, second = words(given), words(expected)
    both = [Counter(gram for n in range(1, 5) for gram in _ngrams(w, n)) for w in (first, second)]
    parts = _overlap(*both)
    return parts | {"value": min(parts["precision"], parts["recall"])}


def _bleu(given: str, expected: str) -> dict[str, float]:
    from sacrebleu import sentence_bleu

    if not given.strip() and not expected.strip():
        return {"value": 1.0}
    return {"value": min(1.0, sentence_bleu(given, [expected]).score / 100)}


def _fuzzy_match(given: str, expected: str) -> dict[str, float]:
    from rapidfuzz import fuzz

    return {"value": fuzz.ratio(given, expected) / 100}


def _ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _overlap(given: Counter[Any], expected: Counter[Any]) -> dict[str, float]:
    return _f1((given & expected).total(), given.total(), expected.total())


def _f1(shared: int, given: int, expected: int) -> dict[str, float]:
    """Precision, recall and F1; two empty texts agree."""
    if given == expected == 0:
        return {"value": 1.0, "precision": 1.0, "recall": 1.0}
    return {
        "value": 2 * shared / (given + expected),
        "precision": shared / given if given else 0.0,
        "recall": shared / expected if expected else 0.0,
    }


_METRICS: dict[str, Callable[[str, str], dict[str, float]]] = {
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    **{f"rouge_{n}": _rouge_n(n) for n in range(1, 6)},
    "chrf": chrf,
    "bleu": _bleu,
    "gleu": _gleu,
    "fuzzy_match": _fuzzy_match,
}
