"""A small task over the real 260 k model, run once and shared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

WORDS = {
    "animal": ("dog", "cat", "bird", "fish", "cow", "horse"),
    "food": ("cake", "bread", "soup", "apple", "milk", "cheese"),
    "place": ("park", "house", "school", "garden", "beach", "store"),
}


def rows() -> Iterator[dict[str, str]]:
    """Sentences that name a thing, with the kind of thing as label."""
    for label, words in WORDS.items():
        for word in words:
            for number, verb in enumerate(("saw", "liked", "found", "wanted", "loved")):
                name = ("Lily", "Tom", "Ben", "Mia", "Sam")[number]
                yield {"text": f"{name} {verb} a big {word} and was happy", "label": label}


QUICK = {"epochs": 2, "seeds": [0, 1], "max_length": 128, "batch_size": 16, "rehearsal": 0}


def write_task(directory: Path, base: Path, **changes: object) -> Path:
    """A classification task of 90 rows."""
    data = directory / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()), "utf-8")
    values: dict[str, object] = {
        "name": "things",
        "kind": "classification",
        "data": {"file": "rows.jsonl"},
        "base": str(base),
        "template": "plain",
        "arms": ["prompt", "classical", "lora", "lora/head"],
        "split": {"near_duplicate": 1.0},
        "training": QUICK,
        "max_new_tokens": 6,
        **changes,
    }
    path = directory / "task.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, stories260k: Path) -> Path:
    """The directory of a task whose run, in ``run``, is finished."""
    from metier import recipes

    directory = tmp_path_factory.mktemp("task")
    task = write_task(directory, stories260k, training={**QUICK, "rehearsal": 1})
    recipes.run(task, directory / "run")
    return directory
