from __future__ import annotations

import random
import re
import string
from collections import Counter
from pathlib import Path

import nltk.translate.gleu_score
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from metier.errors import ConfigError
from metier.graders import load_grader
from metier.graders.similarity import words

METRICS = [
    "token_f1",
    "chrf",
    "rouge_l",
    "rouge_1",
    "rouge_2",
    "rouge_3",
    "rouge_4",
    "rouge_5",
    "bleu",
    "gleu",
    "fuzzy_match",
]
WORDS = ["the", "a", "cat", "sat", "on", "mat", "Mat.", "well-known", "it's", "42", "no!"]


def sentence_pairs(n: int = 200) -> list[tuple[str, str]]:
    rng = random.Random(5)
    return [
        (" ".join(rng.choices(WORDS, k=rng.randint(1, 12))), " ".join(rng.choices(WORDS, k=7)))
        for _ in range(n)
    ]


def grade(example, metric: str, output: str, expected: str):
    spec = {"type": "text_similarity", "evaluation_metric": metric}
    return load_grader(spec, "expansion", [], Path()).grade(output, example(expected))


@pytest.mark.parametrize("metric", ["rouge_1", "rouge_2", "rouge_l"])
def test_rouge_equals_googles_scorer(example, metric):
    name = {"rouge_l": "rougeL"}.get(metric, metric.replace("_", ""))
    oracle = rouge_scorer.RougeScorer([name], use_stemmer=False)
    for output, expected in sentence_pairs():
        theirs = oracle.score(expected, output)[name]
        if words(output) == words(expected):
            continue  # shorter than n words: theirs is 0, ours 1
        ours = grade(example, metric, output, expected)
        assert ours.value == pytest.approx(theirs.fmeasure)
        assert ours.parts["precision"] == pytest.approx(theirs.precision)
        assert ours.parts["recall"] == pytest.approx(theirs.recall)


def test_gleu_equals_nltk(example):
    for output, expected in sentence_pairs():
        theirs = nltk.translate.gleu_score.sentence_gleu([words(expected)], words(output))
        assert grade(example, "gleu", output, expected).value == pytest.approx(theirs)


def squad_f1(prediction: str, truth: str) -> float:
    """Second implementation: one word at a time, as a person would count."""

    def clean(text: str) -> list[str]:
        kept = "".join(c for c in text.lower() if c not in string.punctuation)
        return [w for w in kept.split() if w not in ("a", "an", "the")]

    left = clean(truth)
    total = len(left) + len(clean(prediction))
    shared = 0
    for word in clean(prediction):
        if word in left:
            left.remove(word)
            shared += 1
    return 1.0 if total == 0 else 2 * shared / total


def test_token_f1_equals_a_second_implementation(example):
    for output, expected in sentence_pairs():
        score = grade(example, "token_f1", output, expected)
        assert score.value == pytest.approx(squad_f1(output, expected))


@pytest.mark.parametrize(
    ("output", "expected", "value"),
    [
        # Shared n-grams: 3 of 6 and 3 letters, 2 of 5 and 2 pairs, 1 of 4 and 1 triple. The mean
        # precision is 23/60, the mean recall 1; F2 counts recall four times.
        ("the cat", "cat", 115 / 152),
        ("cat", "the cat", 115 / 263),
        # 2 of 3 letters, 1 of 2 pairs, no triple.
        ("Cat", "cat", 7 / 18),
        ("c at", "ca t", 1),
    ],
)
def test_chrf_is_the_mean_f2_of_shared_character_ngrams(example, output, expected, value):
    assert grade(example, "chrf", output, expected).value == pytest.approx(value)


def test_scripts_without_spaces_are_compared_by_character(example):
    assert words("東京は晴れ, Tokyo 2024") == ["東", "京", "は", "晴", "れ", "tokyo", "2024"]
    for metric in ("token_f1", "rouge_l"):
        assert 0 < grade(example, metric, "東京は雨", "東京は晴れ").value < 1


@pytest.mark.parametrize("metric", METRICS)
@given(output=st.text(max_size=40), expected=st.text(max_size=40))
def test_any_texts_get_a_value_from_0_to_1(example, metric, output, expected):
    assert 0 <= grade(example, metric, output, expected).value <= 1


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("text", ["", "word", "some words, and (more) of them!", "東京"])
def test_the_same_text_is_worth_1(example, metric, text):
    assert grade(example, metric, text, text).value == pytest.approx(1)


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_in_common_is_worth_0(example, metric):
    assert grade(example, metric, "xyz", "bcd").value == 0
    assert grade(example, metric, "", "bcd").value == 0


@pytest.mark.parametrize("metric", ["cosine", "meteor"])
def test_metrics_that_need_a_model_are_refused_by_name(example, metric):
    with pytest.raises(ConfigError, match=f"'{metric}' needs a model.*token_f1"):
        grade(example, metric, "a", "b")


def test_the_explanation_tells_precision_and_recall(example):
    score = grade(example, "token_f1", "red fox", "red dog with tail")
    assert re.search(r"token_f1 0\.33, precision 0\.50, recall 0\.25", score.explanation)
    assert Counter(score.parts) == Counter({"precision": 0.5, "recall": 0.25})
