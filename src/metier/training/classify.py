"""Classification with a head: the language model reads, a linear layer names the label.

First the model goes on with its pre-training on the inputs (task-adaptive pre-training, Gururangan
et al. 2020, arXiv 2004.10964), then it learns the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from metier.errors import TrainingError
from metier.model.head import Classifier
from metier.records import Example
from metier.training.batches import Batch, Row, cut
from metier.training.forward import forward_of
from metier.training.sft import MICRO_TOKENS

READING_PASSES = 3
"""Passes over the inputs before the labels are learned."""

_SMOOTHING = 0.1


def label_rows(
    rows: Sequence[Row], examples: Sequence[Example], labels: Sequence[str]
) -> list[Row]:
    """Rows that end where the answer would begin, each with the place of its label.

    Raises:
        TrainingError: an example's label is not in the label set.

    """
    places = {label: place for place, label in enumerate(labels)}
    found = []
    for row, example in zip(rows, examples, strict=True):
        if example.answer not in places:
            raise TrainingError(
                example.source or f"example {example.id}",
                f"its label '{example.answer}' is not in the label set",
                "add it to labels, or mend the row",
            )
        prompt = row.trained.index(True)
        found.append(
            replace(
                row,
                ids=row.ids[:prompt],
                trained=row.trained[:prompt],
                label=places[example.answer],
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


def head_loss(classifier: Classifier) -> Callable[[Batch], Tensor]:
    """Sum of cross-entropies over the labels of a batch, smoothed while the classifier trains.

    Smoothing (Szegedy et al. 2016, arXiv 1512.00567) keeps the validation loss, which chooses the
    parameters, falling while accuracy rises.
    """
    forward = forward_of(classifier.model)

    def loss(batch: Batch) -> Tensor:
        batch = batch.to(classifier.model.device)
        logits = classifier.logits(forward(batch.ids, batch.lengths), batch.lengths)
        smoothing = _SMOOTHING if classifier.training else 0.0
        return F.cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=smoothing)

    return loss


@torch.inference_mode()
def held_logits(
    classifier: Classifier, rows: Sequence[Row]
) -> tuple[npt.NDArray[np.float64], list[int]]:
    """Logits of labelled rows, shape (rows, labels), and the places of their labels."""
    classifier.eval()
    batches = [batch.to(classifier.model.device) for batch in cut(rows, MICRO_TOKENS)]
    found = torch.cat([classifier(batch.ids, batch.lengths) for batch in batches])
    return found.double().cpu().numpy(), torch.cat([b.labels for b in batches]).tolist()
