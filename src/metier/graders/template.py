"""The ``{{item.*}}`` and ``{{sample.*}}`` variables of the OpenAI grader schema.

Plain substitution in one pass: what is put in is never read as a template again, and there are no
expressions, filters or loops.

==========================  =====================================================
``{{item.input}}``          text of the last user message
``{{item.answer}}``         the expected output
``{{item.answer_json.a}}``  field of the expected output, read as JSON
``{{item.messages[0].content}}``, ``item.id``, ``item.group``, ``item.source``, ``item.time``
``{{sample.output_text}}``  the output that is graded
``{{sample.output_json.a}}``  field of the output, read as JSON
==========================  =====================================================
"""

from __future__ import annotations

import json
import re
from typing import Any

from metier.errors import DataError
from metier.graders.json_text import NotJson, parse
from metier.records import Example

_VARIABLE = re.compile(r"\{\{\s*([^{}]*?)\s*\}\}")
_STEP = re.compile(r"[^.\[\]]+")
_ITEM = ("answer", "answer_json", "group", "id", "input", "messages", "source", "time")
_SAMPLE = ("output_json", "output_text")


class MissingField(Exception):  # noqa: N818 - caught by graders, never shown as an error
    """The output, read as JSON, lacks a field that a template asks for."""


def check(template: str) -> None:
    """Refuse unknown variables.

    Raises:
        ValueError: names the variable and those there are.

    """
    known = [f"item.{name}" for name in _ITEM] + [f"sample.{name}" for name in _SAMPLE]
    for variable in _VARIABLE.findall(template):
        if ".".join(_STEP.findall(variable)[:2]) not in known:
            raise ValueError(f"'{{{{{variable}}}}}' is no variable; known: {', '.join(known)}")


def fill(template: str, output: str, example: Example) -> str:
    """Put the values of one output and its example into a template that `check` has passed.

    Raises:
        MissingField: the output is not JSON, or lacks the field.
        DataError: the same of the example.

    """
    return _VARIABLE.sub(lambda found: _text(_value(found[1], output, example)), template)


def _value(variable: str, output: str, example: Example) -> Any:
    space, name, *path = _STEP.findall(variable)
    try:
        if space == "sample":
            return _walk(parse(output) if name == "output_json" else output, path)
        if name == "answer_json":
            return _walk(parse(example.answer), path)
        return _walk(getattr(example, name), path)
    except (NotJson, LookupError, TypeError, ValueError):
        if space == "sample":
            raise MissingField(".".join(path) or "(it is not JSON)") from None
        raise DataError(
            example.place,
            f"has no value for {{{{{variable}}}}}, which the grader asks for",
            "mend the row, or the template in the grader",
        ) from None


def _walk(value: Any, path: list[str]) -> Any:
    for step in path:
        value = value[int(step)] if isinstance(value, list | tuple) else value[step]
    return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
