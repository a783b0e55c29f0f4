"""Metrics of a task beside its mean score: accuracy, macro-F1, valid JSON, and the like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from metier.graders.base import Grader
from metier.graders.json_text import NotJson, parse
from metier.graders.labels import read_labels
from metier.graders.wording import case_is_meaningless, normalise
from metier.records import Example, Score
from metier.task import Kind
from metier.text.spans import as_entities


class LabelSet:
    """The closed labels of a classification, and which of them a text is.

    White space does not count; nor does case, unless two labels differ in nothing else.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self._ignore_case = case_is_meaningless(labels)
        self._rows = {normalise(label, self._ignore_case): i for i, label in enumerate(labels)}

    def row(self, text: str) -> int:
        """Place of the label in the set; ``len(labels)`` where the text is none of them."""
        return self._rows.get(normalise(text, self._ignore_case), len(self.labels))


def summarise(
    kind: Kind,
    grader: Grader,
    pairs: Sequence[tuple[str, Example, Score]],
    labels: Sequence[str] = (),
) -> dict[str, float]:
    """Metrics over the graded outputs of one arm.

    - The grader's name: mean score. Each of its parts (precision, recall, valid_json, ...): mean
      over examples.
    - classification: accuracy; macro_f1, the unweighted mean of F1 over the labels that some
      example has; invalid_answers, the share of outputs that are no label.
    - multi-label: micro_f1 over all labels of all examples; macro_f1 as above; exact, the share of
      outputs that name just the expected labels; invalid_answers, the share that is no list of
      labels of the set.
    - other kinds: exact, the share of outputs that equal the expected ones. Where these name spans
      (`text.spans`): span_precision, span_recall and span_f1 over the spans of all examples, as
      CoNLL's evaluation has them (Tjong Kim Sang and De Meulder 2003), but told apart by their
      type and words rather than by their place.

    Args:
        kind: kind of the task.
        grader: what gave the scores.
        pairs: (output, example, score) of every example.
        labels: the closed label set; by default the labels of these examples.

    """
    if not pairs:
        return {}
    scores = [score for _, _, score in pairs]
    metrics = {grader.name: fmean(score.value for score in scores)}
    for part in dict.fromkeys(name for score in scores for name in score.parts):
        metrics[part] = fmean(score.parts.get(part, 0.0) for score in scores)
    if kind == "classification":
        return metrics | _classification(pairs, labels)
    if kind == "multi-label":
        return metrics | _several(pairs, labels)
    exact = [normalise(output) == normalise(example.answer) for output, example, _ in pairs]
    return metrics | {"exact": fmean(exact)} | _spans(pairs)


def _spans(pairs: Sequence[tuple[str, Example, Score]]) -> dict[str, float]:
    """Precision, recall and F1 over all spans; nothing where answers name none."""
    wanted = answered = right = 0
    for output, example, _ in pairs:
        spans, found = _named(example.answer), _named(output) or Counter()
        if spans is None:
            return {}
        wanted, answered = wanted + spans.total(), answered + found.total()
        right += (found & spans).total()
    if not wanted:
        return {}
    return {
        "span_precision": right / answered if answered else 0.0,
        "span_recall": right / wanted,
        "span_f1": 2 * right / (answered + wanted),
    }


def _named(answer: str) -> Counter[tuple[str, str]] | None:
    """The spans that an answer names, by type and words; None where it has another form."""
    try:
        entities = as_entities(parse(answer))
    except NotJson:
        return None
    if entities is None:
        return None
    return Counter((kind, normalise(text)) for kind, texts in entities.items() for text in texts)


def _classification(
    pairs: Sequence[tuple[str, Example, Score]], labels: Sequence[str]
) -> dict[str, float]:
    label_set = LabelSet(labels or sorted({example.answer for _, example, _ in pairs}))
    true = [label_set.row(example.answer) for _, example, _ in pairs]
    answered = [label_set.row(output) for output, _, _ in pairs]
    invalid = len(label_set.labels)
    right = Counter(t for t, a in zip(true, answered, strict=True) if t == a != invalid)
    of_true, of_answered = Counter(true), Counter(answered)
    return {
        "accuracy": right.total() / len(pairs),
        "macro_f1": fmean(2 * right[k] / (of_true[k] + of_answered[k]) for k in of_true),
        "invalid_answers": of_answered[invalid] / len(pairs),
    }


def same_labels(output: str, expected: str) -> bool:
    """Whether an output lists just the expected labels."""
    return _listed(output) == set(read_labels(expected))


def _several(
    pairs: Sequence[tuple[str, Example, Score]], labels: Sequence[str]
) -> dict[str, float]:
    true = [set(read_labels(example.answer)) for _, example, _ in pairs]
    known = set(labels) or set().union(*true)
    answered, invalid = [], 0
    for output, _, _ in pairs:
        found = _listed(output)
        invalid += found is None or not found <= known
        answered.append(found or set())
    hits, given, wanted = (
        Counter(label for labels in sets for label in labels)
        for sets in (map(set.intersection, true, answered), answered, true)
    )
    return {
        "micro_f1": _f1(hits.total(), given.total(), wanted.total()),
        "macro_f1": fmean(_f1(hits[k], given[k], wanted[k]) for k in wanted) if wanted else 1.0,
        "exact": fmean(same_labels(output, example.answer) for output, example, _ in pairs),
        "invalid_answers": invalid / len(pairs),
    }


def _listed(output: str) -> set[str] | None:
    """The labels of an output that is a JSON list of them, as was asked for."""
    try:
        return set(read_labels(output)) if isinstance(parse(output), list) else None
    except NotJson:
        return None


def _f1(hits: int, given: int, wanted: int) -> float:
    return 2 * hits / (given + wanted) if given + wanted else 1.0
