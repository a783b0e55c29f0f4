import math
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional as F

from metier.errors import TrainingError
from metier.model.adapters import add_adapter
from metier.model.head import Classifier, HeadGenerator, load_head, save_head
from metier.model.load import Base, load_base
from metier.records import Example
from metier.task import TUNINGS, Lora, Training
from metier.text.template import Renderer
from metier.training.batches import Batch, Row, cut
from metier.training.classify import head_loss, label_rows
from metier.training.loop import State
from metier.training.preflight import prepare
from metier.training.scoring import Scorer
from metier.training.sft import answer_judge, answer_loss, default_learning_rate, fit

NAMES = ("Lily", "Tom", "Ben", "Mia")
ANSWERS = {"dog": "animal", "cake": "food", "park": "place"}


def example(text: str, answer: str) -> Example:
    messages = ({"role": "user", "content": text}, {"role": "assistant", "content": answer})
    return Example(id=text, messages=messages, source=f"data.jsonl:{len(text)}")


def examples() -> list[Example]:
    return [
        example(f"{name} saw a {word}", answer)
        for name in NAMES
        for word, answer in ANSWERS.items()
    ]


def load(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Base, Renderer]:
    base = load_base(str(path), dtype=dtype, device="cpu")
    return base, Renderer(base.tokenizer, "question-answer")


def rows_of(renderer: Renderer, training: Training) -> list[Row]:
    return prepare(examples(), renderer, training, None).rows


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_learns_the_answers(stories260k: Path, method: str) -> None:
    base, renderer = load(stories260k)
    training = Training(epochs=12, batch_size=8, patience=0)
    rows = rows_of(renderer, training)
    model = (
        add_adapter(base.model, "lora", Training(lora=Lora(rank=4)), 0)
        if method == "lora"
        else base.model
    )
    state = fit(model, answer_loss(Scorer(model)), rows, rows, training, learning_rate=5e-3, seed=0)
    losses = [point["validation_loss"] for point in state.curve]
    assert losses[-1] < losses[0] / 2
    assert state.best_loss == min(losses)


def test_a_validation_loss_that_is_never_finite_is_refused() -> None:
    def train(*factors: float) -> State:
        model, left = torch.nn.Linear(1, 1), iter(factors)

        def loss(_: Batch) -> torch.Tensor:
            value = model(torch.ones(1)).sum() ** 2
            return value if torch.is_grad_enabled() else value * next(left)

        rows = [Row((1, 2, 3), (False, True, True))]
        training = Training(epochs=len(factors), patience=0)
        return fit(model, loss, rows, rows, training, learning_rate=1e-3, seed=0)

    with pytest.raises(TrainingError, match="never a finite number in 2 steps"):
        train(math.inf, math.nan)
    assert train(math.inf, 1.0).best_step == 2, "control: one finite loss is enough"


def test_a_paused_training_says_how_good_it_is_now(tmp_path: Path) -> None:
    """Without a word of it in what goes on: that is the training that was never paused."""

    def train(directory: Path, part: float) -> State:
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1)

        def loss(batch: Batch) -> torch.Tensor:
            return ((model(batch.ids[:, None].float()) - 1) ** 2).sum()

        rows = [Row((token, 2, 3), (False, True, True)) for token in range(6)]
        training = Training(epochs=2, batch_size=2, patience=0)
        return fit(
            model, loss, rows, rows[:2], training, learning_rate=0.05, seed=0, directory=directory,
            part=part,
        )  # fmt: skip

    whole = train(tmp_path / "whole", 1.0)
    early = train(tmp_path / "paused", 2 / 6)
    assert (early.step, early.best_step, early.finished) == (2, 2, False)
    assert early.best_loss > whole.best_loss
    assert early.curve == [], "the point of now is of no evaluation of the training"
    late = train(tmp_path / "paused", 5 / 6)
    assert (late.step, late.best_step) == (5, 5)
    assert train(tmp_path / "paused", 1.0) == whole


