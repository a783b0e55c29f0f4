"""Classification with a head: the language model reads, a linear layer names the label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from metier.errors import TrainingError
from metier.model.head import Classifier
from metier.records import Example
from metier.training.batches import PaddedBatch, Row
from metier.training.forward import forward_of


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


def head_loss(classifier: Classifier) -> Callable[[PaddedBatch], Tensor]:
    """Sum of cross-entropies over the labels of a batch."""
    forward = forward_of(classifier.model)

    def loss(batch: PaddedBatch) -> Tensor:
        batch = batch.to(classifier.model.device)
        logits = classifier.logits(forward(batch.ids), batch.lengths)
        return F.cross_entropy(logits, batch.labels, reduction="sum")

    return loss
