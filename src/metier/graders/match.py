"""Graders that answer yes or no: exact match, OpenAI's string check, a regular expression."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import field_validator

from metier.graders.base import Comparison, GraderSpec
from metier.graders.wording import normalise, quote
from metier.records import Example, Score


class Exact(GraderSpec):
    """The answer equals the expected one, up to white space (and case, where asked)."""

    type: Literal["exact"] = "exact"
    """Always `exact`."""
    name: str = "exact"
    """How reports call it."""
    ignore_case: bool = False
    """Whether `Card` equals `card`."""

    binary: ClassVar[bool] = True

    def grade(self, output: str, example: Example) -> Score:
        """1 when equal, else 0."""
        equal = normalise(output, self.ignore_case) == normalise(example.answer, self.ignore_case)
        return _compared(equal, normalise(output), example.answer)


class StringCheck(Comparison):
    """OpenAI's `string_check`: eq and ne compare whole texts, like and ilike look for a part."""

    type: Literal["string_check"] = "string_check"
    """Always `string_check`."""
    name: str = "string_check"
    """How reports call it."""
    operation: Literal["eq", "ne", "like", "ilike"]
    """eq: equal. ne: different. like: contains the reference. ilike: contains it in any case."""

    binary: ClassVar[bool] = True

    def compare(self, given: str, expected: str) -> Score:
        """1 when the operation holds, else 0."""
        if self.operation == "eq":
            return _compared(given == expected, given, expected)
        if self.operation == "ne":
            same = _compared(given == expected, given, expected)
            return Score(1 - same.value, given, same.explanation)
        if self.operation == "ilike":
            inside = expected.casefold() in given.casefold()
        else:
            inside = expected in given
        fact = "contains" if inside else "does not contain"
        return Score(float(inside), given, f"{quote(given)} {fact} {quote(expected)}")


class Regex(GraderSpec):
    """The pattern is found in the output.

    With a group in the pattern, what the group finds in the output must equal what it finds in the
    expected answer (or that whole answer, where the pattern is not found in it): the pattern
    ``#### (.+)`` compares final results and leaves the reasoning free.
    """

    type: Literal["regex"] = "regex"
    """Always `regex`."""
    name: str = "regex"
    """How reports call it."""
    pattern: str
    """Python regular expression, searched anywhere in the text: anchor it with ^ and $."""

    binary: ClassVar[bool] = True

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        return pattern

    def grade(self, output: str, example: Example) -> Score:
        """1 when found (and its group equal), else 0."""
        found = re.search(self.pattern, output)
        if found is None:
            return Score(0.0, output, f"the pattern {quote(self.pattern)} is not found")
        if found.re.groups == 0:
            return Score(1.0, found[0], f"the pattern {quote(self.pattern)} is found")
        wanted = re.search(self.pattern, example.answer)
        expected = normalise((wanted[1] or "") if wanted else example.answer)
        answer = normalise(found[1] or "")
        return _compared(answer == expected, answer, expected)


def _compared(equal: bool, answer: str, expected: str) -> Score:
    fact = "equals" if equal else "is not"
    return Score(float(equal), answer, f"{quote(answer)} {fact} {quote(expected)}")
