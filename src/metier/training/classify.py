"""Classification with a head: the language model reads, a linear layer names the label.

First the model goes on with its pre-training on the inputs (task-adaptive pre-training, Gururangan
et al. 2020, arXiv 2004.10964), then it learns the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.errors import TrainingError
from metier.graders.labels import labels_of
from metier.model.calibration import Calibration
from metier.model.head import Classifier
from metier.records import Example
from metier.task import Kind
from metier.training.batches import Batch, Row, cut
from metier.training.forward import forward_of
from metier.training.sft import MICRO_TOKENS

READING_PASSES = 3
"""Passes over the inputs before the labels are learned."""

_SMOOTHING = 0.1


def label_rows(
    rows: Sequence[Row],
    examples: Sequence[Example],
    labels: Sequence[str],
    kind: Kind = "classification",
) -> list[Row]:
    """Rows that end where the answer would begin, each with its label, or all of them.

    Raises:
        TrainingError: an example's label is not in the label set.

    """
    found = []
    for row, example in zip(rows, examples, strict=True):
        own = labels_of(example.answer, kind)
        for label in own:
            if label not in labels:
                raise TrainingError(
                    example.place,
                    f"its label '{label}' is not in the label set",
                    "add it to labels, or mend the row",
                )
        marks = tuple(int(label in own) for label in labels)
        prompt = row.trained.index(True)
        found.append(
            replace(
                row,
                ids=row.ids[:prompt],
                trained=row.trained[:prompt],
                label=marks if kind == "multi-label" else marks.index(1),
            )
        )
    return found


def reading_rows(rows: Sequence[Row]) -> list[Row]:
    """The inputs of labelled rows as text to be learned, every token but the first."""
    return [
        replace(row, trained=(False, *[True] * (len(row.ids) - 1)), label=-1)
        for row in rows
        if len(row.ids) > 1
    ]


def class_weights(
    chosen: str | Mapping[str, float],
    rows: Sequence[Row],
    labels: Sequence[str],
) -> Tensor:
    """How much each label counts, shape (labels,).

    Balanced weights are n / (labels * n_label), so that all labels count the same and a row counts
    1 on average (King and Zeng 2001, "Logistic Regression in Rare Events Data"). Where a row may
    have several labels, they are (n - n_label) / n_label and count for rows that have the label:
    having it and not having it then weigh the same. A label without rows counts 1.

    Args:
        chosen: `balanced`, or a weight for some labels.
        rows: the training rows, labelled.
        labels: in the order of the logits.

    """
    if not isinstance(chosen, str):
        return torch.tensor([float(chosen.get(label, 1.0)) for label in labels])
    marks = torch.tensor([row.label for row in rows])
    several = marks.ndim == 2
    counts = (marks if several else F.one_hot(marks, len(labels))).sum(0).float()
    total = len(rows) - counts if several else torch.full_like(counts, len(rows) / len(labels))
    return torch.where((counts > 0) & (total > 0), total / counts.clamp(min=1), 1.0)


def head_loss(classifier: Classifier, weights: Tensor | None = None) -> Callable[[Batch], Tensor]:
    """Sum of cross-entropies over the labels of a batch, smoothed while the classifier trains.

    Smoothing (Szegedy et al. 2016, arXiv 1512.00567) keeps the validation loss, which chooses the
    parameters, falling while accuracy rises. Where a row may have several labels, each has a
    binary cross-entropy of its own, and nothing is smoothed.

    Args:
        classifier: what is trained.
        weights: how much each label counts (`class_weights`); by default 1.

    """
    forward = forward_of(classifier.model)
    counted = None if weights is None else weights.to(classifier.model.device)

    def loss(batch: Batch) -> Tensor:
        batch = batch.to(classifier.model.device)
        logits = classifier.logits(forward(batch.ids, batch.lengths), batch.lengths)
        if batch.labels.ndim == 2:
            marks = batch.labels.to(logits.dtype)
            return F.binary_cross_entropy_with_logits(
                logits, marks, pos_weight=counted, reduction="sum"
            )
        smoothing = _SMOOTHING if classifier.training else 0.0
        each = F.cross_entropy(logits, batch.labels, reduction="none", label_smoothing=smoothing)
        return each.sum() if counted is None else (counted[batch.labels] * each).sum()

    return loss


def start_at_shares(classifier: Classifier, rows: Sequence[Row]) -> None:
    """Where rows may have several labels, start at each label's share of the training rows.

    From equal chances, most of the training would go into learning that labels are rare (Lin et
    al. 2017, arXiv 1708.02002, 3.3).
    """
    marks = torch.tensor([row.label for row in rows], dtype=torch.float32)
    if marks.ndim == 2:
        bias = torch.logit((marks.sum(0) + 0.5) / (len(rows) + 1))
        classifier.head.bias.data.copy_(bias)


@torch.inference_mode()
def calibrate(classifier: Classifier, rows: Sequence[Row]) -> None:
    """Fit how logits become answers on labelled rows, which it was not trained on."""
    classifier.eval()
    batches = [batch.to(classifier.model.device) for batch in cut(rows, MICRO_TOKENS)]
    logits = torch.cat([classifier(batch.ids, batch.lengths) for batch in batches])
    wanted = torch.cat([batch.labels for batch in batches])
    several = wanted.ndim == 2
    marks = wanted if several else F.one_hot(wanted, len(classifier.labels))
    classifier.calibration = Calibration.fitted(
        logits.double().cpu().numpy(), marks.cpu().numpy(), several=several
    )
