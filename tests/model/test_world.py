from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from metier.model.world import World, gathered, is_in_parts, joined, part_like


@dataclass(frozen=True)
class Part:
    tokens: int


parts_of = st.lists(st.integers(1, 3000).map(Part), min_size=1, max_size=30)


@given(parts=parts_of, size=st.integers(1, 6))
def test_every_part_counts_once_and_all_compute_equally_many(parts: list[Part], size: int) -> None:
    shares = [World(rank, size).share(parts) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    assert all(part is parts[place] for share in shares for place, part, _ in share)
    counted = [place for share in shares for place, _, counts in share for _ in range(int(counts))]
    assert sorted(counted) == list(range(len(parts)))


@given(parts=parts_of, size=st.integers(1, 6))
def test_no_process_has_much_more_to_do_than_another(parts: list[Part], size: int) -> None:
    loads = [sum(p.tokens for _, p, _ in World(rank, size).share(parts)) for rank in range(size)]
    assert max(loads) - min(loads) <= max(part.tokens for part in parts)


def test_one_process_alone_says_and_adds_what_it_has() -> None:
    with joined() as world:
        assert (world.rank, world.size, world.first) == (0, 1, True)
        assert world.total(1.5, 2.0) == [1.5, 2.0]
        assert world.agree("ä") == "ä"
        assert gathered({"a": torch.ones(2), "b": 3}, world).keys() == {"a", "b"}
        assert not is_in_parts(nn.Linear(2, 2))
        assert part_like(torch.ones(2), 5) == 5


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e9])
def test_clipping_is_that_of_pytorch(limit: float) -> None:
    ours, theirs = (nn.Linear(3, 2).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        (model(torch.arange(3.0).double()) ** 2).sum().backward()
    norm = World().clip(ours.parameters(), limit)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), limit or torch.inf)
    assert norm == pytest.approx(float(expected))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_is_told(bad: float) -> None:
    model = nn.Linear(2, 1)
    model(torch.tensor([1.0, bad])).sum().backward()
    assert not torch.isfinite(torch.tensor(World().clip(model.parameters(), 1.0)))
