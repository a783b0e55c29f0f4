"""Confusion: counts agree with scikit-learn's, and the picture with the counts."""

from __future__ import annotations

import re

import pytest
from sklearn.metrics import confusion_matrix

from metier.evaluation.confusion import MOST_LABELS, NO_LABEL, confusion_of
from metier.evaluation.schema import ArmDetails

from .html_tree import Node, read
from .sample_verdicts import LABELS, SCRIPT, confusion


def details(labels, counts) -> ArmDetails:
    return ArmDetails(arm="lora", labels=labels, confusion=counts)


def oracle(labels, counts):
    """The same counts by scikit-learn, from one pair of labels per example."""
    names = [*labels, NO_LABEL]
    expected = [names[e] for e, _, n in counts for _ in range(n)]
    answered = [names[min(a, len(labels))] for _, a, n in counts for _ in range(n)]
    matrix = confusion_matrix(expected, answered, labels=names)
    return {
        (row, column): int(matrix[i, j])
        for i, row in enumerate(names)
        for j, column in enumerate(names)
    }


def drawn(picture: Node) -> dict[tuple[str, str], int]:
    """(row label, column label) -> count of every square, by where it stands."""
    number = r"(-?[\d.]+)"
    rows, columns = {}, {}
    texts = list(picture.all("text"))
    for text in texts:
        turned = re.match(rf"translate\({number},", text.attributes.get("transform", ""))
        if turned:
            columns[float(turned.group(1))] = text.text
        elif text.attributes.get("text-anchor") == "end":
            rows[float(text["y"])] = text.text
    squares = {}
    for square in picture.all("rect"):
        if "ground" in square["class"]:
            continue
        x, y, side = float(square["x"]), float(square["y"]), float(square["width"])
        title = square.one("title").inside[0]
        row, column = rows[y + side / 2], columns[x + side / 2]
        said = re.fullmatch(r"(.*) → (.*): (\d+) of (\d+)", title)
        assert said.group(1).startswith(row.rstrip("…"))
        assert said.group(2).startswith(column.rstrip("…"))
        assert ("hit" in square["class"].split()) == (said.group(1) == said.group(2))
        squares[said.group(1), said.group(2)] = int(said.group(3))
    return squares


@pytest.mark.parametrize(("labels", "each"), [(LABELS[:5], 40), (LABELS[:30], 9), (LABELS, 20)])
def test_counts_and_picture_agree_with_scikit_learn(labels, each):
    counts = confusion(labels, each, 0.1)
    found = confusion_of(details(labels, counts))
    right = oracle(labels, counts)
    assert {pair: n for pair, n in right.items() if n} == drawn(read(str(found.heat_map)))
    for row in found.labels:
        assert row.total == sum(n for (e, _), n in right.items() if e == row.label) == each
        assert row.right == right[row.label, row.label]
        if row.mistaken:
            wrong = [n for (e, a), n in right.items() if e == row.label and a != e]
            assert row.mistaken == max(wrong) == right[row.label, row.mistaken_for]
    assert found.total == each * len(labels)
    assert found.mistakes == found.total - sum(right[label, label] for label in labels)


def test_a_square_that_was_moved_is_noticed():
    counts = confusion(LABELS[:5], 10, 0.1)
    picture = read(str(confusion_of(details(LABELS[:5], counts)).heat_map))
    square = next(s for s in picture.all("rect") if "hit" in s["class"])
    square.attributes["x"] = str(float(square["x"]) + float(square["width"]))
    with pytest.raises(AssertionError):
        drawn(picture)


def test_the_worst_pairs_come_first_and_labels_with_most_mistakes_too():
    counts = ((0, 0, 5), (0, 1, 3), (1, 1, 9), (1, 2, 1), (2, 0, 4), (2, 3, 6), (2, 2, 1))
    found = confusion_of(details(("a", "b", "c"), counts))
    pairs = [(p.expected, p.answered, p.count, p.total) for p in found.pairs]
    assert pairs == [("c", NO_LABEL, 6, 11), ("c", "a", 4, 11), ("a", "b", 3, 8), ("b", "c", 1, 10)]
    assert [row.label for row in found.labels] == ["c", "a", "b"]


def test_labels_past_the_most_that_can_be_drawn_are_counted_in_words():
    labels = tuple(f"label {i}" for i in range(130))
    found = confusion_of(details(labels, confusion(labels, 3, 0.2)))
    assert found.undrawn == 30
    assert len(found.labels) == 130
    picture = read(str(found.heat_map))
    rows = [text.text for text in picture.all("text") if text.attributes.get("text-anchor")]
    assert rows == [row.label for row in found.labels[:MOST_LABELS]]
    assert {row for row, _ in drawn(picture)} <= set(rows)


def test_without_labels_there_is_no_confusion():
    assert confusion_of(ArmDetails(arm="lora")) is None


def test_a_label_without_test_examples_is_listed_last():
    found = confusion_of(details(("a", "b"), ((1, 1, 3),)))
    assert [(row.label, row.total) for row in found.labels] == [("b", 3), ("a", 0)]


def test_a_label_that_looks_like_markup_stays_text():
    found = confusion_of(details((SCRIPT, "b"), ((0, 1, 2), (1, 1, 3))))
    assert not list(read(str(found.heat_map)).all("script"))
    assert "<script" not in found.heat_map
