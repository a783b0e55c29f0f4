"""How rows are laid out, and how each layout becomes a chat that ends with the expected output."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from metier.data.files import MAX_ROW, Row
from metier.data.tagged import text_and_answer
from metier.errors import DataError
from metier.records import Message
from metier.task import Columns, Format

# Columns that name the input and the output of each format, the usual name first.
_PAIRS: dict[Format, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "question-answer": (("question",), ("answer",)),
    "text-label": (
        ("text", "sentence", "utterance"),
        ("label", "category", "class", "intent", "fields"),
    ),
    "prompt-completion": (("prompt", "input"), ("completion", "response", "output")),
}
_ALPACA_OUTPUT = ("output", "response")
_CONTEXTS = ("context", "passage")
# Columns of texts whose spans are marked: by a tag for each token, or by their places.
_MARKED = ((("tokens", "words"), ("tags", "ner_tags")), (("text", "sentence"), ("spans",)))
_CHATS: dict[Format, str] = {"messages": "messages", "sharegpt": "conversations"}

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_ROLES = ("system", "developer", "user", "assistant", "tool")
_MESSAGE_KEYS = ("role", "content", "name", "weight", "tool_calls", "tool_call_id")


@dataclass(frozen=True, slots=True)
class Layout:
    """Which columns of a file are read, and as what.

    Attributes:
        format: one of `metier.task.Format`, never ``auto``.
        input: column of the input, the instruction (Alpaca) or the whole chat.
        output: column of the expected output; empty for chats, which end with it.
        context: a second input column, which is put below the first (Alpaca's ``input``, the
            context of a question), or empty.

    """

    format: Format
    input: str
    output: str = ""
    context: str = ""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns that make the input."""
        return (self.input, self.context) if self.context else (self.input,)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return (*self.inputs, self.output) if self.output else self.inputs


def find_layout(row: Row, format: Format, columns: Columns, answers: bool = True) -> Layout:  # noqa: A002
    """The layout of a file from its first row and what the task says about it.

    Args:
        row: the first row.
        format: the task's format, or ``auto``.
        columns: the task's columns, or none.
        answers: whether an output column must be there.

    Raises:
        DataError: no layout fits, or more than one does.

    """
    names = tuple(row.values)
    for column in (columns.input, columns.output, columns.group, columns.id, columns.time):
        if column is not None and column not in names:
            raise missing_column(row.place, column, names, answers)
    if format == "auto":
        return _detect(row.place, names, columns, answers)
    layout = _layout(format, names, columns, answers)
    if layout is None:
        raise _unfit(row.place, format, names, answers)
    return layout


def _detect(place: str, names: tuple[str, ...], columns: Columns, answers: bool) -> Layout:
    if columns.input and (columns.output or not answers):
        return Layout("prompt-completion", columns.input, columns.output or "")
    formats: tuple[Format, ...] = ("messages", "sharegpt", "alpaca", "tags", *_PAIRS)
    found = [fit for name in formats if (fit := _layout(name, names, columns, answers))]
    if found and found[0].format == "alpaca":
        return found[0]
    if not answers:  # a text alone is a text, whatever is asked of it
        found = [layout for layout in found if layout.format != "tags"] or found
    if len(found) == 1:
        return found[0]
    listed = ", ".join(names)
    if found:
        fits = ", ".join(layout.format for layout in found)
        raise DataError(
            place, f"the columns {listed} fit several formats: {fits}", "set data.format"
        )
    raise DataError(
        place,
        f"no known format has the columns {listed}",
        "name them: set data.columns.input and data.columns.output"
        if answers
        else "rename the column of the input as it is called in the task's data",
    )


def _layout(
    format: Format,  # noqa: A002
    names: tuple[str, ...],
    columns: Columns,
    answers: bool,
) -> Layout | None:
    if format in _CHATS:
        chat = columns.input or _first((_CHATS[format],), names)
        return Layout(format, chat) if chat and not columns.output else None
    if format == "alpaca":
        instruction = _first(("instruction",), names)
        context = columns.input or _first(("input", *_CONTEXTS), names)
        output = columns.output or _first(_ALPACA_OUTPUT, names)
        if not instruction or not (output or not answers):
            return None
        return Layout(format, instruction, output, context)
    if format == "tags":
        return _marked(names, columns, answers)
    inputs, outputs = _PAIRS[format]
    source = columns.input or _first(inputs, names)
    target = columns.output or _first(outputs, names)
    if not source or not (target or not answers):
        return None
    asked = format == "question-answer" and not columns.input
    return Layout(format, source, target, _first(_CONTEXTS, names) if asked else "")


def _marked(names: tuple[str, ...], columns: Columns, answers: bool) -> Layout | None:
    """Tokens with their tags, or a text with its spans; of requests, either without the latter."""
    for inputs, outputs in _MARKED:
        source = columns.input or _first(inputs, names)
        target = columns.output or _first(outputs, names)
        if source and (target or not answers):
            return Layout("tags", source, target)
    return None


