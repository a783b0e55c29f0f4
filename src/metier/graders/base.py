"""What every grader is: a strict spec that can grade, and what it is built with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pydantic import field_validator

from metier.config import Config
from metier.graders.template import MissingField, check, fill
from metier.records import Example, Score


class Grader(Protocol):
    """From an output and the example it answers to a Score between 0 and 1."""

    @property
    def name(self) -> str:
        """How reports call it."""
        ...

    @property
    def binary(self) -> bool:
        """Whether every score is 0 or 1."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """Everything its scores depend on, JSON-like: hash it into the names of stages."""
        ...

    def grade(self, output: str, example: Example) -> Score:
        """Score one output."""
        ...


@dataclass(frozen=True, slots=True)
class Context:
    """What a spec is built with.

    Attributes:
        place: where the spec stands, for error messages.
        answers: expected outputs, which a grader may refuse before any model is loaded.
        base_dir: folder that paths in the spec are relative to.
        load: builds a spec inside a spec: (spec, place).

    """

    place: str
    answers: Sequence[str]
    base_dir: Path
    load: Callable[[Mapping[str, Any], str], Grader]


class GraderSpec(Config):
    """Base of all specs. Most grade by themselves; `build` returns what does."""

    type: str
    """Which grader it is."""
    name: str
    """How reports call it; each grader has a default."""

    binary: ClassVar[bool] = False

    @property
    def identity(self) -> dict[str, Any]:
        """Everything its scores depend on."""
        return self.model_dump(mode="json")

    def build(self, context: Context) -> Grader:  # noqa: ARG002
        """Check the spec against its surroundings and load what it needs.

        Raises:
            ConfigError: something it names cannot be used here.
            DataError: an expected output cannot be graded this way.

        """
        return self

    def grade(self, output: str, example: Example) -> Score:
        """Score one output; specs whose `build` returns another object need none."""
        raise NotImplementedError


class Comparison(GraderSpec):
    """A spec of the OpenAI schema that compares two texts filled from templates."""

    input: str = "{{sample.output_text}}"
    """What is graded; may hold {{item.*}} and {{sample.*}}."""
    reference: str = "{{item.answer}}"
    """What it is compared with; may hold {{item.*}} and {{sample.*}}."""

    @field_validator("input", "reference")
    @classmethod
    def _known_variables(cls, template: str) -> str:
        check(template)
        return template

    def grade(self, output: str, example: Example) -> Score:
        """Fill both templates and compare."""
        try:
            given = fill(self.input, output, example)
            expected = fill(self.reference, output, example)
        except MissingField as missing:
            return Score(0.0, output, f"the output has no field {missing}")
        return self.compare(given, expected)

    def compare(self, given: str, expected: str) -> Score:
        """Score the filled texts."""
        raise NotImplementedError
