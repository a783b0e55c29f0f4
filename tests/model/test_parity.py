"""Noise is about what rounding does; what is not rounding lies beyond the bound."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from metier.errors import ModelError
from metier.model import parity
from metier.model.adapters import add_adapter
from metier.model.load import Base
from metier.model.merge import merge
from metier.model.parity import Forced, Reference, logits
from metier.progress import Silent
from metier.task import Lora, Training
from tests.test_imports import SOURCE, edges

ROWS = [
    Forced((1, 403, 407, 261, 378), (270, 304, 2), 3),
    Forced((1, 346, 306), tuple(range(300, 340)), 40),
]


def adapted(base: Base, dtype: torch.dtype) -> Any:
    model = add_adapter(copy.deepcopy(base.model).to(dtype), "lora", Training(lora=Lora(rank=4)), 0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.01
    return model.eval()


def reference(model: Any) -> Reference:
    return Reference(model, ROWS, lambda: None)


def differences(known: Reference, model: Any) -> list[float]:
    return [known.difference(row, logits(model, one)) for row, one in enumerate(ROWS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_lies_within_the_bound_and_near_the_noise(base: Base, dtype: torch.dtype) -> None:
    model = adapted(base, dtype)
    known = reference(model)
    worst = max(differences(known, merge(model, Silent()).model))
    assert known.noise / 4 < worst <= known.bound
    assert known.bound == parity.BOUND * known.noise


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.001), (torch.bfloat16, 2)])
def test_a_changed_layer_lies_beyond_the_bound(
    base: Base, dtype: torch.dtype, factor: float
) -> None:
    model = adapted(base, dtype)
    known = reference(model)
    assert differences(known, model) == [0, 0], "what moved the outputs is gone"
    merged: Any = merge(model, Silent()).model
    merged.model.layers[2].mlp.down_proj.weight.data *= factor
    assert max(differences(known, merged)) > known.bound


def test_the_noise_grows_with_the_rounding_of_the_format(base: Base) -> None:
    fine, coarse = (reference(adapted(base, t)).noise for t in (torch.float32, torch.bfloat16))
    assert fine * 2**14 < coarse < fine * 2**18, "2^16 is the ratio of the formats"


def test_logits_are_those_before_each_token_of_the_answer(base: Base) -> None:
    row = ROWS[0]
    with torch.inference_mode():
        whole = base.model(torch.tensor([[*row.prompt, *row.answer]])).logits[0]
    expected = whole[len(row.prompt) - 1 : -1]
    assert torch.allclose(logits(base.model, row), expected, atol=1e-4)
    first = Forced(row.prompt, row.answer, 1)
    assert torch.allclose(logits(base.model, first), expected[:1], atol=1e-4)


def test_a_gap_is_that_of_the_two_likeliest(base: Base) -> None:
    known = reference(base.model)
    top = logits(base.model, ROWS[1])[7].sort(descending=True).values
    assert known.gap(1, 7) == pytest.approx(float(top[0] - top[1]))
    assert known.gap(1, 40) == math.inf
    known.noise = known.gap(1, 7)
    assert known.is_tie(1, 7)
    known.noise *= 0.99
    assert not known.is_tie(1, 7)


def test_what_is_no_number_is_no_small_difference(base: Base) -> None:
    known = reference(base.model)
    found = logits(base.model, ROWS[0]).clone()
    found[1, 5] = torch.nan
    assert known.difference(0, found) == math.inf
    assert known.difference(0, found[:1]) == math.inf, "of another shape"
    broken = copy.deepcopy(base.model)
    broken.model.norm.weight.data[0] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="no numbers"):
        reference(broken)


def test_logits_of_long_answers_are_kept_as_far_as_there_is_room() -> None:
    answers = [[0] * 10, [0] * 1000]
    assert parity.kept(answers, 8192) == [10, 1000]
    assert parity.kept(answers, 1 << 19) == [10, 64]
    assert parity.kept(answers, 1 << 30) == [1, 1]


def test_the_script_of_the_fresh_process_knows_nothing_of_metier() -> None:
    imports = {target for source, target in edges(SOURCE) if source == "metier.model.reloaded"}
    assert "transformers.AutoModelForCausalLM" in imports
    assert not [target for target in imports if target.split(".")[0] == "metier"]
