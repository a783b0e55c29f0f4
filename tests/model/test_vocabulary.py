"""New tokens change no other, are learned, and are there again when what was learned is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from metier.errors import ModelError
from metier.model.adapters import add_adapter, load_adapter, save_adapter, unfreeze
from metier.model.decoder import Decoder
from metier.model.generate import Engine
from metier.model.load import Base, load_base
from metier.model.vocabulary import add_tokens, with_tokens_of
from metier.task import Lora, Training
from metier.text.template import Renderer
from metier.training.batches import Batch, Row
from metier.training.scoring import Scorer
from metier.training.sft import answer_loss, fit
from tests.training.families import FAMILIES, write_base

TOKENS = ("<dog>", "<park>")
TRAINING = Training(batch_size=2, patience=0, lora=Lora(rank=4, alpha=8))
# A table with more rows than there are tokens, which some families come with.
SPARE = {"Qwen3": {"vocab_size": 8256}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: write_base(tmp_path_factory.mktemp(family), family, **SPARE.get(family, {}))
        for family in FAMILIES
    }


def load(path: Path) -> Base:
    return load_base(str(path), dtype=torch.float32, device="cpu")


@torch.inference_mode()
def logits(model: Any, ids: list[int]) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return found


def learn(base: Base, model: Any, epochs: int = 8) -> list[list[int]]:
    """Train on texts of new tokens; returns their ids."""
    texts = ["Tom saw a <dog> in the <park>", "A <dog> ran"]
    ids = [base.tokenizer.encode(text) for text in texts]
    rows = [Row(tuple(row), (False, *[True] * (len(row) - 1))) for row in ids]
    training = TRAINING.model_copy(update={"epochs": epochs})
    fit(model, answer_loss(Scorer(model)), rows, rows, training, learning_rate=0.02, seed=0)
    model.eval()
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_no_other_token_changes(bases: dict[str, Path], family: str) -> None:
    before = load(bases[family])
    known = before.tokenizer.vocab_size
    ids = before.tokenizer.encode("Tom saw a dog in the park")
    base = add_tokens(load(bases[family]), TOKENS)
    found = logits(base.model, ids)[:, :known]
    assert torch.equal(found, logits(before.model, ids)[:, :known])
    assert base.tokenizer.encode("<dog>") == [known]
    embeddings, head = base.model.get_input_embeddings(), base.model.get_output_embeddings()
    for table in (embeddings, head):
        for row in table.weight[known : known + 2]:
            assert torch.allclose(row, table.weight[:known].mean(0), atol=1e-6)
    assert len(embeddings.weight) == max(known + 2, 8256 if family in SPARE else 0)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "Phi"])
def test_an_adapter_learns_them_and_plain_peft_reads_them(
    bases: dict[str, Path], tmp_path: Path, family: str
) -> None:
    base = add_tokens(load(bases[family]), TOKENS)
    known = base.tokenizer.vocab_size - len(TOKENS)
    new_ids = range(known, known + len(TOKENS))
    model = add_adapter(base.model, "lora", TRAINING, 0, new_ids)
    ids = learn(base, model)
    save_adapter(model, tmp_path, base)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("<dog>", add_special_tokens=False) == [known]
    theirs = AutoModelForCausalLM.from_pretrained(bases[family], dtype=torch.float32)
    if len(tokenizer) > len(theirs.get_input_embeddings().weight):
        theirs.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    theirs = PeftModel.from_pretrained(theirs, tmp_path).eval()
    again = with_tokens_of(load(bases[family]), tmp_path)
    assert again.tokenizer.encode("<dog>") == [known]
    ours = load_adapter(again, tmp_path)
    for row in ids:
        expected = logits(theirs, row)
        assert torch.allclose(logits(model, row), expected, atol=1e-4)
        assert torch.allclose(logits(ours, row), expected, atol=1e-4)
        found = Decoder(ours, [row], 2).logits[0]
        assert torch.allclose(found, expected[-1], atol=1e-3)
    assert _moved(model, known) == {"embeddings", "head"}


def _moved(model: Any, known: int) -> set[str]:
    """Which tables have rows of new tokens that are no longer equal, and so were learned."""
    inner = model.get_base_model()
    tables = {"embeddings": inner.get_input_embeddings(), "head": inner.get_output_embeddings()}
    return {
        name
        for name, table in tables.items()
        if not torch.allclose(table.weight[known], table.weight[known + 1], atol=1e-3)
    }


@pytest.mark.parametrize("kind", ["dora", "pissa", "rslora"])
def test_every_low_rank_kind_learns_them(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    base = add_tokens(load(bases["Llama"]), TOKENS)
    model = add_adapter(base.model, kind, TRAINING, 0, [8192, 8193])
    (row, _) = learn(base, model)
    save_adapter(model, tmp_path, base)
    ours = load_adapter(with_tokens_of(load(bases["Llama"]), tmp_path), tmp_path)
    assert torch.equal(logits(ours, row), logits(model, row))
    assert _moved(model, 8192) == {"embeddings", "head"}


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_loss_and_gradient_are_those_of_peft(bases: dict[str, Path], family: str) -> None:
    """Once with the head of its own, once with the tied one, by the quickest forward pass."""
    base = add_tokens(load(bases[family]), TOKENS)
    model = add_adapter(base.model, "lora", TRAINING, 0, [8192, 8193]).double().eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert sum("trainable_tokens" in name for name in trained) == 1 + (family == "Mistral")
    ids = [[5, 8192, 6, 8193, 8192, 9], [8193, 7, 8]]
    expected = sum(
        torch.nn.functional.cross_entropy(
            model(input_ids=torch.tensor([row])).logits[0, :-1],
            torch.tensor(row[1:]),
            reduction="sum",
        )
        for row in ids
    )
    wanted = torch.autograd.grad(expected, list(trained.values()))
    rows = [Row(tuple(row), (False, *[True] * (len(row) - 1))) for row in ids]
    found = answer_loss(Scorer(model))(Batch.of(rows))
    gradients = torch.autograd.grad(found, list(trained.values()))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient, of_peft in zip(trained, gradients, wanted, strict=True):
        assert torch.allclose(gradient, of_peft, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("family", ["Llama", "Phi"])
def test_a_whole_model_learns_them_and_comes_back(
    bases: dict[str, Path], tmp_path: Path, family: str
) -> None:
    base = add_tokens(load(bases[family]), TOKENS)
    unfreeze(base.model, ())
    (row, _) = learn(base, base.model)
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save(tmp_path)
    again = load(tmp_path)
    assert again.tokenizer.encode("Tom saw a <dog> in the <park>") == row
    assert torch.equal(logits(again.model, row), logits(base.model, row))


def test_a_learned_token_is_written(bases: dict[str, Path], tmp_path: Path) -> None:
    base = add_tokens(load(bases["Llama"]), TOKENS)
    model = add_adapter(base.model, "lora", TRAINING, 0, [8192, 8193])
    learn(base, model, epochs=50)
    save_adapter(model, tmp_path, base)
    again = with_tokens_of(load(bases["Llama"]), tmp_path)
    renderer = Renderer(again.tokenizer, "plain")
    engine = Engine(load_adapter(again, tmp_path), renderer, 2)
    (ids,) = engine.generate_ids([again.tokenizer.encode("Tom saw a <dog> in the")])
    assert renderer.answer(ids) == "<park>"


def test_a_head_with_a_bias_is_refused(bases: dict[str, Path]) -> None:
    base = add_tokens(load(bases["Phi"]), TOKENS)
    with pytest.raises(ModelError, match="an output head with a bias"):
        add_adapter(base.model, "lora", TRAINING, 0, [8192, 8193])


def test_an_adapter_is_refused_without_the_tokens_it_learned(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = add_tokens(load(bases["Qwen3"]), TOKENS)
    save_adapter(add_adapter(base.model, "lora", TRAINING, 0, [8192, 8193]), tmp_path, base)
    with pytest.raises(ModelError, match="learned token 8193, which the tokenizer does not have"):
        load_adapter(load(bases["Qwen3"]), tmp_path)


def test_a_base_without_new_tokens_keeps_its_tokenizer(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = load(bases["Llama"])
    save_adapter(add_adapter(base.model, "lora", TRAINING, 0), tmp_path, base)
    assert not (tmp_path / "tokenizer.json").exists()
    fresh = load(bases["Llama"])
    assert with_tokens_of(fresh, tmp_path) is fresh
