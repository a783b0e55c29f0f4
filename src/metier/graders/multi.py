"""OpenAI's `multi`: several graders, one formula."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from metier.errors import ConfigError
from metier.graders.base import Context, Grader, GraderSpec
from metier.graders.formula import Formula
from metier.records import Example, Score


class Multi(GraderSpec):
    """The value of a formula over the values of other graders, such as ``0.8 * a + 0.2 * b``."""

    type: Literal["multi"] = "multi"
    """Always `multi`."""
    name: str = "multi"
    """How reports call it."""
    graders: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """The graders by the names that the formula uses (or a single grader)."""
    calculate_output: str
    """Formula over those names; + - * / ^, min, max, abs, floor, ceil, exp, sqrt, log."""

    @field_validator("graders", mode="before")
    @classmethod
    def _named(cls, graders: Any) -> Any:
        """Give a single grader, which the schema allows too, its own name."""
        if isinstance(graders, dict) and isinstance(graders.get("type"), str):
            return {str(graders.get("name") or graders["type"]): graders}
        return graders

    def build(self, context: Context) -> Grader:
        """Build the graders and check the formula against their names."""
        graders = {}
        for name, spec in self.graders.items():
            place = f"{context.place}.graders.{name}"
            if spec.get("type") == "multi":
                raise ConfigError(place, "a multi grader stands in another", "use one formula")
            graders[name] = context.load(spec, place)
        try:
            formula = Formula(self.calculate_output, list(graders))
        except ValueError as error:
            place = f"{context.place}.calculate_output"
            raise ConfigError(place, str(error), "change the formula") from None
        return _Combined(self, graders, formula)


class _Combined:
    """Built graders under one formula."""

    binary = False

    def __init__(self, spec: Multi, graders: dict[str, Grader], formula: Formula) -> None:
        self.name = spec.name
        self.identity = spec.identity | {"of": {k: g.identity for k, g in graders.items()}}
        self._graders = graders
        self._formula = formula

    def grade(self, output: str, example: Example) -> Score:
        """Value of the formula; the values of its graders are the parts.

        Raises:
            ConfigError: the formula gives no value from 0 to 1.

        """
        scores = {name: grader.grade(output, example) for name, grader in self._graders.items()}
        parts = {name: score.value for name, score in scores.items()}
        value = self._formula(parts)
        if not 0 <= value <= 1:
            values = ", ".join(f"{name} = {part:g}" for name, part in parts.items())
            raise ConfigError(
                f"grader '{self.name}', {example.place}",
                f"calculate_output gives {value:g} for {values}; a score is from 0 to 1",
                "change the formula",
            )
        explanation = "; ".join(
            f"{name}: {score.value:g} ({score.explanation})" for name, score in scores.items()
        )
        return Score(value, output, explanation, parts)
