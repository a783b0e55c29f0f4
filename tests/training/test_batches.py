import itertools
from collections.abc import Iterator

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.training.batches import _BATCH_COST, Row, RowBatches, cheapest_cut, cut, pad

rows_of_lengths = st.lists(st.integers(2, 30), min_size=1, max_size=40).map(
    lambda lengths: [
        Row(tuple(range(100 * i, 100 * i + n)), (False,) + (True,) * (n - 1))
        for i, n in enumerate(lengths)
    ]
)


def test_padding_is_never_trained_and_nothing_is_lost() -> None:
    rows = [Row((5, 6, 7), (False, True, True)), Row((8, 9), (False, True))]
    batch = pad(rows, pad_id=0)
    assert batch.ids[:, :4].tolist() == [[5, 6, 7, 0], [8, 9, 0, 0]]
    assert batch.trained[:, :4].tolist() == [
        [False, True, True, False],
        [False, True, False, False],
    ]
    assert not batch.ids[:, 4:].any()
    assert not batch.trained[:, 4:].any()
    assert (batch.weight, batch.tokens) == (3.0, 5)


@given(rows_of_lengths, st.integers(1, 200))
@settings(max_examples=50)
def test_cut_keeps_every_row_once_within_the_budget(rows: list[Row], budget: int) -> None:
    batches = cut(rows, budget, pad_id=0)
    found = sorted(
        tuple(batch.ids[i, : batch.lengths[i]].tolist())
        for batch in batches
        for i in range(len(batch.ids))
    )
    assert found == sorted(row.ids for row in rows)
    assert all(batch.ids.numel() <= budget or len(batch.ids) == 1 for batch in batches)


def cost(lengths: list[int], places: list[tuple[int, int]]) -> int:
    return sum((end - start) * lengths[start] + _BATCH_COST for start, end in places)


def every_cut(count: int) -> Iterator[list[tuple[int, int]]]:
    """All ways to cut `count` rows, by whether there is a cut after each."""
    for cuts in itertools.product((False, True), repeat=count - 1):
        ends = [0, *(place + 1 for place, here in enumerate(cuts) if here), count]
        yield list(itertools.pairwise(ends))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=9), st.integers(1, 1500))
@settings(max_examples=60)
def test_no_cut_is_cheaper(lengths: list[int], budget: int) -> None:
    lengths = sorted(lengths, reverse=True)
    allowed = [
        places
        for places in every_cut(len(lengths))
        if all((e - s) * lengths[s] <= budget or e - s == 1 for s, e in places)
    ]
    found = cheapest_cut(lengths, budget)
    assert found in allowed
    assert cost(lengths, found) == min(cost(lengths, places) for places in allowed)


@given(rows_of_lengths, st.integers(1, 100), st.integers(0, 5))
@settings(max_examples=50)
def test_a_pass_shows_every_row_once(rows: list[Row], step_rows: int, seed: int) -> None:
    made = RowBatches(rows, step_rows=step_rows, micro_tokens=64, seed=seed, pad_id=0)
    for epoch in range(2):
        first = epoch * made.steps_per_epoch
        steps = [
            [int(start) for batch in made.step(step) for start in batch.ids[:, 0]]
            for step in range(first, first + made.steps_per_epoch)
        ]
        assert sorted(itertools.chain(*steps)) == [row.ids[0] for row in rows]
        assert all(1 <= len(step) <= step_rows for step in steps)


def test_steps_depend_on_seed_and_index_alone() -> None:
    rows = [Row((i, i + 1, i + 2), (False, True, True)) for i in range(50)]

    def ids(seed: int, index: int) -> list[torch.Tensor]:
        made = RowBatches(rows, step_rows=10, micro_tokens=12, seed=seed, pad_id=0)
        return [batch.ids for batch in made.step(index)]

    walked = RowBatches(rows, step_rows=10, micro_tokens=12, seed=3, pad_id=0)
    for index in range(12):
        step = [batch.ids for batch in walked.step(index)]
        assert all(torch.equal(a, b) for a, b in zip(step, ids(3, index), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(ids(3, 0), ids(4, 0), strict=True))
