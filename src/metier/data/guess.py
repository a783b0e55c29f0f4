"""Which columns of a file nobody has described are its input, output, id and group."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metier.data.conll import TAG
from metier.data.files import Row
from metier.data.formats import Layout, find_layout
from metier.errors import DataError
from metier.task import Columns

_NONE = Columns()
_GROUP_NAMES = ("group", "customer", "customer_id", "user", "user_id", "document", "document_id")
# Columns whose names say what they are, where no known format has them all.
_ASKING_NAMES = ("instruction", "question", "prompt")
_INPUT_NAMES = (
    "query", "input", "request", "source", "message", "review", "comment", "body", "content",
    "document", "description", "text", "sentence", "utterance", "mr",
)  # fmt: skip
_OUTPUT_NAMES = (
    "answer", "response", "completion", "output", "target", "expected", "label", "category",
    "class", "intent", "sentiment", "topic", "summary", "translation", "reply", "entities",
    "reference", "ref", "stars", "rating", "polarity", "emotion", "priority", "department",
    "tag", "grade", "score",
)  # fmt: skip


def guess_layout(path: Path, rows: Sequence[Row]) -> tuple[Layout, bool]:
    """The layout, and whether a known format says it rather than a guess.

    Raises:
        DataError: no input and output can be told, or the file is no table of examples.

    """
    try:
        return find_layout(rows[0], "auto", _NONE), True
    except DataError:
        _refuse_other_tables(path, rows)
    texts = [name for name in rows[0].values if _usable(name, rows)]
    lists = [name for name in rows[0].values if _usable(name, rows, json_values=True)]
    if not texts or len(texts) + len(lists) < 2:
        raise DataError(
            rows[0].place,
            f"no known format has the columns {', '.join(rows[0].values)}, and no column for the "
            "input and one for the expected output can be told among them",
            'write one example a row with both, e.g. {"text": ..., "label": ...}; the expected '
            "output may be text or JSON, and no cell empty",
        )
    return Layout("prompt-completion", *_guess(texts, lists, rows)), False


def _guess(texts: Sequence[str], lists: Sequence[str], rows: Sequence[Row]) -> tuple[str, str]:
    """Input and output column, by their names where these say it, else by their values."""
    outputs = [*texts, *lists]
    values = {name: _values(name, rows) for name in outputs}
    length = {name: sum(len(str(v)) for v in values[name]) / len(values[name]) for name in outputs}
    few = [name for name in outputs if _distinct(rows, name) <= len(rows) / 5]
    labels = _labels(few, rows)
    named = _named(_OUTPUT_NAMES, outputs if len(texts) > 1 else lists)
    output = next((name for name in named if name in labels), named[0] if named else "")
    rest = [name for name in texts if name != output]
    asking, telling = _named(_ASKING_NAMES, rest), _named(_INPUT_NAMES, rest)
    if not (named or asking or telling) and len(outputs) == 2 and len(labels) != 1:
        return outputs[0], outputs[1]
    free = max(rest, key=lambda name: (name not in few, length[name]))
    source = asking[0] if asking else max(telling, key=length.__getitem__, default=free)
    if source in few and length[free] > length[source]:
        source = free
    others = [name for name in outputs if name != source]
    # The last of several with equally few values: labels usually stand at the end.
    fewest = min(
        (name for name in reversed(others) if name in labels),
        key=lambda name: _distinct(rows, name),
        default=max(others, key=length.__getitem__),
    )
    return source, output or fewest


def runner_up(rows: Sequence[Row], layout: Layout) -> str:
    """The column that may be the output instead of the one guessed, or nothing."""
    free = [name for name in rows[0].values if name not in layout.columns and _usable(name, rows)]
    named, labels = _named(_OUTPUT_NAMES, free), _labels(free, rows)
    labels.sort(key=lambda name: (name not in named, _distinct(rows, name)))
    return next(iter([*labels, *named]), "")


def longer_than_input(rows: Sequence[Row], layout: Layout) -> list[str]:
    """Columns that are not used though they hold more text than the input, as a context does."""
    if not layout.output:
        return []
    free = [name for name in rows[0].values if name not in layout.columns and _usable(name, rows)]
    used = sum(_words(name, rows) for name in layout.inputs)
    return [name for name in free if _words(name, rows) > used]


def _words(column: str, rows: Sequence[Row]) -> int:
    return sum(len(str(value).split()) for value in _values(column, rows))


def filled(rows: Sequence[Row]) -> list[str]:
    """The columns that are not empty in every row."""
    return [name for name in rows[0].values if _values(name, rows)]


def _labels(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """The columns with few different values, but not one alone."""
    return [name for name in names if 2 <= _distinct(rows, name) <= len(rows) / 5]


def _named(wanted: Sequence[str], names: Sequence[str]) -> list[str]:
    """The wanted names that are there, the first wanted first, whatever their case."""
    lower = {name.lower(): name for name in names}
    return [lower[name] for name in wanted if name in lower]


def _usable(name: str, rows: Sequence[Row], json_values: bool = False) -> bool:
    """Whether a column is no id and has plain values, or JSON, in half of the rows at least."""
    values = _values(name, rows)
    fits = all(isinstance(v, (list, dict)) == json_values for v in values)
    return len(values) >= len(rows) / 2 and fits and name.lower() != "id"


def _refuse_other_tables(path: Path, rows: Sequence[Row]) -> None:
    """Refuse a table with one token a line, or without names of columns."""
    columns = {name: Counter(str(row.values.get(name)) for row in rows) for name in rows[0].values}
    for values in columns.values():
        if all(map(TAG.fullmatch, values)) and "O" in values and len(values) > 1:
            raise DataError(
                str(path),
                "holds one token and its tag a row, and nothing says where a sentence ends",
                "save it in CoNLL's form (.conll): a token, a tab and its tag in each line, and a "
                "blank line between sentences",
            )
    sentences = all(len(name) > 60 for name in columns)
    for name, values in columns.items():
        repeated = bool(name) and values[name] > 1
        if _is_table(path) and (repeated or sentences or re.fullmatch(r"[\d.,]+", name)):
            shown = name if len(name) <= 40 else f"{name[:40]}..."
            raise DataError(
                f"{path}:1",
                f"looks like a row, not like names of columns: '{shown}'",
                "put a line with the names first, e.g. text,label (a tab between them in .tsv)",
            )


def _is_table(path: Path) -> bool:
    return bool({".csv", ".tsv"} & {suffix.lower() for suffix in path.suffixes})


def refuse_empty(rows: Sequence[Row], layout: Layout) -> None:
    """Name all rows without an input or output at once, so that the file is mended once."""
    if not layout.output:
        return
    for what, columns in (("input", layout.inputs), ("output", (layout.output,))):
        empty = [row for row in rows if all(_blank(row.values.get(name)) for name in columns)]
        if not empty:
            continue
        lines = ", ".join(row.place.rpartition(":")[2] for row in empty[:10])
        more = ", ..." if len(empty) > 10 else ""
        raise DataError(
            empty[0].place,
            f"column '{columns[0]}': the {what} is empty in {len(empty):,} of {len(rows):,} "
            f"rows (lines {lines}{more})",
            f"fill it or drop these rows; remove the column if it is not the {what}",
        )


def _blank(value: Any) -> bool:
    return value != 0 and not str(value or "").strip()


def pair_of(layout: Layout) -> Columns:
    """Input and output, where these two columns say everything."""
    if not layout.output or layout.context or layout.format in ("alpaca", "tags"):
        return _NONE
    return Columns(input=layout.input, output=layout.output)


def id_and_group(tables: Sequence[Sequence[Row]], layout: Layout) -> dict[str, str]:
    """Columns that every part has, filled in every row."""
    rows = tables[0]
    free = {name.lower(): name for name in rows[0].values if name not in layout.columns}
    filled = {
        lower: name
        for lower, name in free.items()
        if all(len(_values(name, table)) == len(table) for table in tables)
    }
    found = {}
    if "id" in filled and all(_distinct(t, filled["id"]) == len(t) for t in tables):
        found["id"] = filled["id"]
    group = next((filled[name] for name in _GROUP_NAMES if name in filled), None)
    if group and _usable(group, rows) and 10 <= _distinct(rows, group) < len(rows):
        found["group"] = group
    return found


def _distinct(rows: Sequence[Row], column: str) -> int:
    return len({str(value).strip() for value in _values(column, rows)})


def _values(column: str, rows: Sequence[Row]) -> list[Any]:
    """The values of a column that are not empty."""
    values = (row.values.get(column) for row in rows)
    return [v for v in values if v not in (None, [], {}) and str(v).strip()]
