"""One way to make an example in every grader test."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from metier.records import Example


@pytest.fixture(scope="session")
def example() -> Callable[..., Example]:
    def make(answer: str, question: str = "question", name: str = "a1") -> Example:
        messages = (
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        )
        return Example(name, messages, group="g", source="data.jsonl:7")  # type: ignore[arg-type]

    return make
