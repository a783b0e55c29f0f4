"""OpenAI's `score_model`: a language model reads the answer and gives a number."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from metier.config import Config
from metier.errors import ConfigError, RemoteError
from metier.graders.base import Context, Grader, GraderSpec
from metier.graders.json_text import NotJson, parse
from metier.graders.template import MissingField, check, fill
from metier.graders.wording import quote, row
from metier.records import Example, Generator, Message, Score

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)")


class JudgeText(Config):
    """A block of text in a message."""

    type: Literal["input_text", "output_text"]
    """Kind of block."""
    text: str
    """The text; may hold {{item.*}} and {{sample.*}}."""


class JudgeMessage(Config):
    """A message to the judge."""

    type: Literal["message"] = "message"
    """Always `message`."""
    role: Literal["user", "assistant", "system", "developer"]
    """Who speaks."""
    content: str | JudgeText | tuple[JudgeText, ...]
    """The text; may hold {{item.*}} and {{sample.*}}."""

    @property
    def text(self) -> str:
        """The text of all blocks."""
        if isinstance(self.content, str):
            return self.content
        blocks = self.content if isinstance(self.content, tuple) else (self.content,)
        return "".join(block.text for block in blocks)


class ScoreModel(GraderSpec):
    """A model's judgement, scaled from its range to 0..1.

    The judge must answer with the number alone or with JSON ``{"result": number}``; say so in its
    prompt.
    """

    type: Literal["score_model"] = "score_model"
    """Always `score_model`."""
    name: str = "score_model"
    """How reports call it."""
    model: str
    """Name of the judge."""
    input: Annotated[tuple[JudgeMessage, ...], Field(min_length=1)]
    """Messages to the judge."""
    range: tuple[float, float] = (0.0, 1.0)
    """Worst and best number."""
    sampling_params: dict[str, Any] = {}
    """OpenAI sampling parameters of the judge."""

    @field_validator("input")
    @classmethod
    def _known_variables(cls, messages: tuple[JudgeMessage, ...]) -> tuple[JudgeMessage, ...]:
        for message in messages:
            check(message.text)
        return messages

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if not self.range[0] < self.range[1]:
            raise ValueError("range is [worst, best] with worst below best")
        return self

    def build(self, context: Context) -> Grader:
        """Get the judge."""
        if context.judges is None:
            raise ConfigError(
                context.place,
                f"the model '{self.model}' should judge, but no judge can be reached from here",
                "choose another grader",
            )
        return _Judge(self, context.judges(self.model, self.sampling_params))


class _Judge:
    """A model that grades."""

    binary = False

    def __init__(self, spec: ScoreModel, generator: Generator) -> None:
        self.name = spec.name
        self.identity = spec.identity
        self._spec = spec
        self._generator = generator

    def grade(self, output: str, example: Example) -> Score:
        """Ask the judge.

        Raises:
            RemoteError: it gave no number, or one outside its range.

        """
        try:
            chat: list[Message] = [
                {"role": message.role, "content": fill(message.text, output, example)}
                for message in self._spec.input
            ]
        except MissingField as missing:
            return Score(0.0, output, f"the output has no field {missing}")
        answer = self._generator.generate([chat])[0].text
        number = _number(answer)
        worst, best = self._spec.range
        if number is None or not worst <= number <= best:
            raise RemoteError(
                f"judge {self._spec.model}, {row(example)}",
                f"answered {quote(answer)}, which is no number from {worst:g} to {best:g}",
                "tell the judge in its prompt to answer with the number alone",
            )
        value = (number - worst) / (best - worst)
        explanation = f"{self._spec.model} gave {number:g} of {worst:g} to {best:g}"
        return Score(value, output, explanation)


def _number(answer: str) -> float | None:
    """The number that the whole answer is, or its JSON field `result`."""
    if _NUMBER.fullmatch(answer.strip()):
        return float(answer)
    try:
        result = parse(answer)["result"]
        return float(result) if _NUMBER.fullmatch(json.dumps(result)) else None
    except (NotJson, LookupError, TypeError):
        return None
