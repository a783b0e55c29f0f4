"""From a short name or an OpenAI-style spec to a grader."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metier.errors import ConfigError
from metier.graders.base import Context, Grader, GraderSpec
from metier.graders.fields import JsonFields
from metier.graders.json_text import NotJson, parse
from metier.graders.match import Exact, Regex, StringCheck
from metier.graders.multi import Multi
from metier.graders.python import PythonGrader
from metier.graders.similarity import TextSimilarity
from metier.graders.wording import case_is_meaningless
from metier.task import Kind

# A new grader is one file, and one name here.
_SPECS: tuple[type[GraderSpec], ...] = (
    Exact,
    Regex,
    JsonFields,
    PythonGrader,
    StringCheck,
    TextSimilarity,
    Multi,
)
_TYPES = {spec.model_fields["type"].default: spec for spec in _SPECS}
_SHORT = ("exact", "fields", "token_f1", "rouge_l", "chrf")
_FORMS = f"auto, {', '.join(_SHORT)}, regex:PATTERN, python:FILE.py:FUNCTION"


def load_grader(
    spec: str | Mapping[str, Any],
    kind: Kind,
    answers: Sequence[str],
    base_dir: Path,
) -> Grader:
    """Build the grader that a task names.

    Short names: exact, fields, token_f1, rouge_l, chrf, ``regex:PATTERN``,
    ``python:FILE.py:FUNCTION``, and auto, which is

    - exact for classification;
    - fields where every expected output is a JSON object or list, as for multi-label;
    - token_f1 for other extraction: short spans, in which every word counts and order does not;
    - rouge_l for other expansion: running text, in which order counts.

    Args:
        spec: a short name, or a grader of the OpenAI schema (or ours) as a mapping.
        kind: kind of the task.
        answers: expected outputs of the task; a grader may refuse them.
        base_dir: folder of task.yaml.

    Raises:
        ConfigError: the spec is unknown or wrong.
        DataError: an expected output cannot be graded so.

    """
    values = _expand(spec, kind, answers) if isinstance(spec, str) else spec

    def load(values: Mapping[str, Any], place: str) -> Grader:
        context = Context(place, answers, base_dir, load)
        return _spec_type(values, place).parse(values, place).build(context)

    return load(values, "grader")


def _expand(name: str, kind: Kind, answers: Sequence[str]) -> dict[str, Any]:
    """Spec of a short name."""
    if name == "auto":
        name = _automatic(kind, answers)
    word, _, rest = name.partition(":")
    if word == "regex" and rest:
        return {"type": "regex", "pattern": rest}
    if word == "python" and ":" in rest:
        path, _, function = rest.rpartition(":")
        return {"type": "python", "name": function, "path": path, "function": function}
    if name == "exact":
        ignore_case = kind == "classification" and case_is_meaningless(answers)
        return {"type": "exact", "ignore_case": ignore_case}
    if name == "fields":
        return {"type": "json_fields"}
    if name in _SHORT:
        return {"type": "text_similarity", "name": name, "evaluation_metric": name}
    close = difflib.get_close_matches(name, ("auto", *_SHORT), n=1)
    remedy = f"did you mean '{close[0]}'?" if close else f"there are {_FORMS}"
    raise ConfigError("grader", f"'{name}' is no grader", remedy)


def _automatic(kind: Kind, answers: Sequence[str]) -> str:
    if kind == "classification":
        return "exact"
    if kind == "multi-label":
        return "fields"
    if answers and all(map(_is_json, answers)):
        return "fields"
    return "token_f1" if kind == "extraction" else "rouge_l"


def _is_json(answer: str) -> bool:
    try:
        return isinstance(parse(answer), dict | list)
    except NotJson:
        return False


def _spec_type(values: Mapping[str, Any], place: str) -> type[GraderSpec]:
    name = values.get("type")
    if not isinstance(name, str) or name not in _TYPES:
        close = difflib.get_close_matches(str(name), list(_TYPES), n=1)
        remedy = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(_TYPES)}"
        cause = "is missing" if name is None else f"'{name}' is no type of grader"
        raise ConfigError(f"{place}: type", cause, remedy)
    return _TYPES[name]
