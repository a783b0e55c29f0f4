"""Rough sums against the real tokenizer, and caps against the sums."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from metier.data import limits
from metier.model.load import starter_path
from metier.records import Example
from metier.text.tokenizer import Tokenizer


def rows(count: int, words: int, answer: str = "a label") -> list[Example]:
    return [
        Example(
            id=str(i),
            messages=(
                {"role": "user", "content": f"number {i} " + "word " * words},
                {"role": "assistant", "content": answer},
            ),
        )
        for i in range(count)
    ]


def texts(data_dir: Path) -> Iterator[list[str]]:
    with (data_dir / "banking77" / "train.csv").open(encoding="utf-8") as file:
        yield [row["text"] for row in csv.DictReader(file)][:500]
    for name, field in (
        ("sroie/receipts.jsonl", "text"),
        ("gsm8k/train.jsonl", "answer"),
        ("dolly_part/dolly_flan_t5_xl.jsonl", "text"),
    ):
        lines = (data_dir / name).read_text("utf-8").splitlines()[:300]
        yield [json.loads(line)[field] for line in lines]


def test_tokens_are_those_of_the_starter_within_a_quarter(data_dir: Path) -> None:
    encode = Tokenizer.load(starter_path()).encode
    for sample in texts(data_dir):
        true = sum(len(encode(text)) for text in sample)
        assert 0.95 * true < sum(map(limits.tokens, sample)) < 1.25 * true


def test_what_fits_is_not_capped() -> None:
    sizes = limits.part_sizes(1000, {"test": 0.2, "validation": 0.1}, {})
    assert sizes == {"train": 700, "validation": 100, "test": 200}
    assert limits.caps("expansion", rows(1000, 20), sizes) == {}


@pytest.mark.parametrize("words", [20, 200, 1000])
def test_what_is_left_fits(words: int) -> None:
    examples = rows(300, words)
    sizes = {"train": 40_000, "validation": 6_000, "test": 12_000}
    caps = limits.caps("expansion", examples, sizes)
    assert limits.caps("expansion", examples, {k: caps[f"max_{k}"] for k in sizes}) == {}
    assert caps["max_test"] >= 200


def test_official_parts_keep_their_sizes() -> None:
    split = {"test": 0.2, "validation": 0.1}
    assert limits.part_sizes(1000, split, {"test": 3000}) == {
        "train": 900, "validation": 100, "test": 3000,
    }  # fmt: skip


def test_every_label_has_room() -> None:
    examples = [
        Example(
            id=str(i),
            messages=(*row.messages[:-1], {"role": "assistant", "content": f"label {i % 700}"}),
        )
        for i, row in enumerate(rows(1400, 30))
    ]
    sizes = {"train": 21_000, "validation": 3_000, "test": 6_000}
    caps = limits.caps("classification", examples, sizes)
    assert caps["max_validation"] >= 700
    assert caps["max_test"] >= 1400
