"""Graders of JSON: which of the expected fields are right."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from metier.errors import DataError
from metier.graders.base import Context, Grader, GraderSpec
from metier.graders.json_text import NotJson, parse
from metier.graders.wording import normalise, quote
from metier.records import Example, Score

Field = tuple[tuple[str, ...], str]
"""Path and canonical value."""

_SHOWN = 3


class JsonFields(GraderSpec):
    """F1 over the fields of a JSON answer.

    A *field* is a path with its value, such as ``address.city = "Leeds"``:

    - objects are walked, so every inner key is a field; the order of keys does not matter;
    - a list is a collection: each item is a field of its own, compared as a whole, and the order
      of items does not matter (a list of objects is a multiset). A list of nothing but numbers
      (a point, a series) is one value, in order;
    - text is compared without regard to runs of white space; numbers by value (1 equals 1.0);
      an empty object or list is a value too, and null is not the same as a missing key.

    An output that is not JSON scores 0. Parts: precision, recall, valid_json (1 or 0).
    """

    type: Literal["json_fields"] = "json_fields"
    """Always `json_fields`."""
    name: str = "fields"
    """How reports call it."""
    ignore_case: bool = False
    """Whether `Leeds` equals `LEEDS` in values; keys are always exact."""

    def build(self, context: Context) -> Grader:
        """Refuse expected outputs that are not JSON before any model is loaded."""
        for number, answer in enumerate(context.answers, start=1):
            _expected(answer, f"expected output {number}")
        return self

    def grade(self, output: str, example: Example) -> Score:
        """F1 of the fields of the output."""
        expected = self._fields(_expected(example.answer, example.place))
        try:
            found = self._fields(parse(output))
        except (NotJson, RecursionError) as problem:
            parts = {"precision": 0.0, "recall": 0.0, "valid_json": 0.0}
            return Score(0.0, output, f"the output is not JSON: {problem}", parts)
        shared = (found & expected).total()
        parts = {
            "precision": shared / found.total(),
            "recall": shared / expected.total(),
            "valid_json": 1.0,
        }
        value = 2 * shared / (found.total() + expected.total())
        return Score(value, output.strip(), _explain(expected, found), parts)

    def _fields(self, value: Any) -> Counter[Field]:
        return Counter(_walk(value, (), self.ignore_case))


def _walk(value: Any, path: tuple[str, ...], ignore_case: bool) -> Iterator[Field]:
    """Every field of a value; at least one for any value."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _walk(inner, (*path, key), ignore_case)
    elif isinstance(value, list) and value and not _is_series(value):
        for item in value:
            yield (*path, "[]"), _canonical(item, ignore_case)
    else:
        yield path, _canonical(value, ignore_case)


def _is_series(items: Sequence[Any]) -> bool:
    """Whether a list holds nothing but numbers, or lists of them: then its order has meaning."""
    return all(
        _is_series(item)
        if isinstance(item, list)
        else isinstance(item, int | float) and not isinstance(item, bool)
        for item in items
    )


def _canonical(value: Any, ignore_case: bool) -> str:
    """One text for all JSON values that count as equal."""
    if isinstance(value, dict):
        items = sorted(f"{json.dumps(k)}:{_canonical(v, ignore_case)}" for k, v in value.items())
        return "{" + ",".join(items) + "}"
    if isinstance(value, list):
        inner = [_canonical(item, ignore_case) for item in value]
        return "[" + ",".join(inner if _is_series(value) else sorted(inner)) + "]"
    if isinstance(value, str):
        value = normalise(value, ignore_case)
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=False)


def _expected(answer: str, place: str) -> Any:
    try:
        return parse(answer)
    except NotJson as problem:
        raise DataError(
            place,
            f"the expected output {quote(answer)} is not JSON: {problem}",
            "mend it, or choose another grader than 'fields'",
        ) from None


def _explain(expected: Counter[Field], found: Counter[Field]) -> str:
    right = (found & expected).total()
    missing, extra = list((expected - found).elements()), list((found - expected).elements())
    text = f"{right} of {expected.total()} expected fields right"
    for word, fields in (("not found", missing), ("not expected", extra)):
        if fields:
            shown = ", ".join(quote(f"{'.'.join(p)} = {value}") for p, value in fields[:_SHOWN])
            more = f" and {len(fields) - _SHOWN} more" if len(fields) > _SHOWN else ""
            text += f"; {word}: {shown}{more}"
    return text
