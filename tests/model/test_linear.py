"""Joined linear layers compute what they compute one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from metier.model.linear import Joined, project

SIZES = (6, 3, 5)


class Three(nn.Module):
    """Three layers that read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, n, bias=False) for n in SIZES)

    def layers(self) -> list[Any]:
        return [self.first, self.second, self.third]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.layers()], -1)


def adapted(targets: list[str]) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(Three(), LoraConfig(r=2, target_modules=targets)).double()  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("targets", [["first", "second", "third"], ["first", "third"], ["second"]])
@pytest.mark.parametrize("train_base", ["", "first", "first second third"])
def test_output_and_gradients_are_those_of_peft(targets: list[str], train_base: str) -> None:
    model = adapted(targets)
    for name in train_base.split():
        layer = getattr(model.get_base_model(), name)
        getattr(layer, "base_layer", layer).weight.requires_grad = True
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(7, sum(SIZES), dtype=torch.float64)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    expected = model(x)
    gradients = torch.autograd.grad((expected * probe).sum(), wanted)
    found = project(x, Joined(*model.get_base_model().layers()).weights(torch.float64))
    assert torch.allclose(found, expected, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad((found * probe).sum(), wanted), gradients, strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_frozen_layers_share_one_matrix_and_compute_as_before() -> None:
    three = Three().requires_grad_(requires_grad=False)
    x = torch.randn(7, 4)
    expected = three(x)
    whole = Joined(*three.layers()).weights(torch.float32).whole
    assert torch.equal(three(x), expected)
    assert three.second.weight.data_ptr() == whole[SIZES[0] :].data_ptr()
    trained = Three()
    before = trained.second.weight.data_ptr()
    Joined(*trained.layers()).weights(torch.float32)
    assert trained.second.weight.data_ptr() == before, "what an optimiser holds stays where it is"


def test_weights_that_change_afterwards_are_seen() -> None:
    three = Three().requires_grad_(requires_grad=False)
    joined, other = Joined(*three.layers()), Joined(*three.layers())
    x = torch.randn(7, 4)

    def check() -> None:
        for one in (joined, other):
            found = project(x.to(three.first.weight.dtype), one.weights(three.first.weight.dtype))
            assert torch.allclose(found, three(x.to(found.dtype)), atol=1e-6)

    check()
    three.load_state_dict(Three().state_dict())
    check()
    three.double()
    check()
    three.second.weight.data = torch.randn(SIZES[1], 4, dtype=torch.float64)
    check()
    three.requires_grad_(requires_grad=True)
    project(x.double(), joined.weights(torch.float64)).sum().backward()
    assert all(layer.weight.grad is not None for layer in three.layers())
