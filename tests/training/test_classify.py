"""What a classification head is trained on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from metier.errors import ModelError, TrainingError
from metier.graders.labels import write_labels
from metier.model.calibration import Calibration, temperature
from metier.model.head import Classifier, HeadGenerator, load_head, save_head
from metier.model.load import Base, load_base
from metier.records import Example, Message
from metier.text.template import Renderer
from metier.training.batches import Batch, Row
from metier.training.classify import (
    calibrate,
    class_weights,
    head_loss,
    label_rows,
    reading_rows,
    start_at_shares,
)

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


def test_the_head_sees_the_mean_of_a_prompt_and_its_last_token(stories260k: Path) -> None:
    classifier = Classifier(load_base(str(stories260k), dtype=torch.float32).model, LABELS)
    torch.nn.init.normal_(classifier.head.weight)
    width = classifier.head.in_features // 2
    hidden = torch.randn(5, width)
    found = classifier.logits(hidden, [3, 2])
    for row, logits in zip((hidden[:3], hidden[3:]), found, strict=True):
        pooled = torch.cat(((row[0] + row[1] + (row[2:].sum(0))) / len(row), row[len(row) - 1]))
        assert torch.allclose(classifier.head.weight @ pooled, logits, atol=1e-5)


def test_prompts_are_answered_together_as_alone(stories260k: Path) -> None:
    base = load_base(str(stories260k), dtype=torch.float32)
    classifier = Classifier(base.model, LABELS)
    torch.nn.init.normal_(classifier.head.weight)
    generator = HeadGenerator(classifier, Renderer(base.tokenizer, "plain"))
    texts = ["a dog", "a dog and a cat " * 20, "the park is big " * 5, "a cat"]
    chats: list[list[Message]] = [[{"role": "user", "content": text}] for text in texts]
    together = generator.generate(chats)
    for one, chat in zip(together, chats, strict=True):
        (alone,) = generator.generate([chat])
        assert (one.text, one.prompt_tokens) == (alone.text, alone.prompt_tokens)
        assert one.probability == pytest.approx(alone.probability, rel=1e-4)


def labelled(classifier: Classifier, count: int = 24) -> list[Row]:
    """Rows of several lengths whose labels have nothing to do with them, but for a few."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        ids = torch.randint(3, 500, (3 + number % 9,), generator=generator).tolist()
        with torch.no_grad():
            own = int(classifier(torch.tensor(ids), [len(ids)]).argmax())
        found.append(Row(tuple(ids), (False,) * len(ids), own if number % 3 else number % 2))
    return found


def test_a_temperature_is_kept_and_moves_probabilities_alone(
    stories260k: Path, tmp_path: Path
) -> None:
    base = load_base(str(stories260k), dtype=torch.float32)
    classifier = Classifier(base.model, LABELS)
    torch.nn.init.normal_(classifier.head.weight, generator=torch.Generator().manual_seed(0))
    rows = labelled(classifier)
    calibrate(classifier, rows)
    with torch.no_grad():
        logits = torch.cat([classifier(torch.tensor(row.ids), [len(row.ids)]) for row in rows])
    wanted = np.eye(3)[[row.label for row in rows]]
    expected = temperature(logits.numpy(), wanted)
    assert classifier.calibration == Calibration(pytest.approx(expected, rel=1e-3))
    assert expected > 1.5, "the head is too sure of labels that are half chance"
    save_head(classifier, tmp_path)
    loaded = load_head(base.model, tmp_path)
    assert loaded.calibration == classifier.calibration
    chat: list[Message] = [{"role": "user", "content": "the park is big"}]
    (answer,) = HeadGenerator(loaded, Renderer(base.tokenizer, "plain")).generate([chat])
    loaded.calibration = Calibration()
    (plain,) = HeadGenerator(loaded, Renderer(base.tokenizer, "plain")).generate([chat])
    assert answer.text == plain.text
    assert answer.uncalibrated == plain.uncalibrated == plain.probability
    assert answer.probability is not None
    assert plain.probability is not None
    assert 1 / 3 < answer.probability < plain.probability


@pytest.mark.parametrize("damage", ["gone", "[]", '{"temperature": "hot", "threshold": 1}', "{}"])
def test_a_damaged_calibration_is_refused(stories260k: Path, tmp_path: Path, damage: str) -> None:
    model = load_base(str(stories260k), dtype=torch.float32).model
    save_head(Classifier(model, LABELS), tmp_path)
    if damage == "gone":
        (tmp_path / "calibration.json").unlink()
    else:
        (tmp_path / "calibration.json").write_text(damage)
    with pytest.raises(ModelError, match="no head that fits"):
        load_head(model, tmp_path)


def several(base: Base) -> tuple[Classifier, list[Row]]:
    """A head, and rows with any number of labels."""
    classifier = Classifier(base.model, LABELS)
    sets = [(), ("a",), ("a", "c"), ("a", "b", "c")]
    rows = [Row((5, 6, 7 + n, 9), (False, False, False, True)) for n in range(4)]
    examples = [
        Example(str(n), ({"role": "assistant", "content": write_labels(own)},))
        for n, own in enumerate(sets)
    ]
    return classifier, label_rows(rows, examples, LABELS, "multi-label")


