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
from metier.graders.labels import labels_of
from metier.model.calibration import Calibration, mean_f1
from metier.records import Chat, Completion, Example, input_text
from metier.retrieval.lexical import tokenize
from metier.runs import write_atomic
from metier.task import Kind

STRENGTHS = (1.0, 10.0, 100.0)
"""Values of C, the inverse strength of the L2 penalty, among which validation chooses."""

_KINDS = ("word", "character")
_ABOUT = "classical.json"
_ARRAYS = "classical.safetensors"

Array = npt.NDArray[np.float32]


class Classical:
    """Answers with the most probable label, or all probable ones; satisfies `records.Generator`.

    One logistic regression per label (one against the rest, L2, liblinear) over TF-IDF of word
    1- and 2-grams and of character 2- to 5-grams within words, term frequencies sublinear, each
    of the two parts of unit length. Deterministic.

    Attributes:
        labels: the closed label set, sorted.
        strength: the C that validation chose.
        calibration: how its logits become answers, fitted on validation.

    """

    def __init__(
        self,
        vectorizers: Sequence[Any],
        weights: Array,
        labels: Sequence[str],
        strength: float,
        calibration: Calibration | None = None,
    ) -> None:
        self._vectorizers = vectorizers
        self._weights = weights
        self.labels = tuple(labels)
        self.strength = strength
        self.calibration = calibration or Calibration()

    @classmethod
    def fit(
        cls,
        train: Sequence[Example],
        validation: Sequence[Example],
        kind: Kind = "classification",
    ) -> Classical:
        """Train one classifier per strength, calibrate it and keep the best on validation.

        Args:
            train: what is learned.
            validation: what chooses the strength, and calibrates.
            kind: classification, or multi-label where a row may have several labels.

        Raises:
            DataError: the training part has fewer than two labels, or no words.

        """
        labels = sorted({label for row in train for label in labels_of(row.answer, kind)})
        if len(labels) < 2:
            raise DataError(
                "training part",
                f"has {len(labels)} different labels",
                "give examples of two labels at least, or leave out the arm 'classical'",
            )
        texts = [input_text(example.prompt) for example in train]
        vectorizers = [_fitted(one, texts) for one in _KINDS]
        features, wanted = _features(vectorizers, texts), _marks(train, labels, kind)
        fitted = [
            cls(vectorizers, _logistic(features, wanted, strength), labels, strength)
            for strength in STRENGTHS
        ]
        for one in fitted:
            one._calibrate(validation, kind)
        return max(fitted, key=lambda one: one._score(validation, kind))

    def generate(self, chats: Sequence[Chat]) -> list[Completion]:
        """The answer to each chat, by the text of all its turns."""
        logits = self.logits([input_text(chat) for chat in chats], one=self._one)
        return self.calibration.answers(logits, self.labels, [0] * len(chats))

    @property
    def _one(self) -> bool:
        """Whether every text has one label."""
        return self.calibration.threshold is None

    def logits(self, texts: Sequence[str], *, one: bool = True) -> npt.NDArray[np.float64]:
        """Logits of the labels, shape (texts, labels), not yet divided by the temperature.

        Args:
            texts: what is read.
            one: whether they are those of a choice among the labels, or of each label alone.

        """
        from scipy.special import log_expit

        if not texts:
            return np.empty((0, len(self.labels)))
        scores = _features(self._vectorizers, texts) @ self._weights[:, :-1].T
        scores = scores + self._weights[:, -1]
        return np.asarray(log_expit(scores) if one else scores, dtype=np.float64)

    def _calibrate(self, examples: Sequence[Example], kind: Kind) -> None:
        several = kind == "multi-label"
        known = [row for row in examples if several or row.answer in self.labels]
        if known:
            logits = self.logits([input_text(row.prompt) for row in known], one=not several)
            wanted = _marks(known, self.labels, kind)
            self.calibration = Calibration.fitted(logits, wanted, several=several)

    def _score(self, examples: Sequence[Example], kind: Kind) -> float:
        """Accuracy, or mean F1 of the labels of a row."""
        logits = self.logits([input_text(row.prompt) for row in examples], one=self._one)
        return mean_f1(self.calibration.chosen(logits), _marks(examples, self.labels, kind))

    def save(self, directory: Path) -> None:
        """Write the classifier into a directory: JSON and safetensors."""
        from safetensors.numpy import save

        about = {
            "labels": self.labels,
            "strength": self.strength,
            "temperature": self.calibration.temperature,
            "threshold": self.calibration.threshold,
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
            calibration = Calibration(about["temperature"], about["threshold"])
            found = about["labels"], about["strength"], calibration
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


def _marks(examples: Sequence[Example], labels: Sequence[str], kind: Kind) -> npt.NDArray[np.bool_]:
    """Which labels each example has, shape (examples, labels)."""
    sets = [set(labels_of(example.answer, kind)) for example in examples]
    return np.array([[label in own for label in labels] for own in sets])


def _logistic(features: Any, wanted: npt.NDArray[np.bool_], strength: float) -> Array:
    """Weights of one classifier per label, the intercept last: shape (labels, terms + 1)."""
    from sklearn.linear_model import LogisticRegression

    rows, labels = wanted.shape
    weights = np.zeros((labels, features.shape[1] + 1), dtype=np.float32)
    for label, own in enumerate(wanted.T):
        if own.all():  # there is nothing to tell it from
            weights[label, -1] = np.log(2 * rows + 1)
            continue
        model = LogisticRegression(C=strength, solver="liblinear").fit(features, own)
        weights[label] = np.append(model.coef_[0], model.intercept_)
    return weights