def _first(wanted: Iterable[str], names: tuple[str, ...]) -> str:
    """The first of the wanted columns that is there, whatever its case."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in wanted if name in lower), "")


def missing_column(
    place: str, column: str, names: Iterable[str], answers: bool = True
) -> DataError:
    """The error for a column that is not there, with the nearest name that is.

    A file of requests, without answers, is laid out as the task's data, which are not changed.
    """
    known = list(names)
    if not answers:
        remedy = f"rename a column to '{column}', as the task's data call it: the columns are "
        return DataError(place, f"has no column '{column}'", remedy + ", ".join(known))
    close = difflib.get_close_matches(column, known, n=1, cutoff=0.5)
    remedy = f"did you mean '{close[0]}'?" if close else f"the columns are {', '.join(known)}"
    return DataError(place, f"has no column '{column}'", remedy)


def _unfit(
    place: str,
    format: Format,  # noqa: A002
    names: tuple[str, ...],
    answers: bool,
) -> DataError:
    if format in _CHATS:
        return missing_column(place, _CHATS[format], names, answers)
    inputs, outputs = _usual(format, names)
    lacking = inputs if not _first(inputs, names) else outputs
    error = missing_column(place, lacking[0], names, answers)
    other = " Or set data.columns" if answers else ""
    return DataError(place, f"{error.cause} (format {format})", error.remedy + other)


def _usual(
    format: Format,  # noqa: A002
    names: tuple[str, ...],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The usual names of the input and the output of a format of pairs."""
    if format == "alpaca":
        return ("instruction",), _ALPACA_OUTPUT
    if format == "tags":
        return next((pair for pair in _MARKED if _first(pair[0], names)), _MARKED[0])
    return _PAIRS[format]


def messages_of(row: Row, layout: Layout, answers: bool = True) -> tuple[Message, ...]:
    """The chat of a row; its last message is the assistant's, the expected output.

    With ``answers`` false, the answer of a row that has none is empty text, and so may its input
    be: one empty request does not keep the others of a file from being answered.
    """
    for column in layout.columns:
        if column not in row.values and column != layout.context:
            raise missing_column(row.place, column, row.values, answers)
    if layout.format in _CHATS:
        return _chat(row, layout, answers)
    if layout.format == "tags":
        row = _as_text(row, layout)
    prompt = text_of(row.values[layout.input], row.place, layout.input)
    context = row.values.get(layout.context) if layout.context else None
    if context is not None and (more := text_of(context, row.place, layout.context)).strip():
        prompt = f"{prompt}\n\n{more}" if prompt.strip() else more
    answer = text_of(row.values[layout.output], row.place, layout.output) if layout.output else ""
    if answers:
        _refuse_empty(prompt, row.place, layout.input, "input")
        _refuse_empty(answer, row.place, layout.output, "output")
    return ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})


def _as_text(row: Row, layout: Layout) -> Row:
    """A row of marked spans with its text, and the answer that names them where it must."""
    marked = row.values[layout.output] if layout.output else None
    columns = (layout.input, layout.output)
    text, answer = text_and_answer(row.place, columns, row.values[layout.input], marked)
    return Row(row.place, {layout.output: answer, layout.input: text})


def _refuse_empty(text: str, place: str, column: str, what: str) -> None:
    if not text.strip():
        raise DataError(place, f"column '{column}': the {what} is empty", "fill it or drop the row")


def text_of(value: Any, place: str, column: str) -> str:
    """A cell as text: numbers as written in JSON, lists and objects as compact JSON.

    Raises:
        DataError: the value is NaN, infinite, bytes, or holds half of a surrogate pair.

    """
    if value is None:
        return ""
    if isinstance(value, str):
        text = value
    elif isinstance(value, (bytes, bytearray)):
        raise DataError(place, f"column '{column}' holds bytes", "store it as text")
    else:
        text = _json_text(value, place, column)
    if len(text) > MAX_ROW:
        raise DataError(
            place, f"column '{column}' has {len(text):,} characters", "split the row into several"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            place,
            f"column '{column}' holds half of a surrogate pair (character {error.start + 1})",
            "write the character itself, or both halves",
        ) from None
    if "\0" in text:
        raise DataError(place, f"column '{column}' holds a NUL character", "remove it")
    return text


def _json_text(value: Any, place: str, column: str) -> str:
    try:
        text = json.dumps(
            value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=str
        )
    except ValueError:
        raise DataError(
            place, f"column '{column}' is not a number (NaN or infinite)", "fill it or drop the row"
        ) from None
    except (TypeError, RecursionError):
        raise DataError(place, f"column '{column}' is no plain value", "write it as text") from None
    return text if isinstance(value, (dict, list, bool, int, float)) else str(value)


