"""What a tagger is trained on, and that its loss is the one that everybody knows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sklearn.metrics import f1_score
from torch import Tensor

from metier.errors import TrainingError
from metier.model.load import load_base
from metier.model.tagger import TagGenerator, Tagger
from metier.model.world import World
from metier.progress import Silent
from metier.records import Example, Message
from metier.task import Training
from metier.text.template import Renderer
from metier.training.batches import Batch, Row, cut
from metier.training.loop import State
from metier.training.sft import evaluation, fit
from metier.training.tagging import labels_of, prepare, tag_judge, tag_loss, types_of
from tests.training.families import write_base

PLACES = ("Rome", "New York", "Zürich", "東京", "the São Paulo")
PEOPLE = ("Ada", "Bob Dylan", "Zoë", "李", "Mr. X")


def example(text: str, **entities: list[str]) -> Example:
    messages = (
        {"role": "user", "content": text},
        {"role": "assistant", "content": json.dumps(entities, ensure_ascii=False)},
    )
    return Example(id=text, messages=messages, source="data.jsonl:1")  # type: ignore[arg-type]


def examples() -> list[Example]:
    found = [
        example(f"{person} saw {place} today", person=[person], place=[place])
        for person in PEOPLE
        for place in PLACES
    ]
    return [*found, example("nobody was there"), example("rain again")]


def renderer_of(directory: Path) -> Renderer:
    return Renderer(load_base(str(directory), device="cpu").tokenizer, "plain")


def rows_of(renderer: Renderer, *given: Example, types: tuple[str, ...] = ()) -> list[Row]:
    kinds = types or types_of(given)
    return prepare(given, renderer, Training(), None, kinds).rows


def described(renderer: Renderer, row: Row, labels: tuple[str, ...]) -> list[tuple[str, str]]:
    """The tokens of a row that are tagged, as text, with the names of their classes."""
    decode = renderer.tokenizer.decode
    return [
        (decode([number]).strip(), labels[tag])
        for number, tag in zip(row.ids, row.tags, strict=True)
        if tag >= 0
    ]


def test_tokens_behind_the_prompt_are_tagged(stories260k: Path) -> None:
    renderer = renderer_of(stories260k)
    one = example("Mr. X saw Rome", person=["Mr. X"], place=["Rome"])
    (row,) = rows_of(renderer, one)
    labels = labels_of([one])
    assert labels == ("O", "B-person", "I-person", "B-place", "I-place")
    tagged = described(renderer, row, labels)
    assert "".join(token for token, _ in tagged) == "Mr.XsawRome"
    person = [(token, tag) for token, tag in tagged if tag.endswith("person")]
    assert "".join(token for token, _ in person) == "Mr.X"
    assert [tag for _, tag in person] == ["B-person"] + ["I-person"] * (len(person) - 1)
    assert {tag for token, tag in tagged if token in "saw"} == {"O"}
    prompt = renderer.prompt(one.prompt)
    assert list(row.ids[: len(prompt)]) == prompt
    assert set(row.tags[: len(prompt)]) == {-1}
    assert row.trained == tuple(tag >= 0 for tag in row.tags)


def test_what_cannot_be_tagged_is_told(stories260k: Path) -> None:
    renderer = renderer_of(stories260k)
    given = [
        example("Rome or Rome", place=["Rome"]),
        example("in Oslo", place=["Oslo"]),
        example("in Oslo, too", place=["Oslo"]),
        example("in Oslo, then", place=["Oslo"], person=["Bob"]),
        example("in Oslo, now", animal=["now"], place=["Oslo"]),
    ]
    prepared = prepare(given, renderer, Training(), None, ("person", "place"), "validation")
    missing, unsure, unknown = prepared.notes
    assert missing.startswith("1 of 7 spans of the validation part do not stand in their text")
    assert unsure.startswith("1 of 7 spans of the validation part stand in their text more often")
    assert unknown.startswith("1 of 7 spans of the validation part have a type that no training")
    inside = prepare([example("the", place=["th"])], renderer, Training(), None, ("place",))
    assert inside.notes[0].endswith("begin or end inside a token: the whole token is learned")
    assert prepare(given[1:2], renderer, Training(), None, ("place",)).notes == ()


def test_a_row_that_teaches_nothing_is_left_out(stories260k: Path) -> None:
    """It has no weight, so a step of such rows alone would divide by nothing."""
    given = [example("Rome Rome", place=["Rome"]), example("in Oslo", place=["Oslo"])]
    prepared = prepare(given, renderer_of(stories260k), Training(), None, ("place",))
    assert prepared.examples == given[1:]
    assert len(prepared.rows) == 1
    assert prepared.notes[-1] == "1 training rows are left out: nothing in them can be learned"


def test_answers_that_name_no_spans_are_refused() -> None:
    with pytest.raises(TrainingError, match="names no span in any answer"):
        types_of([example("x"), example("y", place=[])])
    asked, _ = example("x").messages
    listed = (asked, Message(role="assistant", content='["Rome"]'))
    with pytest.raises(TrainingError, match="does not name spans by their type") as caught:
        types_of([*examples(), dataclasses.replace(example("x"), messages=listed)])
    assert caught.value.place == "data.jsonl:1"


def test_answers_that_are_not_in_their_texts_are_refused(stories260k: Path) -> None:
    given = [example("x", place=["Rome", "Oslo"]), example("Rome", place=["Rome"])]
    with pytest.raises(TrainingError, match="most of the spans"):
        prepare(given, renderer_of(stories260k), Training(), None, ("place",))


def test_a_text_that_is_too_long_to_be_read_twice_is_refused(stories260k: Path) -> None:
    one = example("Rome " * 30, place=["Rome"] * 30)
    renderer = renderer_of(stories260k)
    (row,) = rows_of(renderer, one)
    fits, tight = Training(max_length=len(row.ids)), Training(max_length=len(row.ids) - 1)
    with pytest.raises(TrainingError, match="tokens long"):
        prepare([one], renderer, tight, None, ("place",))
    assert prepare([one], renderer, fits, None, ("place",)).rows == [row]


def oracle(directory: Path, tagger: Tagger, rows: list[Row]) -> torch.nn.Module:
    """The same weights in Transformers' own model for token classification, in float64."""
    kind = transformers.AutoModelForTokenClassification
    model = kind.from_pretrained(directory, num_labels=len(tagger.labels)).double().eval()
    head = model.score if hasattr(model, "score") else model.classifier
    head.load_state_dict(tagger.head.state_dict())
    return model


