"""Bits per byte: of real tokenizers, against losses that Transformers computes text by text."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from metier.evaluation.statistics import ratio
from metier.model.load import locate
from metier.text.tokenizer import Tokenizer
from metier.training.corpus import sample_windows
from metier.training.held_out import HeldOut, bits_of, bits_per_byte, compared
from metier.training.scoring import Scorer

TEXTS = (
    "Once upon a time there was a little girl.\nShe went to the park, and saw a big dog.",
    "été, naïve, 日本 🙂: characters that the small vocabulary spells in bytes.",
    "  leading spaces, a quoted <s> and </s>, and <|endoftext|>\n\n",
    "word " * 300,
    "x",
)


@pytest.mark.parametrize("name", ["starter", "stories260k", "gpt2"])
def test_figures_are_those_of_transformers_over_the_bytes_of_the_text(
    request: pytest.FixtureRequest, name: str
) -> None:
    path = locate("starter") if name == "starter" else request.getfixturevalue(name)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    length = 64 if name == "gpt2" else 512
    part = HeldOut.of("texts", TEXTS, Tokenizer.load(path), length, trained=True)
    bits = part.bits(Scorer(model))
    backend = AutoTokenizer.from_pretrained(path)
    # Control strings are text here, which only `Tokenizer` guarantees: tested on their own below.
    for number in (0, 1, 4):
        ids = backend(TEXTS[number], add_special_tokens=False, return_tensors="pt").input_ids
        first = backend.bos_token_id if backend.bos_token_id is not None else backend.eos_token_id
        labels = torch.cat((torch.tensor([[first]]), ids), dim=1)
        assert labels.shape[1] <= length
        with torch.no_grad():
            loss = model(input_ids=labels, labels=labels).loss.item()
        assert bits[number] == pytest.approx(loss * ids.shape[1] / math.log(2), rel=1e-5)
    assert part.sizes == tuple(len(text.encode("utf-8")) for text in TEXTS)
    assert sum(part.sizes[:3]) < 300, "bytes, not tokens"


def test_control_strings_in_text_cost_as_text(stories260k: Path) -> None:
    tokenizer = Tokenizer.load(stories260k)
    part = HeldOut.of("texts", TEXTS[2:3], tokenizer, 512, trained=True)
    seen = set(part.targets.flatten().tolist())
    assert seen.isdisjoint(tokenizer.control_tokens.values())
    assert {tokenizer.encode(letter)[-1] for letter in "<s>"} <= seen


def test_a_window_longer_than_a_row_stands_in_several(stories260k: Path) -> None:
    tokenizer = Tokenizer.load(stories260k)
    part = HeldOut.of("texts", TEXTS, tokenizer, 100, trained=True)
    rows = [row[row >= 0] for row in part.targets]
    assert len(rows) % 4 == 0
    assert part.window[: len(rows)].tolist().count(3) > 5
    for number, text in enumerate(TEXTS):
        mine = [row for row, place in zip(rows, part.window, strict=True) if place == number]
        told = "".join(tokenizer.decode(row.tolist()) for row in mine if len(row))
        assert told.replace(" ", "") == text.replace(" ", "")


class Even:
    """In place of a model: one bit for every token that is looked at."""

    device = torch.device("cpu")

    def __call__(self, ids, lengths, wanted, criterion) -> torch.Tensor:
        logits = torch.zeros(int(wanted.sum()), 2)
        criterion_targets = slice(0, len(logits))
        return criterion(logits, criterion_targets)[0]


def held_out(name: str, sizes: tuple[int, ...], trained: bool) -> HeldOut:
    """A window of 16 tokens for each size."""
    targets = torch.ones(len(sizes), 16, dtype=torch.long)
    return HeldOut(
        name, trained, targets, targets, torch.arange(len(sizes)), sizes
    )  # fmt: skip


def test_only_trained_sources_choose_the_best() -> None:
    parts = [
        held_out("a", (8, 8), True),
        held_out("b", (4, 4, 4, 4), True),
        held_out("watched", (1,), False),
    ]
    bits = bits_of(Even(), parts)  # type: ignore[arg-type]
    assert bits["b"].tolist() == pytest.approx([16] * 4)
    expected = {"a": 2, "b": 4, "watched": 16, "loss": 3}
    assert bits_per_byte(bits, parts) == pytest.approx(expected)
    alone = bits_per_byte(bits, parts[2:])
    assert alone["watched"] == pytest.approx(16)
    assert math.isnan(alone["loss"])


def test_a_source_that_became_worse_is_named_and_noise_is_not() -> None:
    draw = np.random.default_rng(0)
    sizes = tuple(draw.integers(800, 1600, 24).tolist())
    parts = [held_out(name, sizes, name != "c") for name in ("a", "b", "c", "d")]
    before = {part.name: np.array(sizes) * draw.normal(1.6, 0.2, 24) for part in parts}
    noise = np.array(sizes) * draw.normal(0, 0.03, (4, 24))
    after = {
        name: before[name] + noise[place] + np.array(sizes) * shift
        for place, (name, shift) in enumerate((("a", -0.1), ("b", 0.05), ("c", 0.2), ("d", 0.0)))
    }

    changes = {change.source: change for change in compared(before, after, parts, ratio)}
    assert {name: change.verdict for name, change in changes.items()} == {
        "a": "better", "b": "worse", "c": "worse", "d": "unclear"
    }  # fmt: skip
    for change in changes.values():
        assert change.difference == pytest.approx(change.after - change.before)
        assert change.low < change.difference < change.high
        assert f"{change.before:.3f} bits per byte before" in str(change)
    one = held_out("one", (1000,), True)
    (alone,) = compared({"one": np.array([1600])}, {"one": np.array([1700])}, [one], ratio)
    assert alone.verdict == "unclear"
    assert alone.row()["low"] is None


def test_windows_are_chosen_by_their_text_alone() -> None:
    texts = [f"document {i} " * (1 + i % 40) for i in range(300)]
    chosen = sample_windows(iter(texts), 12)
    assert len(set(chosen)) == 12
    assert sample_windows(reversed(texts), 12) == chosen
    assert sample_windows(iter(texts), 6) == chosen[:6]
    assert set(chosen) - set(sample_windows([*texts[:-1], "new"], 12)) <= {texts[-1]}
    assert sample_windows([*texts, *texts], 12) == chosen, "a copy is no other window"


def test_long_documents_give_windows_and_empty_ones_give_none() -> None:
    chosen = sample_windows(iter(["", " \n", "".join(f"word{i:04} " for i in range(1000))]), 100)
    assert len(chosen) == 6
    assert min(map(len, chosen)) > 1300
    assert max(map(len, chosen)) <= 1600
