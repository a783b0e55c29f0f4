"""How much of the data a default run can use within the default budget.

A rough sum for the starter on two cores, from characters alone; `metier plan` measures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from metier.graders.labels import labels_of
from metier.records import Example
from metier.task import Kind, Retrieval, Task, Training

HELD = ("validation", "test")
BUDGET: float = Task.model_fields["budget"].default
"""Minutes."""
CONTEXT = 1024
"""Tokens that the starter reads at most."""
_SAMPLED = 5000
# Pieces of words, and every other sign.
_PIECE = re.compile(r"[^\W\d_A-Z]{1,5}|[A-Z]|\d|[^\w\s]|_|\n")
# Tokens per second.
_TRAINED, _READ, _WRITTEN = 4500, 10_000, 1500
# Share of the budget that is planned for: other machines are slower, and forgetting is measured.
_PLANNED = 0.75


def tokens(text: str) -> int:
    """What the starter's tokenizer makes of a text, about."""
    return len(_PIECE.findall(text))


def part_sizes(rows: int, split: Mapping[str, float], held: Mapping[str, int]) -> dict[str, int]:
    """Rows of each part, before near-duplicates are left out."""
    found = {part: held[part] if part in held else round(rows * split[part]) for part in HELD}
    taken = sum(found[part] for part in HELD if part not in held)
    return {"train": rows - taken, **found}


def caps(kind: Kind, examples: Sequence[Example], sizes: Mapping[str, int]) -> dict[str, int]:
    """Limits under which a default run keeps within the budget; none where it does without."""
    seconds = _PLANNED * 60 * BUDGET
    training, answering = _seconds_per_row(kind, examples)
    held = sizes["validation"] + sizes["test"]
    if sizes["train"] * training + held * answering <= seconds:
        return {}
    labels = len({label for row in examples for label in labels_of(row.answer, kind)})
    # Half the time at most is for answers, two thirds of them to the test part.
    test = _round(max(2 * labels, 200, min(1000, seconds / 2 / answering / 1.5)))
    found = {"max_validation": max(labels, test // 2), "max_test": test}
    kept = {part: min(sizes[part], found[f"max_{part}"]) for part in HELD}
    left = seconds - sum(kept.values()) * answering
    found["max_train"] = _round(max(5 * labels, 300, left / training))
    parts = ("train", *HELD)
    return {f"max_{p}": found[f"max_{p}"] for p in parts if found[f"max_{p}"] < sizes[p]}


def _round(number: float) -> int:
    """Down to two digits, as people write limits."""
    unit: int = 10 ** max(0, len(str(int(number))) - 2)
    return int(number) // unit * unit


def _seconds_per_row(kind: Kind, examples: Sequence[Example]) -> tuple[float, float]:
    """Of the default arms: training on a row, and answering one."""
    defaults = Training()
    seeds, shots = len(defaults.seeds), Retrieval().shots
    rows = sample(examples)
    asked = sum(tokens(row.input) for row in rows) / len(rows)
    answers = [tokens(row.answer) for row in rows]
    answer = sum(answers) / len(rows)
    labels = {label for row in examples for label in labels_of(row.answer, kind)}
    named = sum(map(tokens, labels))
    # prompt; few-shot and rag; the tuned arm with every seed.
    shown = min(CONTEXT, named + shots * (asked + answer) + asked)
    read = named + asked + 2 * shown + seeds * asked
    written = 3 * min(CONTEXT, 1.25 * max(answers)) + seeds * answer
    training = seeds * defaults.epochs * (asked + answer) / _TRAINED
    return training, read / _READ + written / _WRITTEN


def sample(examples: Sequence[Example]) -> Sequence[Example]:
    """At most `_SAMPLED` rows, from the whole file."""
    return examples[:: math.ceil(len(examples) / _SAMPLED)]
