"""Virtual tokens stand before every row as in PEFT's own forward pass, row by row, unpadded."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from metier.errors import ConfigError, ModelError
from metier.model import decoder
from metier.model.adapters import add_adapter
from metier.model.backbone import context_of
from metier.model.generate import Engine
from metier.model.head import Classifier
from metier.model.load import Base
from metier.model.prelude import prelude, virtual_tokens
from metier.task import Training
from metier.text.template import Renderer
from metier.training.batches import Batch, Row
from metier.training.scoring import Scorer
from metier.training.sft import answer_loss
from tests.model.test_generate import CHATS, NEW, oracle

VIRTUAL = 7
LENGTHS = (150, 140, 33, 9, 2)


def tuned(base: Base, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """An adapter that is no longer at its start."""
    model = deepcopy(base.model).to(dtype)
    adapted = add_adapter(model, kind, Training(virtual_tokens=VIRTUAL), 0)
    weight = adapted.prompt_encoder["default"].embedding.weight
    weight.data += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    adapted.prompt_encoder.to(dtype)
    return adapted.eval()


KINDS = pytest.mark.parametrize("kind", ["prompt-tuning", "prefix-tuning"])


def rows() -> list[Row]:
    draw = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 512, (n,), generator=draw).tolist() for n in LENGTHS]
    return [Row(tuple(ids), (False, *[True] * (len(ids) - 1))) for ids in drawn]


def of_peft(model: Any, row: Row) -> torch.Tensor:
    """Loss of one row by PEFT's forward pass; where it gives logits of virtual tokens, without."""
    ids = torch.tensor([row.ids])
    logits = model(input_ids=ids[:, :-1]).logits[0, 1 - len(row.ids) :]
    return F.cross_entropy(logits, ids[0, 1:], reduction="sum")


@KINDS
def test_loss_and_gradient_are_those_of_peft(base: Base, kind: str) -> None:
    model = tuned(base, kind, torch.float64)
    weight = model.prompt_encoder["default"].embedding.weight
    expected = sum(of_peft(model, row) for row in rows())
    (wanted,) = torch.autograd.grad(expected, weight)
    found = answer_loss(Scorer(model))(Batch.of(rows()))
    (gradient,) = torch.autograd.grad(found, weight)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(gradient, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())


@KINDS
@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # PEFT leaves them out
def test_answers_are_those_of_peft_also_side_by_side(
    base: Base, renderer: Renderer, kind: str
) -> None:
    model = tuned(base, kind)
    prompts = [renderer.prompt(chat) for chat in CHATS]
    expected = [oracle(model, prompt, renderer.stop_ids) for prompt in prompts]
    for budget in (1, 100_000):
        engine = Engine(model, renderer, NEW, batch_tokens=budget)
        assert engine.generate_ids(prompts) == expected
    untouched = Engine(base.model, renderer, NEW).generate_ids(prompts)
    assert expected != untouched


@KINDS
def test_likelihoods_are_those_of_peft(base: Base, renderer: Renderer, kind: str) -> None:
    model = tuned(base, kind)
    start = renderer.prompt(CHATS[0])
    pairs = [(start, [5, 6, 7]), (start, [9]), (start[:1], [4, 5]), (start[:3], [8] * 20)]
    with torch.inference_mode():
        for (prompt, after), found in zip(
            pairs, Engine(model, renderer, NEW).logprobs(pairs), strict=True
        ):
            ids = [*prompt, *after]
            counted = tuple(place >= len(prompt) for place in range(len(ids)))
            logits = model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :]
            chances = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])
            expected = sum(float(c) for c, one in zip(chances, counted[1:], strict=True) if one)
            assert found == pytest.approx(expected, abs=1e-3)


def test_the_oracle_sees_virtual_tokens_that_are_miscounted(
    base: Base, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: the decoder believes there is one fewer."""
    model = tuned(base, "prefix-tuning")
    prompts = [renderer.prompt(chat) for chat in CHATS]
    expected = [oracle(model, prompt, renderer.stop_ids) for prompt in prompts]
    monkeypatch.setattr(decoder, "virtual_tokens", lambda model: virtual_tokens(model) - 1)
    assert Engine(model, renderer, NEW).generate_ids(prompts) != expected


@KINDS
def test_they_take_their_place_in_the_context(base: Base, renderer: Renderer, kind: str) -> None:
    model = tuned(base, kind)
    engine = Engine(model, renderer, 12)
    assert engine.context == context_of(model) == 512 - VIRTUAL
    engine.generate_ids([[5] * (500 - VIRTUAL)])
    with pytest.raises(ModelError, match=f"at most {512 - VIRTUAL}"):
        engine.generate_ids([[5] * (501 - VIRTUAL)])


@KINDS
def test_a_head_pools_what_it_read_behind_them(base: Base, kind: str) -> None:
    model = tuned(base, kind)
    lengths = [9, 4]
    ids = torch.arange(3, 16)
    classifier = Classifier(model, ("a", "b"))
    torch.nn.init.normal_(classifier.head.weight)
    with torch.no_grad():
        found = classifier(ids, lengths)
        for logits, row in zip(found, ids.split(lengths), strict=True):
            seen = model(input_ids=row[None], output_hidden_states=True).hidden_states[-1]
            hidden = seen[0, -len(row) :]
            expected = classifier.head(torch.cat((hidden.mean(0), hidden[-1])))
            assert torch.allclose(logits, expected, atol=1e-4)


def test_other_models_have_none(base: Base) -> None:
    adapted = add_adapter(deepcopy(base.model), "lora", Training(), 0)
    for model in (base.model, adapted):
        assert virtual_tokens(model) == 0
        assert prelude(model) is None


def test_what_has_no_room_for_them_is_refused(base: Base) -> None:
    with pytest.raises(ConfigError, match="more than half of the 512"):
        add_adapter(base.model, "prefix-tuning", Training(virtual_tokens=257), 0)
    windowed = replace(base, model=deepcopy(base.model))
    windowed.model.config.sliding_window = 12
    with pytest.raises(ConfigError, match="at most 6"):
        add_adapter(windowed.model, "prompt-tuning", Training(virtual_tokens=VIRTUAL), 0)
    config = transformers.MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1)
    with pytest.raises(ModelError, match="in a way of its own"):
        add_adapter(transformers.MambaForCausalLM(config), "prompt-tuning", Training(), 0)