def test_each_of_several_labels_has_a_loss_of_its_own(stories260k: Path) -> None:
    classifier, rows = several(load_base(str(stories260k), dtype=torch.float32))
    assert [row.label for row in rows] == [(0, 0, 0), (1, 0, 0), (1, 0, 1), (1, 1, 1)]
    torch.nn.init.normal_(classifier.head.weight, generator=torch.Generator().manual_seed(0))
    batch = Batch.of(rows)
    assert batch.weight == 4
    for mode in (classifier.train, classifier.eval):
        mode()
        with torch.no_grad():
            logits = classifier(batch.ids, batch.lengths).double()
            found = head_loss(classifier)(batch)
        chances = 1 / (1 + (-logits).exp())
        right = torch.where(batch.labels.bool(), chances, 1 - chances)
        assert found.item() == pytest.approx(-right.log().sum().item(), rel=0.02)


def test_several_labels_start_at_their_shares(stories260k: Path) -> None:
    classifier, rows = several(load_base(str(stories260k), dtype=torch.float32))
    start_at_shares(classifier, rows)
    with torch.no_grad():
        chances = torch.sigmoid(classifier(torch.tensor([5, 6, 7]), [3]))[0]
    assert chances.tolist() == pytest.approx([3.5 / 5, 1.5 / 5, 2.5 / 5])
    single = Classifier(classifier.model, LABELS)
    start_at_shares(single, [Row((5,), (False,), 1)])
    assert not single.head.bias.any(), "one label each starts from equal chances"


def test_a_head_with_several_labels_is_kept_and_answers(stories260k: Path, tmp_path: Path) -> None:
    base = load_base(str(stories260k), dtype=torch.float32)
    classifier, rows = several(base)
    torch.nn.init.normal_(classifier.head.weight, generator=torch.Generator().manual_seed(0))
    calibrate(classifier, rows)
    assert classifier.calibration.threshold is not None
    save_head(classifier, tmp_path)
    loaded = load_head(base.model, tmp_path)
    assert loaded.calibration == classifier.calibration
    chat: list[Message] = [{"role": "user", "content": "the park is big"}]
    (answer,) = HeadGenerator(loaded, Renderer(base.tokenizer, "plain")).generate([chat])
    given = [k for k, p in answer.probabilities.items() if p >= classifier.calibration.threshold]
    assert answer.text == write_labels(given)
    assert tuple(answer.probabilities) == LABELS
    shares = [p if k in given else 1 - p for k, p in answer.probabilities.items()]
    assert answer.probability == pytest.approx(np.prod(shares))


def test_an_unknown_label_is_refused() -> None:
    row = Row((5, 6), (False, True))
    example = Example("7", ({"role": "assistant", "content": '["a","z"]'},))
    with pytest.raises(TrainingError, match="'z' is not in the label set"):
        label_rows([row], [example], LABELS, "multi-label")


def placed(*labels: int | tuple[int, ...]) -> list[Row]:
    return [Row((5, 6, 7), (False,) * 3, label) for label in labels]


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    labels = [0] * 6 + [1] * 3 + [2]
    found = class_weights("balanced", placed(*labels), LABELS)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert found.tolist() == pytest.approx(expected)
    assert np.mean([found[label] for label in labels]) == pytest.approx(1)
    assert class_weights("balanced", placed(0, 0, 1), LABELS).tolist() == pytest.approx([0.5, 1, 1])


def test_of_several_labels_having_one_weighs_as_much_as_not() -> None:
    rows = placed((1, 0, 1), (0, 0, 1), (0, 0, 1), (0, 0, 1))
    weights = class_weights("balanced", rows, LABELS)
    assert weights.tolist() == [3, 1, 1], "of a label that none or all have nothing is known"


def test_given_weights_count_and_others_are_one() -> None:
    assert class_weights({"b": 2.5}, placed(0), LABELS).tolist() == [1, 2.5, 1]


def test_a_row_counts_as_its_label_does(stories260k: Path) -> None:
    """A weight of two is the row twice, in value and gradient, smoothed or not."""
    classifier = Classifier(load_base(str(stories260k), dtype=torch.float32).model, LABELS)
    torch.nn.init.normal_(classifier.head.weight, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 2.0, 1.0])

    def found(loss: Any, rows: list[Row]) -> tuple[float, torch.Tensor]:
        value = loss(Batch.of(rows))
        (gradient,) = torch.autograd.grad(value, [classifier.head.weight])
        return value.item(), gradient

    for mode in (classifier.train, classifier.eval):
        mode()
        value, gradient = found(head_loss(classifier, weights), placed(0, 1, 2))
        twice, expected = found(head_loss(classifier), placed(0, 1, 1, 2))
        assert value == pytest.approx(twice, rel=1e-4)
        assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-5)
    value, _ = found(head_loss(classifier, weights), placed((0, 1, 0)))
    half, _ = found(head_loss(classifier), placed((0, 1, 0)))
    none, _ = found(head_loss(classifier), placed((0, 0, 0)))
    # Having a label costs log(1 + e^-z), not having it z more; a weight of two the first again.
    assert value - half == pytest.approx(math.log1p(math.exp(half - none)), rel=1e-3)
