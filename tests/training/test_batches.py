import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.training.batches import Batch, Row, RowBatches, cut

rows_of_lengths = st.lists(st.integers(2, 30), min_size=1, max_size=40).map(
    lambda lengths: [
        Row(tuple(range(100 * i, 100 * i + n)), (False,) + (True,) * (n - 1))
        for i, n in enumerate(lengths)
    ]
)


def test_every_trained_token_is_predicted_from_the_one_before_it() -> None:
    batch = Batch.of([Row((5, 6, 7), (False, True, True)), Row((8, 9), (True, False))])
    assert batch.ids.tolist() == [5, 6, 8]
    assert batch.lengths == (2, 1)
    assert batch.targets.tolist() == [6, 7, -1]
    assert (batch.weight, batch.tokens) == (2.0, 5)


def test_labelled_rows_are_read_to_their_end() -> None:
    batch = Batch.of([Row((5, 6), (False, True), 3), Row((8,), (False,), 0)])
    assert (batch.ids.tolist(), batch.lengths) == ([5, 6, 8], (2, 1))
    assert batch.targets.tolist() == [-1, -1, -1]
    assert (batch.labels.tolist(), batch.weight) == ([3, 0], 2.0)


@given(rows_of_lengths, st.integers(1, 200))
@settings(max_examples=50)
def test_cut_keeps_every_row_once_within_the_budget(rows: list[Row], budget: int) -> None:
    batches = cut(rows, budget)
    found = sorted(
        tuple(ids.tolist()) for batch in batches for ids in batch.ids.split(batch.lengths)
    )
    assert found == sorted(row.ids[:-1] for row in rows)
    assert all(batch.tokens <= budget or len(batch.lengths) == 1 for batch in batches)
    lengths = [length for batch in batches for length in batch.lengths]
    assert lengths == sorted(lengths, reverse=True)


@given(rows_of_lengths, st.integers(1, 100), st.integers(0, 5))
@settings(max_examples=50)
def test_a_pass_shows_every_row_once(rows: list[Row], step_rows: int, seed: int) -> None:
    made = RowBatches(rows, step_rows=step_rows, micro_tokens=64, seed=seed)
    for epoch in range(2):
        first = epoch * made.steps_per_epoch
        steps = [
            [int(ids[0]) for batch in made.step(step) for ids in batch.ids.split(batch.lengths)]
            for step in range(first, first + made.steps_per_epoch)
        ]
        assert sorted(itertools.chain(*steps)) == [row.ids[0] for row in rows]
        assert all(1 <= len(step) <= step_rows for step in steps)


def test_steps_depend_on_seed_and_index_alone() -> None:
    rows = [Row((i, i + 1, i + 2), (False, True, True)) for i in range(50)]

    def ids(seed: int, index: int) -> list[torch.Tensor]:
        made = RowBatches(rows, step_rows=10, micro_tokens=12, seed=seed)
        return [batch.ids for batch in made.step(index)]

    walked = RowBatches(rows, step_rows=10, micro_tokens=12, seed=3)
    for index in range(12):
        step = [batch.ids for batch in walked.step(index)]
        assert all(torch.equal(a, b) for a, b in zip(step, ids(3, index), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(ids(3, 0), ids(4, 0), strict=True))
