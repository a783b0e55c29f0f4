"""JSON in answers: reading it in a model's output, and asking for it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from metier.text.spans import as_entities

_FENCE = re.compile(r"```[a-zA-Z]*[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)
_MOST_KEYS = 20


class NotJson(Exception):  # noqa: N818 - caught by graders, never shown as an error
    """The text is not JSON; the message says where and why."""


def parse(text: str) -> Any:
    """The JSON value that the whole text is, one Markdown code fence around it allowed.

    Raises:
        NotJson: it is not JSON (RFC 8259: no NaN, nothing after the value).

    """
    text = text.strip()
    fenced = _FENCE.fullmatch(text)
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise NotJson(f"{error.msg} at character {error.pos}") from None
    except RecursionError:
        raise NotJson("it is nested too deeply") from None
    except ValueError as error:
        raise NotJson(str(error)) from None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def ask_for_keys(answers: Sequence[str]) -> str:
    """An instruction that names the keys of the answers, in order of appearance.

    Empty unless all answers are JSON objects, with 1 to 20 different keys among them.
    """
    values = []
    for answer in answers:
        try:
            values.append(parse(answer))
        except NotJson:
            return ""
        if not isinstance(values[-1], dict):
            return ""
    keys = dict.fromkeys(key for value in values for key in value)
    if not 0 < len(keys) <= _MOST_KEYS:
        return ""
    names = ", ".join(keys)
    spans = all(as_entities(value) is not None for value in values)
    if spans and any(len(value) < len(keys) for value in values):
        return (
            "Answer with a JSON object that lists, word for word, what the text names of these: "
            f"{names}. Leave out those it does not name; write {{}} where it names none."
        )
    return f"Answer with a JSON object that has these keys: {names}."
