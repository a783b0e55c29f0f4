import pytest
import torch
from torch.nn import functional as F

from metier.training.losses import linear_cross_entropy


@pytest.mark.parametrize("rows", [1, 7, 512, 1100])
def test_value_and_gradients_equal_plain_cross_entropy(rows: int) -> None:
    torch.manual_seed(rows)
    hidden = torch.randn(rows, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(31, 12, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 31, (rows,))
    (3 * linear_cross_entropy(hidden, weight, targets)).backward()
    found = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None

    expected = 3 * F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    expected.backward()
    for ours, theirs in zip(found, (hidden.grad, weight.grad), strict=True):
        assert (ours - theirs).abs().max() < 1e-9
    again = linear_cross_entropy(hidden, weight, targets)
    assert again.item() * 3 == pytest.approx(expected.item(), abs=1e-9)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden = torch.randn(5, 4, requires_grad=True)
    weight = torch.randn(9, 4)
    linear_cross_entropy(hidden, weight, torch.arange(5)).backward()
    assert hidden.grad is not None
    assert weight.grad is None
