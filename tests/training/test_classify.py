"""What a classification head is trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from metier.errors import ModelError
from metier.model.calibration import temperature
from metier.model.head import Classifier, HeadGenerator, load_head, save_head
from metier.model.load import load_base
from metier.records import Message
from metier.text.template import Renderer
from metier.training.batches import Batch, Row
from metier.training.classify import head_loss, held_logits, reading_rows

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


def test_held_rows_give_the_logits_of_their_labels(stories260k: Path) -> None:
    classifier = Classifier(load_base(str(stories260k), dtype=torch.float32).model, LABELS)
    torch.nn.init.normal_(classifier.head.weight, generator=torch.Generator().manual_seed(0))
    rows = labelled(classifier)
    logits, places = held_logits(classifier, rows)
    with torch.no_grad():
        expected: dict[int, list[list[float]]] = {row.label: [] for row in rows}
        for row in rows:
            single = classifier(torch.tensor(row.ids), [len(row.ids)])[0]
            expected[row.label].append(single.tolist())
    for place, values in expected.items():
        found = logits[[at for at, one in enumerate(places) if one == place]]
        assert np.allclose(sorted(found.tolist()), sorted(values), atol=1e-4)


def test_a_temperature_is_kept_and_moves_probabilities_alone(
    stories260k: Path, tmp_path: Path
) -> None:
    base = load_base(str(stories260k), dtype=torch.float32)
    classifier = Classifier(base.model, LABELS)
    torch.nn.init.normal_(classifier.head.weight, generator=torch.Generator().manual_seed(0))
    classifier.temperature = temperature(*held_logits(classifier, labelled(classifier)))
    assert classifier.temperature > 1.5, "the head is too sure of labels that are half chance"
    save_head(classifier, tmp_path)
    loaded = load_head(base.model, tmp_path)
    assert loaded.temperature == classifier.temperature
    chat: list[Message] = [{"role": "user", "content": "the park is big"}]
    (answer,) = HeadGenerator(loaded, Renderer(base.tokenizer, "plain")).generate([chat])
    loaded.temperature = 1.0
    (plain,) = HeadGenerator(loaded, Renderer(base.tokenizer, "plain")).generate([chat])
    assert answer.text == plain.text
    assert answer.uncalibrated == plain.uncalibrated == plain.probability
    assert answer.probability is not None
    assert plain.probability is not None
    assert 1 / 3 < answer.probability < plain.probability


@pytest.mark.parametrize("damage", ["gone", "[]", '{"temperature": "hot"}', "{}"])
def test_a_damaged_calibration_is_refused(stories260k: Path, tmp_path: Path, damage: str) -> None:
    model = load_base(str(stories260k), dtype=torch.float32).model
    save_head(Classifier(model, LABELS), tmp_path)
    if damage == "gone":
        (tmp_path / "calibration.json").unlink()
    else:
        (tmp_path / "calibration.json").write_text(damage)
    with pytest.raises(ModelError, match="no classification head that fits"):
        load_head(model, tmp_path)
