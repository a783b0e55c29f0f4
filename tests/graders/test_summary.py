from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support
from sklearn.preprocessing import MultiLabelBinarizer

from metier.graders import LabelSet, load_grader, summarise
from metier.graders.labels import read_labels, write_labels


def graded(grader, example, rows):
    return [
        (output, row, grader.grade(output, row))
        for output, row in ((output, example(expected)) for output, expected in rows)
    ]


def test_classification_metrics_equal_sklearn(example):
    rng = random.Random(3)
    labels = ["card lost", "card late", "fees", "limit", "unused"]
    rows = [(rng.choice([*labels, "nonsense"]), rng.choice(labels[:4])) for _ in range(300)]
    grader = load_grader("auto", "classification", labels, Path())
    metrics = summarise("classification", grader, graded(grader, example, rows), labels)
    answered, true = zip(*rows, strict=True)
    assert metrics["accuracy"] == metrics["exact"] == pytest.approx(accuracy_score(true, answered))
    expected = f1_score(true, answered, labels=labels[:4], average="macro", zero_division=0)
    assert metrics["macro_f1"] == pytest.approx(expected)
    assert metrics["invalid_answers"] == pytest.approx(answered.count("nonsense") / 300)


def test_an_expected_label_outside_the_set_is_never_right(example):
    grader = load_grader("exact", "classification", ["a"], Path())
    rows = graded(grader, example, [("a", "a"), ("odd", "odd")])
    metrics = summarise("classification", grader, rows, ["a"])
    assert metrics["accuracy"] == 0.5
    assert metrics["invalid_answers"] == 0.5


def test_extraction_metrics_are_means_of_parts(example):
    grader = load_grader("fields", "extraction", [], Path())
    gold = '{"a": 1, "b": 2}'
    rows = graded(grader, example, [(gold, gold), ('{"a": 1}', gold), ("oops", gold)])
    metrics = summarise("extraction", grader, rows)
    assert metrics == pytest.approx(
        {
            "fields": (1 + 2 / 3 + 0) / 3,
            "precision": 2 / 3,
            "recall": 1.5 / 3,
            "valid_json": 2 / 3,
            "exact": 1 / 3,
        }
    )


def test_span_metrics_equal_sklearn_on_who_names_what(example):
    """Oracle: one row of 0 and 1 for each span that the sentence or the answer has, numbered."""
    rng = random.Random(5)
    names = ["Ada", "Rome", "New  York", "Zoe\u0301"]

    def drawn():
        return {
            kind: [rng.choice(names) for _ in range(rng.randint(1, 3))]
            for kind in rng.sample(["person", "place"], rng.randint(0, 2))
        }

    rows = [(json.dumps(drawn()), json.dumps(drawn())) for _ in range(120)]
    rows += [("no JSON", '{"place": ["Rome"]}'), ('["Rome"]', '{"place": ["Rome"]}'), ("{}", "{}")]
    grader = load_grader("auto", "extraction", [gold for _, gold in rows], Path())
    metrics = summarise("extraction", grader, graded(grader, example, rows))
    answered, true = [], []
    for output, gold in rows:
        sets = []
        for text in (output, gold):
            counts, numbered = {}, set()
            value = json.loads(text) if text.startswith("{") else {}
            for kind, texts in value.items():
                for one in texts:
                    counts[kind, one] = counts.get((kind, one), 0) + 1
                    numbered.add((kind, one, counts[kind, one]))
            sets.append(numbered)
        for span in sets[0] | sets[1]:
            answered.append(span in sets[0])
            true.append(span in sets[1])
    scores = precision_recall_fscore_support(true, answered, average="binary")
    found = [metrics[f"span_{name}"] for name in ("precision", "recall", "f1")]
    assert found == pytest.approx(scores[:3])
    assert 0.1 < found[2] < 0.9


def test_other_answers_have_no_span_metrics(example):
    grader = load_grader("fields", "extraction", [], Path())
    for gold in ('{"a": 1}', '["a"]', "{}"):
        rows = graded(grader, example, [('{"a": ["x"]}', gold)])
        assert not any(name.startswith("span") for name in summarise("extraction", grader, rows))


def test_nothing_graded_has_no_metrics():
    assert summarise("expansion", load_grader("exact", "expansion", [], Path()), []) == {}


def test_labels_ignore_white_space_and_case_but_keep_labels_apart():
    labels = LabelSet(["Card lost", "fees"])
    assert [labels.row(t) for t in (" card  LOST", "fees", "fee", "")] == [0, 1, 2, 2]
    strict = LabelSet(["us", "US"])
    assert [strict.row(t) for t in ("us", "US", "Us")] == [0, 1, 2]


def test_metrics_of_several_labels_equal_sklearn(example):
    rng = random.Random(3)
    labels = ["anger", "joy", "love", "unused"]

    def drawn(count):
        return write_labels(rng.sample(labels[:3], rng.randrange(count)))

    rows = [(drawn(4), drawn(4)) for _ in range(200)]
    grader = load_grader("auto", "multi-label", [], Path())
    assert grader.name == "fields"
    metrics = summarise("multi-label", grader, graded(grader, example, rows), labels)
    marks = MultiLabelBinarizer(classes=labels[:3])
    answered, true = (
        marks.fit_transform(map(read_labels, side)) for side in zip(*rows, strict=True)
    )
    for average in ("micro", "macro"):
        expected = f1_score(true, answered, average=average, zero_division=0)
        assert metrics[f"{average}_f1"] == pytest.approx(expected)
    assert metrics["exact"] == pytest.approx(accuracy_score(true, answered))
    assert metrics["invalid_answers"] == 0
    expected = f1_score(true, answered, average="samples", zero_division=1)
    assert metrics["fields"] == pytest.approx(expected), "the mean F1 of a row's labels"


def test_what_is_no_list_of_labels_is_invalid_and_names_none(example):
    grader = load_grader("auto", "multi-label", [], Path())
    rows = [("joy", '["joy"]'), ('["hate"]', "[]"), ('{"a":', "[]"), ('["joy"]', '["joy"]')]
    metrics = summarise("multi-label", grader, graded(grader, example, rows), ["joy"])
    assert metrics["invalid_answers"] == 0.75
    assert metrics["micro_f1"] == pytest.approx(2 / 4)
    assert metrics["exact"] == 0.25
