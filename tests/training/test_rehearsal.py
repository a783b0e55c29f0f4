"""Rehearsal: what a base writes, what it holds for likely, and that a model keeps to it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from metier.model.adapters import add_adapter
from metier.model.load import Base, load_base
from metier.task import Lora, Training
from metier.text.template import Renderer
from metier.training import rehearsal
from metier.training.rehearsal import Rehearsal
from metier.training.scoring import Scorer
from metier.training.sft import answer_loss, fit
from tests.model.test_generate import FAMILIES, tiny
from tests.training.test_sft import rows_of

SIZE: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 20,
}
LLAMA = transformers.LlamaConfig(**SIZE)


@pytest.fixture(scope="module")
def base(stories260k: Path) -> Base:
    return load_base(str(stories260k), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def written(base: Base) -> Rehearsal:
    return rehearsal.write(base)


def texts(rehearsed: Rehearsal) -> list[list[int]]:
    return [list(part.tolist()) for part in rehearsed.ids.split(rehearsed.lengths)]


def test_a_base_writes_what_it_was_trained_on(base: Base, written: Rehearsal) -> None:
    """This one was trained on stories: three quarters of them begin with the same words."""
    assert len(written.lengths) == rehearsal.TEXTS
    assert max(written.lengths) == rehearsal.LENGTH - 1
    told = [base.tokenizer.decode(ids[1:]) for ids in texts(written)]
    assert len(set(told)) > 500
    assert sum("Once upon a time" in text for text in told) > 200


def test_texts_are_drawn_by_the_bases_own_probabilities(base: Base, written: Rehearsal) -> None:
    first = base.tokenizer.bos_id
    with torch.no_grad():
        chances = base.model(torch.tensor([[first]])).logits[0, 0].softmax(-1)
    seen = Counter(ids[1] for ids in texts(written) if len(ids) > 1)
    for token, count in seen.most_common(3):
        expected = rehearsal.TEXTS * chances[token].item()
        assert abs(count - expected) < 4 * expected**0.5 + 1


def test_a_text_is_read_until_the_base_ends_it(base: Base) -> None:
    end = base.tokenizer.eos_id
    assert rehearsal._end([end, 5, end, 7], end) == 2
    assert rehearsal._end([1, 5, 6], end) == 2


def test_an_opinion_is_the_bases_own(base: Base, written: Rehearsal) -> None:
    """The likeliest tokens as they are; others, drawn, that stand for all others together."""
    start = sum(written.lengths[:3])
    ids = texts(written)[3]
    rows = slice(start, start + len(ids))
    with torch.no_grad():
        logprobs = torch.log_softmax(base.model(torch.tensor([ids])).logits[0], -1)
    expected = logprobs.gather(1, written.following[rows].long())
    assert torch.allclose(written.logprobs[rows], expected, atol=1e-3)
    likely = slice(0, rehearsal._LIKELY)
    best = logprobs.topk(rehearsal._LIKELY).values
    assert torch.allclose(written.logprobs[rows, likely], best, atol=1e-3)
    drawn = written.logprobs[rows, rehearsal._LIKELY :]
    assert (drawn <= best[:, -1:] + 1e-3).all(), "is none of the likeliest"


def test_what_is_drawn_stands_for_all_others_on_average() -> None:
    """The mean over many opinions of one model is the whole divergence from another."""
    torch.manual_seed(0)
    models = [transformers.LlamaForCausalLM(LLAMA).eval() for _ in range(2)]
    for model in models:
        model.lm_head.weight.data *= 20
    ids = [3, 4, 5]
    with torch.no_grad():
        theirs, ours = (m(torch.tensor([ids])).logits[0].log_softmax(-1) for m in models)
    whole = F.kl_div(ours, theirs, reduction="sum", log_target=True).item()
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(200):
        held = Rehearsal(torch.tensor(ids), (3,), *rehearsal._opinion(theirs, draw))
        found.append(held.opinion()(ours.clone(), slice(0, 3))[0].item())
    likely = theirs.topk(rehearsal._LIKELY)
    told = (likely.values.exp() * (likely.values - ours.gather(1, likely.indices))).sum().item()
    error = torch.tensor(found).std().item() / 200**0.5
    assert sum(found) / 200 == pytest.approx(whole, abs=4 * error)
    assert abs(told - whole) > 4 * error, "control: the likely ones alone are not enough"


def test_it_is_the_same_again_and_from_its_file(
    base: Base, written: Rehearsal, tmp_path: Path
) -> None:
    written.save(tmp_path)
    for other in (rehearsal.write(base), Rehearsal.load(tmp_path)):
        assert other.lengths == written.lengths
        assert all(
            torch.equal(getattr(other, name), getattr(written, name))
            for name in ("ids", "following", "logprobs")
        )
    assert rehearsal.write(base, seed=1).ids.tolist() != written.ids.tolist()


def test_a_part_holds_its_texts_longest_first(written: Rehearsal) -> None:
    short = min(range(len(written.lengths)), key=written.lengths.__getitem__)
    part = written.part([short, 0])
    assert texts(part) == [texts(written)[0], texts(written)[short]]
    starts = [sum(written.lengths[:place]) for place in (0, short)]
    expected = torch.cat(
        [written.logprobs[s : s + n] for s, n in zip(starts, part.lengths, strict=True)]
    )
    assert torch.equal(part.logprobs, expected)


def test_the_loss_is_the_mean_divergence_of_the_steps_texts(
    base: Base, written: Rehearsal, stories260k: Path
) -> None:
    """Oracle: both models over the texts, one at a time, by PyTorch's own divergence."""
    mean = rehearsal.loss(Scorer(base.model), written, seed=3)
    assert mean(0).item() == pytest.approx(0, abs=2e-3)
    assert rehearsal.loss(Scorer(base.model), written, seed=3)(5).item() == mean(5).item()

    other = load_base(str(stories260k), dtype=torch.float32, device="cpu").model
    with torch.no_grad():
        other.lm_head.weight *= 0.7
    order = torch.randperm(
        rehearsal.TEXTS, generator=torch.Generator().manual_seed(3 * 1_000_003 + 7)
    )
    total, count = 0.0, 0
    for place in order[: rehearsal.STEP_TEXTS].tolist():
        ids = torch.tensor([texts(written)[place]])
        with torch.no_grad():
            theirs, ours = (m(ids).logits[0].log_softmax(-1) for m in (base.model, other))
        total += F.kl_div(ours, theirs, reduction="sum", log_target=True).item()
        count += ids.shape[1]
    found = rehearsal.loss(Scorer(other), written, seed=3, weight=2.0)(7).item()
    assert found == pytest.approx(2 * total / count, rel=0.1)
    assert found > 0.05, "control"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_and_is_held(
    base: Base, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those with another memory than keys and values, too, and those that scale their logits."""
    monkeypatch.setattr(rehearsal, "TEXTS", 6)
    monkeypatch.setattr(rehearsal, "_SIDE_BY_SIDE", 3)
    model, other = (tiny(FAMILIES[family](), seed) for seed in (0, 1))
    held = rehearsal.write(dataclasses.replace(base, model=model))
    assert len(held.lengths) == 6
    assert rehearsal.loss(Scorer(model), held, seed=0)(0).item() == pytest.approx(0, abs=0.02)
    assert rehearsal.loss(Scorer(other), held, seed=0)(0).item() > 0.1, "control"


def test_what_is_rehearsed_is_not_forgotten(
    base: Base, written: Rehearsal, stories260k: Path
) -> None:
    """The same answers are learned with and without."""
    training = Training(epochs=12, batch_size=8, patience=0)
    away, learned = {}, {}
    for weight in (0.0, 1.0):
        fresh = load_base(str(stories260k), dtype=torch.float32, device="cpu")
        train = rows_of(Renderer(fresh.tokenizer, "question-answer"), training)
        model = add_adapter(fresh.model, "lora", Training(lora=Lora(rank=4)), 0)
        score = Scorer(model)
        also = rehearsal.loss(score, written, 0, weight)
        state = fit(
            model,
            answer_loss(score),
            train,
            train,
            training,
            learning_rate=5e-3,
            seed=0,
            also=also,
        )
        divergence = rehearsal.loss(score, written, seed=99)
        with torch.no_grad():
            away[weight] = sum(divergence(step).item() for step in range(10)) / 10
        learned[weight] = state.best_loss / state.curve[0]["validation_loss"]
    assert away[1.0] < away[0.0] / 3
    assert max(learned.values()) < 0.5