def test_the_loss_is_cross_entropy_on_the_answer_alone(stories260k: Path) -> None:
    base, renderer = load(stories260k)
    rows = rows_of(renderer, Training())
    expected = 0.0
    for row in rows:
        with torch.no_grad():
            logits = base.model(input_ids=torch.tensor([row.ids])).logits[0].double()
        for place in range(1, len(row.ids)):
            if row.trained[place]:
                target = torch.tensor([row.ids[place]])
                expected += F.cross_entropy(logits[place - 1 : place], target).item()
    base.model.double()
    loss = answer_loss(Scorer(base.model))
    found = sum(loss(batch).item() for batch in cut(rows, 64))
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_judge_counts_the_tokens_that_would_be_written_wrong(stories260k: Path) -> None:
    """Oracle: the likeliest token at each place of an answer, by the model's own forward pass."""
    base, renderer = load(stories260k)
    rows = rows_of(renderer, Training())
    wrong = 0
    for row in rows:
        with torch.no_grad():
            likeliest = base.model(input_ids=torch.tensor([row.ids])).logits[0].argmax(-1)
        wrong += sum(
            row.trained[place] and likeliest[place - 1].item() != row.ids[place]
            for place in range(1, len(row.ids))
        )
    model = base.model.double()
    judged = [answer_judge(Scorer(model))(batch) for batch in cut(rows, 64)]
    assert sum(mistakes for _, mistakes in judged) == wrong > 0
    expected = sum(answer_loss(Scorer(model))(batch).item() for batch in cut(rows, 64))
    assert sum(loss for loss, _ in judged) == pytest.approx(expected)


def test_the_judge_decides_which_parameters_are_kept() -> None:
    """Three passes; the second makes the fewest mistakes, the third has the lowest loss."""
    model = torch.nn.Linear(1, 1)
    judged = iter([(3.0, 2.0), (2.0, 0.0), (1.0, 1.0)])
    state = fit(
        model,
        lambda _: model(torch.ones(1)).sum() ** 2,
        [Row((1, 2, 3), (False, True, True))],
        [Row((1, 2, 3), (False, True, True))],
        Training(epochs=3, patience=0),
        learning_rate=1e-3,
        seed=0,
        judge=lambda _: next(judged),
    )
    assert (state.best_step, state.best_loss, state.best_mistakes) == (2, 1.0, 0.0)


@pytest.mark.parametrize("scaled", ["Granite", "Gemma2"])
def test_logits_that_are_scaled_or_capped_are_those_that_are_learned(scaled: str) -> None:
    config = getattr(transformers, f"{scaled}Config")(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=20,
        initializer_range=0.5,
        attn_implementation="eager",
        **{"logits_scaling": 3.0} if scaled == "Granite" else {"final_logit_softcapping": 2.0},
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    draw = torch.Generator().manual_seed(0)
    lengths = (150, 140, 9, 5)
    ids = [torch.randint(3, 40, (n,), generator=draw).tolist() for n in lengths]
    rows = [Row(tuple(row), (False, False, *[True] * (len(row) - 2))) for row in ids]
    expected = 0.0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row.ids])).logits[0, 1:-1]
            wanted = torch.tensor(row.ids[2:])
            expected += F.cross_entropy(logits, wanted, reduction="sum").item()
        found = answer_loss(Scorer(model))(Batch.of(rows)).item()
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("budget", [1, 40, 90, 10_000])
def test_the_gradient_does_not_depend_on_batching(stories260k: Path, budget: int) -> None:
    base, renderer = load(stories260k, torch.float64)
    rows = rows_of(renderer, Training())
    model = base.model.double()
    loss = answer_loss(Scorer(model))

    def gradient(budget: int) -> torch.Tensor:
        model.zero_grad()
        for batch in cut(rows, budget):
            (loss(batch) / 100).backward()
        return torch.cat([p.grad.reshape(-1).clone() for p in model.parameters()])

    assert (gradient(budget) - gradient(0)).abs().max() < 1e-9


