"""Asking for JSON as it stands in the answers of a task."""

from __future__ import annotations

from collections.abc import Sequence

from metier.graders.json_text import NotJson, parse
from metier.text.spans import as_entities

_MOST_KEYS = 20


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
