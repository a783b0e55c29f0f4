"""Training of encoder-decoders. Oracle: Transformers reads examples one by one, unpadded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from metier.errors import TrainingError
from metier.model import seq2seq
from metier.model.adapters import add_adapter
from metier.model.load import load_base
from metier.records import Example
from metier.task import Lora, Training
from metier.text.template import Renderer
from metier.training.batches import Row, cut
from metier.training.preflight import prepare
from metier.training.scoring import Scorer
from metier.training.sft import answer_judge, answer_loss
from tests.seq2seq_bases import SEQ2SEQ, write_seq2seq

EXACT = 1e-9
ASKED = {
    "a": "yes",
    "import the module " * 20: "no",
    "x y z": "a much longer answer of several words",
    "class " * 7: "maybe",
    "what is a loop?": "it is a statement that " * 6,
    "b": "c",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_seq2seq(tmp_path_factory.mktemp(family), family) for family in SEQ2SEQ}


def examples() -> list[Example]:
    return [
        Example(
            id=str(number),
            messages=({"role": "user", "content": text}, {"role": "assistant", "content": answer}),
            source=f"data.jsonl:{number}",
        )
        for number, (text, answer) in enumerate(ASKED.items())
    ]


def renderer_of(path: Path) -> Renderer:
    return Renderer(load_base(str(path)).tokenizer, "plain", encoder=True)


def rows_of(path: Path) -> list[Row]:
    return prepare(examples(), renderer_of(path), Training(), None).rows


def tuned(model: Any, kind: str) -> Any:
    """With a start from which every weight of an adapter has a gradient."""
    if kind == "full":
        return model.requires_grad_(requires_grad=True)
    model = add_adapter(model, kind, Training(lora=Lora(rank=4, alpha=8)), 0).double()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad and "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def ours(path: Path, kind: str, rows: Sequence[Row], budget: int) -> tuple[float, dict[str, Any]]:
    model = tuned(load_base(str(path), torch.float64, "cpu").model, kind).eval()
    loss = answer_loss(Scorer(model))
    total = sum((loss(batch) for batch in cut(rows, budget)), torch.zeros(()))
    total.backward()  # type: ignore[no-untyped-call]
    return total.item(), gradients(model)


def one_by_one(path: Path, kind: str) -> tuple[float, dict[str, Tensor]]:
    """From the texts, with the tokenizer and the labels of the library."""
    plain = AutoModelForSeq2SeqLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="eager"
    )
    model, tokenizer = tuned(plain, kind).eval(), AutoTokenizer.from_pretrained(path)
    total = 0.0
    for text, answer in ASKED.items():
        labels = tokenizer(text_target=answer, return_tensors="pt").input_ids
        read = tokenizer(text, return_tensors="pt")
        loss = model(**read, labels=labels).loss * labels.shape[1]
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def furthest(found: dict[str, Any], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    assert min(float(value.abs().max()) for value in expected.values()) > 1e-6
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


@pytest.mark.parametrize("family", SEQ2SEQ)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_loss_and_gradients_are_those_of_one_row_at_a_time(
    bases: dict[str, Path], family: str, kind: str
) -> None:
    path = bases[family]
    loss, expected = one_by_one(path, kind)
    for budget in (1, 100, 10**6):
        total, found = ours(path, kind, rows_of(path), budget)
        assert total == pytest.approx(loss, abs=EXACT)
        assert furthest(found, expected) < EXACT


Unmask = Callable[[Any, Any], seq2seq.Encoded]


def test_control_unmasked_padding_and_a_row_less_are_seen(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bases["T5-1.1"]
    _, expected = one_by_one(path, "lora")
    _, found = ours(path, "lora", rows_of(path)[:-1], 10**6)
    assert furthest(found, expected) > 1e6 * EXACT
    usual: Unmask = seq2seq.encode

    def unmasked(model: Any, prompts: Any) -> seq2seq.Encoded:
        found = usual(model, prompts)
        return seq2seq.Encoded(found.states, torch.ones_like(found.mask))

    monkeypatch.setattr(seq2seq, "encode", unmasked)
    _, found = ours(path, "lora", rows_of(path), 10**6)
    assert furthest(found, expected) > 1e6 * EXACT


def test_a_judge_counts_the_tokens_that_would_be_written_wrong(bases: dict[str, Path]) -> None:
    path = bases["T5-1.1"]
    plain = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float64)
    wrong = 0
    for row in rows_of(path):
        prompt = row.trained.index(True)
        labels = torch.tensor([row.ids[prompt:]])
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([row.ids[:prompt]]), labels=labels).logits
        wrong += int((logits.argmax(-1) != labels).sum())
    model = load_base(str(path), torch.float64, "cpu").model
    judge = answer_judge(Scorer(model))
    assert sum(judge(batch)[1] for batch in cut(rows_of(path), 100)) == wrong > 0


def test_lora_is_on_every_linear_layer_but_the_head(bases: dict[str, Path]) -> None:
    model = add_adapter(load_base(str(bases["T5-1.1"])).model, "lora", Training(), 0)
    config: Any = model.peft_config["default"]
    assert config.task_type == "SEQ_2_SEQ_LM"
    names = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert {name.rpartition(".")[2] for name in names} == {*"qkvo", "wi_0", "wi_1", "wo"}
    attentions = 4 * 2 + 8 * 2  # two layers that read, two that write and look at what was read
    assert len(names) == attentions + 3 * 4


def test_the_sample_shows_prompt_and_answer(bases: dict[str, Path]) -> None:
    prepared = prepare(examples(), renderer_of(bases["T5-1.1"]), Training(), None)
    assert prepared.sample == "a</s>⟦yes</s>⟧"


def test_an_answer_without_a_token_is_refused(bases: dict[str, Path]) -> None:
    empty = Example(
        id="e",
        messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": " "}),
    )
    with pytest.raises(TrainingError, match="no token to train on"):
        prepare([empty], renderer_of(bases["T5-1.1"]), Training(), None)


def test_every_answer_of_a_conversation_is_a_row_of_its_own(bases: dict[str, Path]) -> None:
    renderer = renderer_of(bases["T5-1.1"])
    said = ["ask", "first", "again", "second"]
    messages: Any = [
        {"role": role, "content": text}
        for role, text in zip(["user", "assistant"] * 2, said, strict=True)
    ]
    rows = renderer.turns(messages)
    assert [renderer.show(row) for row in rows] == [
        "ask</s>⟦first</s>⟧",
        "ask first again</s>⟦second</s>⟧",
    ]
    for row, end in zip(rows, (1, 3), strict=True):
        prompt = renderer.prompt(messages[:end])
        assert list(row.ids[: len(prompt)]) == prompt


def test_answers_that_the_tokenizer_changes_are_named(bases: dict[str, Path]) -> None:
    """T5's has few characters and no line breaks; a tokenizer of bytes gives everything back."""
    said = [
        Example(id="j", messages=({"role": "user"}, {"role": "assistant", "content": answer}))
        for answer in ('{"☃": 1}', "one\ntwo", "fine")
    ]
    prepared = prepare(said, renderer_of(bases["T5-1.1"]), Training(), None)
    (note,) = prepared.notes
    assert note.startswith("2 of 3 training answers cannot be written as they are")
    assert "<unk>" in note
    starter = Renderer(load_base("starter").tokenizer, "question-answer")
    assert prepare(said, starter, Training(), None).notes == ()