def test_a_head_learns_its_labels_and_comes_back(stories260k: Path, tmp_path: Path) -> None:
    base, renderer = load(stories260k)
    training = Training(epochs=15, batch_size=8, patience=0)
    prepared = prepare(examples(), renderer, training, None)
    labels = tuple(sorted(ANSWERS.values()))
    rows = label_rows(prepared.rows, prepared.examples, labels)
    classifier = Classifier(base.model, labels)
    loss = head_loss(classifier)
    fit(classifier, loss, rows, rows, training, learning_rate=5e-3, seed=0)
    chats = [row.prompt for row in examples()]
    answers = HeadGenerator(classifier, renderer).generate(chats)
    right = sum(a.text == e.answer for a, e in zip(answers, examples(), strict=True))
    assert right >= 10
    save_head(classifier, tmp_path)
    again = HeadGenerator(load_head(base.model, tmp_path), renderer).generate(chats)
    assert again == answers


def test_label_rows_hold_no_token_of_the_answer(stories260k: Path) -> None:
    _, renderer = load(stories260k)
    prepared = prepare(examples(), renderer, Training(), None)
    rows = label_rows(prepared.rows, prepared.examples, tuple(sorted(ANSWERS.values())))
    for row, one in zip(rows, examples(), strict=True):
        assert list(row.ids) == renderer.prompt(one.prompt)
    with pytest.raises(TrainingError, match="not in the label set"):
        label_rows(prepared.rows, prepared.examples, ("animal",))


def test_all_answers_of_a_conversation_are_learned_when_asked_for(stories260k: Path) -> None:
    _, renderer = load(stories260k)
    first, last = examples()[:2]
    chat = Example(id="chat", messages=(*first.messages, *last.messages), source="data.jsonl:1")
    one = prepare([chat], renderer, Training(), None)
    every = prepare([chat], renderer, Training(turns="all"), None)
    assert (len(one.rows), len(every.rows), len(every.examples)) == (1, 2, 2)
    assert one.rows == every.rows[1:]
    assert "⟦animal" in every.sample


class Endless(Renderer):
    """A renderer broken on purpose: its stop token is not trained."""

    def example(self, messages, tools=()):  # type: ignore[no-untyped-def]
        rendered = super().example(messages, tools)
        return type(rendered)(rendered.ids, (*rendered.trained[:-1], False))


class Deaf(Renderer):
    """A renderer broken on purpose: nothing is trained."""

    def example(self, messages, tools=()):  # type: ignore[no-untyped-def]
        rendered = super().example(messages, tools)
        return type(rendered)(rendered.ids, (False,) * len(rendered.ids))


def test_preflight_refuses_what_would_fail_in_silence(stories260k: Path) -> None:
    base, renderer = load(stories260k)
    shown = prepare(examples(), renderer, Training(), None).sample
    assert shown.endswith("⟦animal</s>⟧") or "⟦animal" in shown
    long = [*examples(), example("Tom saw " + "a big dog and " * 60, "animal")]
    with pytest.raises(TrainingError, match="would be cut") as caught:
        prepare(long, renderer, Training(max_length=64), None)
    assert caught.value.place == long[-1].source
    with pytest.raises(TrainingError, match="would be cut"):
        prepare(long, renderer, Training(), 64)
    kept = prepare(long, renderer, Training(max_length=64, too_long="drop"), None)
    assert (len(kept.rows), kept.dropped) == (12, {"training rows": 1})
    with pytest.raises(TrainingError, match="stop token is not trained"):
        prepare(examples(), Endless(base.tokenizer, "plain"), Training(), None)
    with pytest.raises(TrainingError, match="no token to train on"):
        prepare(examples(), Deaf(base.tokenizer, "plain"), Training(), None)


def test_narrow_bases_learn_at_higher_rates_and_whole_ones_at_lower(stories260k: Path) -> None:
    base, _ = load(stories260k)
    narrow = default_learning_rate(base.model, TUNINGS["lora"])
    base.model.config.hidden_size = 4096
    wide = default_learning_rate(base.model, TUNINGS["lora"])
    assert narrow == pytest.approx(7.32e-3, rel=0.01)  # worked out by hand
    assert wide == pytest.approx(2.86e-4, rel=0.01)
    assert default_learning_rate(base.model, TUNINGS["full"]) < wide