def side_by_side(rows: list[Row]) -> dict[str, Tensor]:
    """Rows with padding on the right that holds a real token, as `Trainer` is given them."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), 7)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = torch.tensor(row.ids)
        mask[place, : len(row.ids)] = 1
        tags = torch.tensor(row.tags)
        labels[place, : len(row.ids)] = tags.where(tags >= 0, torch.tensor(-100))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Qwen3"])
@pytest.mark.filterwarnings("ignore:.*newly initialized.*")
def test_loss_and_gradient_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    """Each reads a whole step: we without padding in pieces, Transformers side by side."""
    directory = write_base(tmp_path / "base", family)
    base = load_base(str(directory), dtype=torch.float32, device="cpu")
    given = examples()
    tagger = Tagger(base.model, labels_of(given)).double().eval()
    torch.nn.init.normal_(tagger.head.weight, generator=torch.Generator().manual_seed(1))
    rows = rows_of(Renderer(base.tokenizer, "plain"), *given)
    model = oracle(directory, tagger, rows)
    expected = model(**side_by_side(rows)).loss
    expected.backward()
    weight, loss = sum(sum(row.trained) for row in rows), tag_loss(tagger)
    total = 0.0
    for batch in cut(rows, 100):
        part = loss(batch) / weight
        part.backward()  # type: ignore[no-untyped-call]
        total += part.item()
    assert sum(batch.weight for batch in cut(rows, 100)) == weight
    # Transformers' norms compute in float32, whatever the model is in.
    assert total == pytest.approx(expected.item(), rel=1e-7)
    theirs = {name.partition(".")[2]: p.grad for name, p in model.named_parameters()}
    ours = {
        name.removeprefix("model.").partition(".")[2]: p.grad
        for name, p in tagger.named_parameters()
    }
    compared = [name for name in ours if ours[name] is not None and theirs.get(name) is not None]
    assert len(compared) > 10
    for name in compared:
        furthest = float((ours[name] - theirs[name]).abs().max())
        assert furthest < 1e-6 * max(1.0, float(theirs[name].abs().max())), name
    assert max(float(ours[name].abs().max()) for name in compared) > 1e-2
    other = [dataclasses.replace(rows[0], tags=(*rows[0].tags[:-1], 1)), *rows[1:]]
    assert model(**side_by_side(other)).loss.item() != pytest.approx(total, rel=1e-4)


def test_loss_and_mistakes_are_those_of_tagged_tokens(stories260k: Path) -> None:
    base = load_base(str(stories260k), dtype=torch.float32, device="cpu")
    tagger = Tagger(base.model, ("O", "B-x", "I-x")).double().eval()
    torch.nn.init.normal_(tagger.head.weight, generator=torch.Generator().manual_seed(2))
    draw = torch.Generator().manual_seed(0)
    rows = []
    for length in (40, 30, 9):
        ids = torch.randint(3, 500, (length,), generator=draw).tolist()
        named = torch.randint(-1, 3, (length,), generator=draw).tolist()
        rows.append(Row(tuple(ids), tuple(tag >= 0 for tag in named), tags=tuple(named)))
    logits = tagger(torch.tensor([i for row in rows for i in row.ids]), [40, 30, 9])
    true = torch.tensor([tag for row in rows for tag in row.tags])
    answered = logits.argmax(-1)[true >= 0]
    expected = f1_score(true[true >= 0], answered, labels=[1, 2], average="micro")
    loss, wrong, most = tag_judge(tagger)(Batch.of(rows))
    assert 0.1 < expected < 0.9
    assert wrong / most == pytest.approx(1 - expected)
    chances = logits.double().softmax(-1)[true >= 0, true[true >= 0]]
    assert loss == pytest.approx(-chances.log().sum().item(), rel=1e-5)
    assert tag_loss(tagger)(Batch.of(rows)).item() == pytest.approx(loss)


def test_a_tagger_that_finds_nothing_is_not_the_one_that_is_kept(stories260k: Path) -> None:
    """It has the fewest wrong tokens, and the worst answers."""
    base = load_base(str(stories260k), dtype=torch.float32, device="cpu")
    tagger = Tagger(base.model, ("O", "B-x", "I-x"))
    rows = [Row((5,) * 9, (True,) * 9, tags=(0,) * 6 + (1,) * 3)]
    mistakes, wrong = [], []
    for bias in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]):
        tagger.head.bias.data[:] = torch.tensor(bias)
        judged = evaluation(cut(rows, 99), tag_judge(tagger), World())()
        mistakes.append(judged["validation_mistakes"])
        wrong.append(sum(tag != bias.index(1.0) for tag in rows[0].tags))
    assert wrong == [3, 6]
    assert mistakes == [1.0, pytest.approx(0.5)]


class StopError(Exception):
    """What interrupts a training."""


class Counting(Silent):
    """Counts steps, and interrupts after some."""

    def __init__(self, most: int) -> None:
        self.steps, self._most = 0, most

    def advance(self, n: float = 1, **info: object) -> None:
        self.steps += 1
        if self.steps > self._most:
            raise StopError


@pytest.fixture
def learn(
    stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Tagger, State]]:
    """Train a tagger on `examples` in a directory that keeps a checkpoint of every step."""
    monkeypatch.setattr("metier.training.sft._CHECKPOINT_SECONDS", 0.0)

    def learned(directory: Path, epochs: int, **more: Any) -> tuple[Tagger, State]:
        base = load_base(str(stories260k), dtype=torch.float32, device="cpu")
        tagger = Tagger(base.model, labels_of(examples()))
        rows = rows_of(Renderer(base.tokenizer, "plain"), *examples())
        training = Training(epochs=epochs, batch_size=8, patience=0)
        settings = {"learning_rate": 4e-3, "seed": 0, "judge": tag_judge(tagger), **more}
        loss = tag_loss(tagger)
        return tagger, fit(tagger, loss, rows, rows, training, directory=directory, **settings)

    return learned


def test_a_tagger_learns_its_spans(
    stories260k: Path, tmp_path: Path, learn: Callable[..., tuple[Tagger, State]]
) -> None:
    tagger, state = learn(tmp_path, 14)
    losses = [point["validation_loss"] for point in state.curve]
    assert losses[-1] < losses[0] / 3
    generator = TagGenerator(tagger, renderer_of(stories260k))
    answers = generator.generate([one.prompt for one in examples()])
    right = sum(
        json.loads(answer.text) == json.loads(one.answer)
        for answer, one in zip(answers, examples(), strict=True)
    )
    assert right >= 20
    assert not any(answer.completion_tokens for answer in answers)


def test_an_interrupted_tagger_goes_on_where_it_stopped(
    tmp_path: Path, learn: Callable[..., tuple[Tagger, State]]
) -> None:
    whole, state = learn(tmp_path / "whole", 2)
    with pytest.raises(StopError):
        learn(tmp_path / "halves", 2, progress=Counting(4))
    rest = Counting(99)
    halves, again = learn(tmp_path / "halves", 2, progress=rest)
    assert again.step == state.step > rest.steps
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in halves.state_dict().items())
    assert not torch.equal(whole.head.weight, torch.zeros_like(whole.head.weight))
