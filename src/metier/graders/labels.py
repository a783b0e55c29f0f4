"""The labels that an answer names: one, or where a row may have several, a JSON list of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from metier.graders.json_text import NotJson, parse
from metier.graders.wording import normalise
from metier.task import Kind

_SEPARATORS = re.compile(r"[,;|]")


def labels_of(answer: str, kind: Kind) -> tuple[str, ...]:
    """The labels of an expected output; none for kinds without labels.

    Raises:
        NotJson: it is a list of something else than labels.

    """
    if kind == "multi-label":
        return read_labels(answer)
    return (answer,) if kind == "classification" else ()


def read_labels(text: str) -> tuple[str, ...]:
    """The labels that a text lists, sorted and each once: a JSON list, or text with commas.

    A semicolon or a vertical bar may stand in place of a comma.

    Raises:
        NotJson: it is JSON, but no list of texts or numbers.

    """
    try:
        items = parse(text)
    except NotJson:
        items = _SEPARATORS.split(text)
    if isinstance(items, int | float):  # the one label `3` of a column with ids of labels
        items = [text]
    if not isinstance(items, list):
        raise NotJson("it is no list of labels")
    found = {normalise(_label(item)) for item in items}
    return tuple(sorted(found - {""}))


def _label(item: Any) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, bool | int | float):
        return json.dumps(item)
    raise NotJson("it lists something else than texts and numbers")


def write_labels(labels: Iterable[str]) -> str:
    """The one form of an answer with these labels."""
    return json.dumps(sorted(set(labels)), ensure_ascii=False, separators=(",", ":"))
