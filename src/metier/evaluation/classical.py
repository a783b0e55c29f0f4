"""The classical arm: TF-IDF of words and characters, and logistic regression.

The honest cheap baseline for a closed label set. Its state is a vocabulary and a few arrays, so
it is kept without pickle.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from metier.errors import DataError, RunError
from metier.model.calibration import temperature
from metier.records import Chat, Completion, Example, input_text
from metier.retrieval.lexical import tokenize
from metier.runs import write_atomic

STRENGTHS = (1.0, 10.0, 100.0)
"""Values of C, the inverse strength of the L2 penalty, among which validation chooses."""

_KINDS = ("word", "character")
_ABOUT = "classical.json"
_ARRAYS = "classical.safetensors"

Array = npt.NDArray[np.float32]


class Classical:
    """Answers with the most probable label; satisfies `records.Generator`.

    One logistic regression per label (one against the rest, L2, liblinear) over TF-IDF of word
    1- and 2-grams and of character 2- to 5-grams within words, term frequencies sublinear, each
    of the two parts of unit length. Deterministic.

    Attributes:
        labels: the closed label set, sorted.
        strength: the C that validation chose.
        temperature: what logits are divided by before they become probabilities.

    """

    def __init__(
        self,
        vectorizers: Sequence[Any],
        weights: Array,
        labels: Sequence[str],
        strength: float,
        temperature: float = 1.0,
    ) -> None:
        self._vectorizers = vectorizers
        self._weights = weights
        self.labels = tuple(labels)
        self.strength = strength
        self.temperature = temperature

    @classmethod
    def fit(cls, train: Sequence[Example], validation: Sequence[Example]) -> Classical:
        """Train one classifier per strength, keep the most accurate on validation, calibrate it.

        Raises:
            DataError: the training part has fewer than two labels, or no words.

        """
        labels = sorted({example.answer for example in train})
        if len(labels) < 2:
            raise DataError(
                "training part",
                f"has {len(labels)} different labels",
                "give examples of two labels at least, or leave out the arm 'classical'",
            )
        texts = [input_text(example.prompt) for example in train]
        vectorizers = [_fitted(kind, texts) for kind in _KINDS]
        features = _features(vectorizers, texts)
        answers = np.array([labels.index(example.answer) for example in train])
        fitted = (
            cls(vectorizers, _logistic(features, answers, len(labels), strength), labels, strength)
            for strength in STRENGTHS
        )
        best = max(fitted, key=lambda one: one._accuracy(validation))
        best._calibrate([row for row in validation if row.answer in labels])
        return best

    def generate(self, chats: Sequence[Chat]) -> list[Completion]:
        """The most probable label of each chat, by the text of all its turns."""
        from scipy.special import softmax

        logits = self.logits([input_text(chat) for chat in chats])
        sure, before = (softmax(one, axis=1).max(1) for one in (logits / self.temperature, logits))
        return [
            Completion(self.labels[best], probability=float(now), uncalibrated=float(then))
            for best, now, then in zip(logits.argmax(1), sure, before, strict=True)
        ]

    def logits(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Logits of the labels, shape (texts, labels), not yet divided by the temperature."""
        from scipy.special import log_expit

        if not texts:
            return np.empty((0, len(self.labels)))
        scores = _features(self._vectorizers, texts) @ self._weights[:, :-1].T
        return np.asarray(log_expit(scores + self._weights[:, -1]))

    def _calibrate(self, examples: Sequence[Example]) -> None:
        if examples:
            logits = self.logits([input_text(example.prompt) for example in examples])
            self.temperature = temperature(logits, [self.labels.index(e.answer) for e in examples])

    def _accuracy(self, examples: Sequence[Example]) -> float:
        answers = self.generate([example.prompt for example in examples])
        pairs = zip(answers, examples, strict=True)
        return sum(answer.text == example.answer for answer, example in pairs) / len(examples)

    def save(self, directory: Path) -> None:
        """Write the classifier into a directory: JSON and safetensors."""
        from safetensors.numpy import save

        about = {
            "labels": self.labels,
            "strength": self.strength,
            "temperature": self.temperature,
            "terms": [
                sorted(one.vocabulary_, key=one.vocabulary_.get) for one in self._vectorizers
            ],
        }
        arrays = {f"idf.{at}": one.idf_ for at, one in enumerate(self._vectorizers)}
        write_atomic(directory / _ARRAYS, save({"weights": self._weights, **arrays}))
        write_atomic(directory / _ABOUT, json.dumps(about))

    @classmethod
    def load(cls, directory: Path) -> Classical:
        """Read what `save` wrote; its answers are the same.

        Raises:
            RunError: a file is missing or damaged.

        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            about = json.loads((directory / _ABOUT).read_text(encoding="utf-8"))
            arrays = load_file(directory / _ARRAYS)
            vectorizers = [
                _restored(kind, about["terms"][at], arrays[f"idf.{at}"])
                for at, kind in enumerate(_KINDS)
            ]
            found = about["labels"], about["strength"], about["temperature"]
            return cls(vectorizers, arrays["weights"], *found)
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            raise RunError(
                str(directory), f"holds no whole classical model ({error})", "run the task again"
            ) from None


def _vectorizer(kind: str, terms: Sequence[str] | None = None) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    if kind == "character":
        analysis: dict[str, Any] = {"analyzer": "char_wb", "ngram_range": (2, 5)}
    else:
        # `tokenize` folds case itself, after it has found the parts of identifiers.
        analysis = {"tokenizer": tokenize, "lowercase": False, "ngram_range": (1, 2)}
        analysis["token_pattern"] = None
    return TfidfVectorizer(**analysis, vocabulary=terms, sublinear_tf=True, dtype=np.float32)


def _fitted(kind: str, texts: Sequence[str]) -> Any:
    try:
        return _vectorizer(kind).fit(texts)
    except ValueError:
        raise DataError(
            "training part", "holds no words", "give inputs with words, or leave out 'classical'"
        ) from None


def _restored(kind: str, terms: Sequence[str], idf: Array) -> Any:
    vectorizer = _vectorizer(kind, terms)
    vectorizer.idf_ = idf
    return vectorizer


def _features(vectorizers: Sequence[Any], texts: Sequence[str]) -> Any:
    """Sparse TF-IDF matrix, shape (texts, terms of all vectorizers)."""
    from scipy.sparse import hstack

    return hstack([one.transform(texts) for one in vectorizers], format="csr")


def _logistic(features: Any, answers: npt.NDArray[np.int64], labels: int, strength: float) -> Array:
    """Weights of one classifier per label, the intercept last: shape (labels, terms + 1)."""
    from sklearn.linear_model import LogisticRegression

    weights = np.empty((labels, features.shape[1] + 1), dtype=np.float32)
    for label in range(labels):
        model = LogisticRegression(C=strength, solver="liblinear").fit(features, answers == label)
        weights[label] = np.append(model.coef_[0], model.intercept_)
    return weights
