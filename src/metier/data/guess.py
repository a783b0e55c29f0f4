"""Which columns of a file nobody has described are its input, output, id and group."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    "reference", "ref",
)  # fmt: skip
TAGGED = (".conll", ".conllu", ".bio", ".iob")
_TAG = re.compile(r"O|[BIESLU]-\S+")


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
    labels = [name for name in few if _distinct(rows, name) >= 2]
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
        if all(map(_TAG.fullmatch, values)) and "O" in values and len(values) > 1:
            raise tagged_error(path)
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


def tagged_error(path: Path) -> DataError:
    """The error for a file in CoNLL's form."""
    return DataError(
        str(path),
        "holds one token and its tag a line (CoNLL); metier reads one example a row",
        'join each sentence to a row such as {"text": "...", "entities": [{"type": "...", '
        '"text": "..."}]} in a .jsonl file',
    )


def refuse_empty(rows: Sequence[Row], layout: Layout) -> None:
    """Name all rows without an output at once, so that the file is mended once."""
    if not layout.output:
        return
    empty = [row for row in rows if str(row.values.get(layout.output) or "").strip() == ""]
    empty = [row for row in empty if row.values.get(layout.output) != 0]
    if empty:
        lines = ", ".join(row.place.rpartition(":")[2] for row in empty[:10])
        more = ", ..." if len(empty) > 10 else ""
        raise DataError(
            empty[0].place,
            f"column '{layout.output}': the output is empty in {len(empty):,} of {len(rows):,} "
            f"rows (lines {lines}{more})",
            "fill it or drop these rows; remove the column if it is not the output",
        )


def pair_of(layout: Layout) -> Columns:
    """Input and output, where these two columns say everything."""
    if not layout.output or layout.context or layout.format == "alpaca":
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
