"""What a classification head is trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metier.model.head import Classifier
from metier.model.load import load_base
from metier.training.batches import Batch, Row
from metier.training.classify import head_loss, reading_rows

LABELS = ("a", "b", "c")


def test_every_token_of_an_input_but_the_first_is_read() -> None:
    rows = [Row((5, 6, 7), (False,) * 3, 1), Row((8,), (False,), 0)]
    assert reading_rows(rows) == [Row((5, 6, 7), (False, True, True))]


def test_labels_are_smoothed_in_training_only(stories260k: Path) -> None:
    classifier = Classifier(load_base(str(stories260k), dtype=torch.float32).model, LABELS)
    torch.nn.init.normal_(classifier.head.weight, generator=torch.Generator().manual_seed(0))
    batch = Batch.of([Row((5, 6, 7), (False,) * 3, 1)])
    loss = head_loss(classifier)
    with torch.no_grad():
        classifier.train()
        smoothed = loss(batch)
        classifier.eval()
        plain = loss(batch)
        logits = classifier(batch.ids, batch.lengths).double()[0]
    chances = logits.exp() / logits.exp().sum()
    assert plain.item() == pytest.approx(-chances[1].log().item(), rel=0.02)
    expected = -(0.9 * chances[1].log() + 0.1 / 3 * chances.log().sum())
    assert smoothed.item() == pytest.approx(expected.item(), rel=0.02)
    assert abs(smoothed - plain) > 0.05
