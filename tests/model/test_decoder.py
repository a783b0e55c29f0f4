"""How rows are put together; what they then write is tested in test_generate.py."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from metier.model.decoder import (
    _common_start,
    batches,
    evaluating,
    has_plain_cache,
    read_prefix,
    repeated,
)
from metier.model.load import Base


@given(lengths=st.lists(st.integers(0, 50), max_size=30), budget=st.integers(0, 200))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    found = batches(lengths, budget)
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    order = [lengths[index] for batch in found for index in batch]
    assert order == sorted(lengths, reverse=True), "the longest first, so that memory fails early"


@given(start=st.lists(st.integers(0, 3), max_size=40), ends=st.lists(st.lists(st.integers(0, 3))))
def test_the_common_start_is_common(start: list[int], ends: list[list[int]]) -> None:
    rows = [start + end for end in ends] or [start]
    found = _common_start(rows)
    assert all(row[:found] == rows[0][:found] for row in rows)
    if len(rows) > 1 and len(start) >= 16:
        assert found >= len(start)
        longer = {tuple(row[: found + 1]) for row in rows}
        assert len(longer) > 1 or min(map(len, rows)) == found


def test_a_short_start_is_not_read_apart() -> None:
    assert _common_start([[1] * 15 + [2], [1] * 15 + [3]]) == 0
    assert _common_start([[1] * 16 + [2], [1] * 16 + [3]]) == 16
    assert _common_start([[1] * 40]) == 0


def test_a_repeated_prefix_stays_as_it_was(base: Base) -> None:
    with evaluating(base.model):
        cache = read_prefix(base.model, [1, 5, 6])
        before = cache.layers[0].keys.clone()
        for rows in (2, 3):
            base.model(
                input_ids=torch.tensor([[7, 8]] * rows),
                past_key_values=repeated(cache, rows),
                use_cache=True,
            )
    assert torch.equal(cache.layers[0].keys, before)
    assert cache.get_seq_length() == 3
    assert read_prefix(base.model, []) is None


@pytest.mark.parametrize(("kind", "plain"), [("Llama", True), ("Mamba", False), ("Lfm2", False)])
def test_what_remembers_by_keys_and_values_alone(kind: str, plain: bool) -> None:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=16, hidden_size=64, num_hidden_layers=1
    )
    if kind == "Lfm2":
        config.layer_types = ["conv"]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert has_plain_cache(model) == plain


def test_the_mode_comes_back_after_an_error(base: Base) -> None:
    def fail() -> None:
        with evaluating(base.model):
            assert not base.model.training
            assert torch.is_inference_mode_enabled()
            raise InterruptedError

    base.model.train()
    try:
        with pytest.raises(InterruptedError):
            fail()
        assert base.model.training
    finally:
        base.model.eval()