def _chat(row: Row, layout: Layout, answers: bool) -> tuple[Message, ...]:
    column = layout.input
    turns = row.values[column]
    if not isinstance(turns, list) or not turns:
        raise DataError(
            row.place,
            f"column '{column}' is not a list of messages",
            'write [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]',
        )
    read = _sharegpt_message if layout.format == "sharegpt" else _message
    messages = [
        read(turn, row.place, f"{column}[{number}]", answers) for number, turn in enumerate(turns)
    ]
    if not answers and messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    _check_order(messages, row.place, column)
    if answers:
        _check_answer(messages[-1], row.place, column)
    return tuple(messages)


def _check_answer(message: Message, place: str, column: str) -> None:
    if message.get("weight") == 0:
        raise DataError(
            place,
            f"column '{column}': the last answer has weight 0, so nothing would be trained",
            "drop the row, or end the conversation with the answer to learn",
        )
    _refuse_empty(message.get("content") or "", place, column, "last answer")


def _fields(turn: Any, place: str, field: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise DataError(place, f"{field} is not an object", "write each message as an object")
    return turn


def _role(value: Any, place: str, field: str, known: Iterable[str]) -> str:
    roles = list(known)
    if value in roles:
        return str(value)
    close = difflib.get_close_matches(str(value), roles, n=1)
    remedy = f"did you mean '{close[0]}'?" if close else f"known roles: {', '.join(roles)}"
    raise DataError(place, f"{field}: unknown role {value!r}", remedy)


def _sharegpt_message(turn: Any, place: str, field: str, answers: bool) -> Message:
    fields = _fields(turn, place, field)
    known = (*_SHAREGPT_ROLES, "system", "user", "assistant")
    role = _role(fields.get("from"), place, f"{field}.from", known)
    text = text_of(fields.get("value"), place, f"{field}.value")
    if answers and role not in ("gpt", "assistant"):
        _refuse_empty(text, place, f"{field}.value", "message")
    return {"role": _SHAREGPT_ROLES.get(role, role), "content": text}


def _message(turn: Any, place: str, field: str, answers: bool) -> Message:
    fields = _fields(turn, place, field)
    for key, value in fields.items():
        if key not in _MESSAGE_KEYS and value not in (None, [], {}):
            raise DataError(
                place, f"{field} has the unknown key '{key}'", f"known: {', '.join(_MESSAGE_KEYS)}"
            )
    role = _role(fields.get("role"), place, f"{field}.role", _ROLES)
    message: Message = {"role": role, "content": _content(fields.get("content"), place, field)}
    calls = fields.get("tool_calls")
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise DataError(
                place, f"{field}.tool_calls", "only an assistant's message has a list of calls"
            )
        _json_text(calls, place, f"{field}.tool_calls")
        message["tool_calls"] = calls
    elif answers and role != "assistant":
        _refuse_empty(message["content"] or "", place, f"{field}.content", "message")
    if fields.get("weight") is not None:
        message["weight"] = _weight(fields["weight"], place, field)
    if fields.get("name") is not None:
        message["name"] = text_of(fields["name"], place, f"{field}.name")
    if fields.get("tool_call_id") is not None:
        message["tool_call_id"] = text_of(fields["tool_call_id"], place, f"{field}.tool_call_id")
    return message


def _content(value: Any, place: str, field: str) -> str:
    """Text, or OpenAI's list of text parts."""
    if not isinstance(value, list):
        return text_of(value, place, f"{field}.content")
    parts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise DataError(place, f"{field}.content holds more than text", "keep only text parts")
        parts.append(text_of(part.get("text"), place, f"{field}.content"))
    return "".join(parts)


def _weight(value: Any, place: str, field: str) -> int:
    if value not in (0, 1) or isinstance(value, bool):
        raise DataError(place, f"{field}.weight is {value!r}", "write 0 or 1")
    return int(value)


def _check_order(messages: list[Message], place: str, column: str) -> None:
    """An instruction first, then user and assistant in turn, the assistant last."""
    allowed = {
        "start": ("system", "developer", "user"),
        "system": ("user",),
        "developer": ("user",),
        "user": ("assistant",),
        "assistant": ("user", "tool"),
        "tool": ("assistant", "tool"),
    }
    before = "start"
    for number, message in enumerate(messages):
        role = message["role"]
        if role not in allowed[before] or (
            role == "tool" and before == "assistant" and "tool_calls" not in messages[number - 1]
        ):
            raise DataError(
                place,
                f"{column}[{number}]: role '{role}' cannot follow '{before}'",
                "an instruction may come first, then user and assistant take turns",
            )
        before = role
    if before != "assistant":
        raise DataError(
            place,
            f"{column} ends with role '{before}', not with the assistant's answer",
            "end every conversation with the expected output",
        )
