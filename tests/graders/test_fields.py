from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support

from metier.errors import DataError
from metier.graders import load_grader

SCALARS = st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


def grade(example, output, expected, **options):
    grader = load_grader({"type": "json_fields", **options}, "extraction", [], Path())
    return grader.grade(json.dumps(output), example(json.dumps(expected)))


def grade_text(example, output, expected='{"a": 1}'):
    return load_grader("fields", "extraction", [], Path()).grade(output, example(expected))


@pytest.mark.parametrize(
    ("output", "expected", "value"),
    [
        ({"a": 1, "b": "x"}, {"b": "x", "a": 1.0}, 1),
        ({"a": "two  words "}, {"a": "two words"}, 1),
        ({"a": "Leeds"}, {"a": "leeds"}, 0),
        ({"a": 1}, {"a": "1"}, 0),
        ({"a": True}, {"a": 1}, 0),
        ({"a": None}, {"a": None}, 1),
        ({}, {}, 1),
        ({}, {"a": None}, 0),
        ({"a": []}, {"a": []}, 1),
        ({"a": []}, {"a": ["x"]}, 0),
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 2, "b": 9}}, 1 / 2),
        ({"a.b": 1}, {"a": {"b": 1}}, 0),
        ({"a": ["x", "y"]}, {"a": ["y", "x"]}, 1),
        ({"a": ["x", "x"]}, {"a": ["x"]}, 2 / 3),
        ({"a": [1, 2]}, {"a": [2, 1]}, 0),
        ({"p": [[0, 1], [2, 3]]}, {"p": [[2, 3], [0, 1]]}, 0),
        ([{"n": 1, "m": [2.0]}, {"n": 2}], [{"n": 2}, {"m": [2], "n": 1}], 1),
        ([{"n": 1}, {"n": 3}], [{"n": 2}, {"n": 1}], 1 / 2),
        (5, 5.0, 1),
    ],
)
def test_fields_are_compared_by_meaning(example, output, expected, value):
    assert grade(example, output, expected).value == pytest.approx(value)


def test_case_counts_unless_asked(example):
    assert grade(example, {"a": "LEEDS"}, {"a": "leeds"}, ignore_case=True).value == 1
    assert grade(example, {"A": "leeds"}, {"a": "leeds"}, ignore_case=True).value == 0


@pytest.mark.parametrize(
    "output",
    [
        "",
        "no json",
        '{"a": 1',
        '{"a": 1} and more',
        '{"a": NaN}',
        "[" * 100_000,
        "9" * 5_000,
        "{'a': 1}",
    ],
)
def test_an_output_that_is_not_json_scores_0_and_says_so(example, output):
    score = grade_text(example, output)
    assert (score.value, score.parts["valid_json"]) == (0, 0)
    assert "is not JSON" in score.explanation


def test_a_code_fence_around_the_json_is_allowed(example):
    score = grade_text(example, '```json\n{"a": 1}\n```')
    assert (score.value, score.parts["valid_json"]) == (1, 1)
    assert grade_text(example, 'Here:\n```json\n{"a": 1}\n```').value == 0


def test_the_explanation_names_what_is_missing_and_what_is_too_much(example):
    score = grade(example, {"total": "9.00", "date": "x"}, {"total": "9.50", "date": "x"})
    assert score.explanation.startswith("1 of 2 expected fields right")
    assert "not found: 'total = \"9.50\"'" in score.explanation
    assert "not expected: 'total = \"9.00\"'" in score.explanation


def test_expected_outputs_that_are_not_json_are_refused_before_anything_runs(example):
    with pytest.raises(DataError, match=r"expected output 2.*is not JSON") as caught:
        load_grader("fields", "extraction", ['{"a": 1}', "plain"], Path())
    assert "another grader" in caught.value.remedy


def test_micro_f1_equals_sklearn_on_flat_objects(example):
    rng = random.Random(0)
    for _ in range(50):
        gold = {k: rng.randint(0, 2) for k in "abcdef" if rng.random() < 0.7} | {"z": 0}
        found = {k: rng.randint(0, 2) for k in "abcdef" if rng.random() < 0.7} | {"z": 0}
        units = sorted(set(gold.items()) | set(found.items()))
        precision, recall, f1, _ = precision_recall_fscore_support(
            [unit in gold.items() for unit in units],
            [unit in found.items() for unit in units],
            average="binary",
        )
        score = grade(example, found, gold)
        assert score.value == pytest.approx(f1)
        assert (score.parts["precision"], score.parts["recall"]) == pytest.approx(
            (precision, recall)
        )


def shuffled(value, rng):
    """The same value to a reader who does not care for order."""
    if isinstance(value, dict):
        items = [(k, shuffled(v, rng)) for k, v in value.items()]
        rng.shuffle(items)
        return dict(items)
    if isinstance(value, list):
        inner = [shuffled(item, rng) for item in value]
        if any(isinstance(item, str | dict | bool) or item is None for item in inner):
            rng.shuffle(inner)
        return inner
    return value


@given(value=VALUES, seed=st.integers(0, 99))
def test_order_of_keys_and_items_never_matters(example, value, seed):
    assert grade(example, shuffled(value, random.Random(seed)), value).value == 1


@given(first=VALUES, second=VALUES)
def test_scores_are_symmetric_and_between_0_and_1(example, first, second):
    score = grade(example, first, second)
    assert 0 <= score.value <= 1
    assert grade(example, second, first).value == pytest.approx(score.value)


@given(output=st.text(max_size=30))
def test_any_output_gets_a_score(example, output):
    assert 0 <= grade_text(example, output).value <= 1


def test_real_receipts_are_graded_by_field(example, data_dir):
    with (data_dir / "sroie" / "receipts.jsonl").open(encoding="utf-8") as lines:
        fields = [json.loads(line)["fields"] for line in lines]
    grader = load_grader("auto", "extraction", [json.dumps(row) for row in fields], Path())
    assert grader.name == "fields"
    for row in fields[:100]:
        gold = example(json.dumps(row))
        assert grader.grade(json.dumps(row, indent=2), gold).value == 1
        wrong = {**row, next(iter(row)): "something else"}
        assert grader.grade(json.dumps(wrong), gold).value == pytest.approx(1 - 1 / len(row))
