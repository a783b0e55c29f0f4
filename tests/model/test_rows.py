"""Rows of different lengths, read side by side in groups."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.model.rows import _GROUP_COST, cheapest_cut, groups, padded, parted, side_by_side

CPU = torch.device("cpu")
lengths_of_rows = st.lists(st.integers(1, 300), min_size=1, max_size=40).map(
    lambda lengths: sorted(lengths, reverse=True)
)


@given(lengths_of_rows)
@settings(max_examples=50)
def test_values_come_back_to_their_tokens_and_padding_is_zero(lengths: list[int]) -> None:
    tokens = torch.arange(1.0, sum(lengths) + 1)[:, None].repeat(1, 2)
    back = []
    parts = groups(lengths, CPU)
    spare = torch.zeros(3, 2)
    for group, own in zip(parts, parted(torch.cat((tokens, spare)), parts), strict=True):
        padded = group.spread(own)
        assert padded.shape == (group.rows, group.length, 2)
        assert int((padded[..., 0] != 0).sum()) == group.tokens
        back.append(group.gather(padded))
    assert torch.equal(torch.cat(back), tokens)


def test_a_function_sees_each_row_alone_and_padding_behind_it() -> None:
    lengths = [200, 190, 40, 30, 3]
    ids = torch.arange(1, sum(lengths) + 1)
    assert len(groups(lengths, CPU)) > 1
    sums = side_by_side(lambda padded: padded.cumsum(1), ids, lengths, None)
    assert torch.equal(sums, torch.cat([row.cumsum(0) for row in ids.split(lengths)]))
    wanted = ids % 7 == 0
    some = side_by_side(lambda padded: padded.cumsum(1), ids, lengths, None, wanted)
    assert torch.equal(some, sums[wanted])


def test_padding_stays_within_the_context() -> None:
    def read(padded: torch.Tensor) -> torch.Tensor:
        assert padded.shape[1] <= 41
        return padded

    ids = torch.arange(80)
    assert torch.equal(side_by_side(read, ids, [41, 39], 41), ids)
    assert groups([41, 39], CPU)[0].length == 48


def test_rows_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="longest first"):
        groups([3, 20], CPU)


def test_gradients_pass_through_padding() -> None:
    lengths = [120, 110, 9, 3]
    assert len(groups(lengths, CPU)) == 2
    tokens = torch.randn(242, 1, dtype=torch.float64, requires_grad=True)

    def there_and_back(values: torch.Tensor) -> torch.Tensor:
        own = zip(groups(lengths, CPU), parted(values, groups(lengths, CPU)), strict=True)
        parts = [group.gather(group.spread(part).cumsum(1).sin()) for group, part in own]
        return torch.cat(parts)

    assert torch.autograd.gradcheck(there_and_back, tokens)


def cost(lengths: list[int], places: list[tuple[int, int]]) -> int:
    return sum((end - start) * lengths[start] + _GROUP_COST for start, end in places)


def every_cut(count: int) -> Iterator[list[tuple[int, int]]]:
    """All ways to cut `count` rows, by whether there is a cut after each."""
    for cuts in itertools.product((False, True), repeat=count - 1):
        ends = [0, *(place + 1 for place, here in enumerate(cuts) if here), count]
        yield list(itertools.pairwise(ends))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=9))
@settings(max_examples=60)
def test_no_cut_is_cheaper(lengths: list[int]) -> None:
    lengths = sorted(lengths, reverse=True)
    allowed = list(every_cut(len(lengths)))
    found = cheapest_cut(lengths)
    assert found in allowed
    assert cost(lengths, found) == min(cost(lengths, places) for places in allowed)


@given(st.integers(1, 5000))
def test_little_is_added_to_a_length(length: int) -> None:
    assert length <= padded(length) < length + max(8, length / 8)


def test_few_shapes() -> None:
    assert len({padded(length) for length in range(513, 1025)}) == 8
