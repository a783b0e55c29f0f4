"""Examples from a user's file or from a built-in data set."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from metier.data.files import Row, read_rows
from metier.data.formats import Layout, find_layout, messages_of, missing_column, text_of
from metier.errors import DataError
from metier.graders.json_text import NotJson
from metier.graders.labels import read_labels, write_labels
from metier.records import Example, Message
from metier.runs import fingerprint
from metier.task import Columns, Format, Kind

BUILTIN = "builtin:"
_NO_COLUMNS = Columns()


def read_examples(
    file: str,
    kind: Kind,
    base_dir: Path,
    format: Format = "auto",  # noqa: A002
    columns: Columns = _NO_COLUMNS,
    answers: bool = True,
) -> list[Example]:
    """Read a data file, or ``builtin:NAME``, as examples in the order of the file.

    Args:
        file: path (relative to `base_dir`), or ``builtin:NAME``.
        kind: kind of the task; labels lose the blanks around them, and several labels of a row
            become a JSON list in alphabetical order.
        base_dir: the directory of task.yaml.
        format: how rows are laid out; ``auto`` finds it from the columns.
        columns: names of columns, where the format does not say them.
        answers: whether every row must have an expected output; false reads a file of
            requests, which may lack all columns but the input; missing answers are empty text.

    Raises:
        DataError: the file or a row cannot be used; the message names file, line and column.

    """
    if file.startswith(BUILTIN):
        from metier.data.builtin import read

        return read(file.removeprefix(BUILTIN))
    path = base_dir / file
    layout: Layout | None = None
    shape = ""
    ids = _Ids()
    examples = []
    for row in read_rows(path):
        if layout is None:
            columns = columns if answers else _present(columns, row)
            layout = find_layout(row, format, columns, answers)
        shape = _same_shape(row, layout, shape)
        examples.append(_example(row, layout, columns, kind, answers, ids))
    return examples


def _present(columns: Columns, row: Row) -> Columns:
    """The columns a file of requests has; only its input is a must."""
    named = columns.model_dump(exclude_none=True)
    return Columns(**{k: name for k, name in named.items() if k == "input" or name in row.values})


def _same_shape(row: Row, layout: Layout, shape: str) -> str:
    """Refuse a file whose outputs are text here and JSON there."""
    value = row.values.get(layout.output)
    if value is None:
        return shape
    here = (
        "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else "text"
    )
    if shape and here != shape:
        raise DataError(
            row.place,
            f"column '{layout.output}' is {here}, in the rows before it is {shape}",
            "write all outputs the same way",
        )
    return here


def _example(
    row: Row, layout: Layout, columns: Columns, kind: Kind, answers: bool, ids: _Ids
) -> Example:
    messages = messages_of(row, layout, answers)
    if kind == "classification":
        messages = (*messages[:-1], _label(messages[-1], row, layout))
    if kind == "multi-label" and answers:
        messages = (*messages[:-1], _labels(messages[-1], row))
    tools = _tools(row, layout)
    group = _cell(row, columns.group)
    time = _cell(row, columns.time)
    content = fingerprint([messages, tools, group, time])[:16]
    return Example(
        id=ids.of(row, columns.id, content),
        messages=messages,
        group=group or input_hash(messages),
        source=row.place,
        time=time,
        tools=tools,
    )


def _label(answer: Message, row: Row, layout: Layout) -> Message:
    if layout.output and isinstance(row.values.get(layout.output), (dict, list)):
        raise DataError(
            row.place,
            f"column '{layout.output}' is JSON, not one label",
            "set kind: multi-label for a list of labels, or extraction; or name the column of the "
            "label",
        )
    return {"role": "assistant", "content": (answer.get("content") or "").strip()}


def _labels(answer: Message, row: Row) -> Message:
    try:
        found = read_labels(answer.get("content") or "")
    except NotJson as problem:
        raise DataError(
            row.place,
            f"its output cannot be read as labels: {problem}",
            'write a list, ["a", "b"], or text with commas, a, b; [] where there is none',
        ) from None
    return {"role": "assistant", "content": write_labels(found)}


def _tools(row: Row, layout: Layout) -> tuple[dict[str, object], ...]:
    tools = row.values.get("tools") if layout.format == "messages" else None
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(row.place, "column 'tools' is not a list of objects", "see OpenAI's form")
    text_of(tools, row.place, "tools")
    return tuple(tools)


def _cell(row: Row, column: str | None) -> str:
    """The text of an optional column, which no row may leave empty once it is named."""
    if column is None:
        return ""
    if column not in row.values:
        raise missing_column(row.place, column, row.values)
    text = text_of(row.values[column], row.place, column).strip()
    if not text:
        raise DataError(row.place, f"column '{column}' is empty", "fill it, or do not name it")
    return text


class _Ids:
    """Gives every row of a file an id of its own."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}
        self._copies: Counter[str] = Counter()

    def of(self, row: Row, column: str | None, content: str) -> str:
        """The user's own id, else the content's hash, with -2, -3 for rows that are identical."""
        if column is None:
            self._copies[content] += 1
            copies = self._copies[content]
            return content if copies == 1 else f"{content}-{copies}"
        name = _cell(row, column)
        if name in self._places:
            raise DataError(
                row.place,
                f"column '{column}': the id '{name}' stands at {self._places[name]} too",
                "give every row an id of its own, or do not name the column",
            )
        self._places[name] = row.place
        return name


def input_hash(messages: tuple[Message, ...]) -> str:
    """Hash of all before the answer: the default group, so that identical inputs stay together."""
    prompt = [[m["role"], m.get("content"), m.get("tool_calls")] for m in messages[:-1]]
    return fingerprint(prompt)[:16]
