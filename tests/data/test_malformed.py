"""Malformed files: each ends in one DataError that names place, cause and remedy."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from metier.data import files
from metier.data.files import MAX_ROW
from metier.data.sources import read_examples
from metier.errors import DataError
from metier.task import Columns, Format, Kind

GOOD = b'{"text": "a", "label": "x"}\n'


class Case(NamedTuple):
    """A file, and what its error must say: the line (0: the file as a whole) and some words."""

    name: str
    content: bytes
    line: int
    words: str
    columns: Columns = Columns()
    format: Format = "auto"
    kind: Kind = "classification"


def lines(*rows: Any) -> bytes:
    """JSON lines."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def chat(*turns: tuple[str, str]) -> bytes:
    """One row of OpenAI messages."""
    return lines({"messages": [{"role": role, "content": text} for role, text in turns]})


def sharegpt(*turns: tuple[str, str]) -> bytes:
    """One row of ShareGPT."""
    return lines({"conversations": [{"from": name, "value": text} for name, text in turns]})


def parquet(columns: dict[str, Any]) -> bytes:
    """A Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def repeated_column() -> bytes:
    """A Parquet file with two columns of one name."""
    buffer = io.BytesIO()
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, buffer)
    return buffer.getvalue()


ROW = {"text": "a", "label": "x"}
PARQUET = parquet({"text": ["a"] * 500, "label": ["x"] * 500})
ZST = zstandard.ZstdCompressor().compress(GOOD * 5000)
GZ = gzip.compress(GOOD * 5000)
CASES = {
    # Bytes and encodings.
    "empty": Case("a.jsonl", b"", 0, "is empty"),
    "blank lines only": Case("a.jsonl", b"\n \n\n", 0, "no rows"),
    "latin-1": Case("a.jsonl", GOOD + '{"text": "é"'.encode("latin-1"), 2, "0xE9 at byte 38"),
    "latin-1 in csv": Case("a.csv", b"text,label\ncaf\xe9,x\n", 2, "0xE9 at byte 14"),
    "utf-16 little": Case("a.jsonl", "\ufeff{}".encode("utf-16-le"), 1, "UTF-16"),
    "utf-16 big": Case("a.csv", "\ufefftext,label".encode("utf-16-be"), 1, "UTF-16"),
    "utf-16 unmarked": Case("a.csv", "text,label\na,x".encode("utf-16-le"), 1, "NUL byte"),
    "NUL byte": Case("a.csv", b"text,label\na\0b,x\n", 2, "NUL byte at byte 12"),
    "NUL escape": Case("a.jsonl", lines({"text": "a\0", "label": "x"}), 1, "'text' holds a NUL"),
    "lone surrogate": Case("a.jsonl", b'{"text":"\\ud800","label":"x"}', 1, "'text' .* surrogate"),
    "lone surrogate inside JSON": Case(
        "a.jsonl", b'{"text":"a","fields":{"k":"\\udfff"}}', 1, "'fields' .* surrogate"
    ),
    "row too long": Case(
        "a.jsonl", GOOD + b'{"text": "' + b"a" * MAX_ROW, 2, "longer than 10,000,000"
    ),
    "cell too long": Case(
        "a.csv", b'text,label\n"' + (b"a" * 999 + b"\n") * 10_001, 2, "longer than 10,000,000"
    ),
    "row of a JSON list too long": Case(
        "a.json", b'[{"text": "' + b"a" * MAX_ROW + b'"}]', 1, "longer than 10,000,000"
    ),
    # Names and containers.
    "unknown extension": Case("a.xlsx", b"x", 0, "unknown extension"),
    "no extension": Case("a", GOOD, 0, "unknown extension"),
    "Excel called csv": Case("a.csv", b"PK\x03\x04rest", 0, "zip archive or Excel"),
    "Parquet called jsonl": Case("a.jsonl", PARQUET, 0, "Parquet"),
    "gzip called csv": Case("a.csv", GZ, 0, "gzip"),
    "no gzip": Case("a.jsonl.gz", GOOD, 0, "gzip"),
    "gzip cut short": Case("a.jsonl.gz", GZ[:-200], 0, "gzip"),
    "gzip damaged": Case("a.jsonl.gz", GZ[:60] + b"\xff" * 9 + GZ[69:], 0, "gzip"),
    "no zstd": Case("a.jsonl.zst", GOOD, 0, "zstd"),
    "zstd cut short": Case("a.jsonl.zst", ZST[: len(ZST) // 2], 0, "zstd file cut short"),
    "zstd second frame cut": Case("a.jsonl.zst", ZST + ZST[:20], 0, "zstd file cut short"),
    # JSON.
    "broken JSON": Case("a.jsonl", GOOD + b'{"text": a}\n', 2, "not valid JSON: .*column 10"),
    "two objects on a line": Case("a.jsonl", GOOD.strip() + GOOD, 1, "more text after"),
    "row is a list": Case("a.jsonl", GOOD + b'["a", "x"]\n', 2, "is a list"),
    "row is text": Case("a.jsonl", b'"a"\n', 1, "is text, not an object"),
    "row is null": Case("a.jsonl", b"null\n", 1, "is null"),
    "row is a number": Case("a.jsonl", b"1\n", 1, "is a number"),
    "key stands twice": Case("a.jsonl", b'{"text":"a","text":"b"}', 1, "'text' stands twice"),
    "huge number": Case("a.jsonl", b'{"text":' + b"1" * 5000 + b"}", 1, "too many digits"),
    "deep nesting": Case("a.jsonl", b'{"text":' + b"[" * 10**6, 1, "nested too deeply"),
    "JSON list in a jsonl file": Case("a.jsonl", b'[{"text":"a","label":"x"}]', 1, "JSON list"),
    "JSON lines in a json file": Case("a.json", GOOD * 2, 1, "not a JSON list"),
    "JSON object of lists": Case("a.json", b'{"rows": []}', 1, "not a JSON list"),
    "empty JSON list": Case("a.json", b"[ ]", 0, "no rows"),
    "JSON list unended": Case("a.json", b"[\n" + GOOD + b"\n", 2, "not followed by"),
    "JSON list broken": Case("a.json", b"[\n" + GOOD + b',\n\n{"text" 1}]', 5, "not valid JSON"),
    "text after JSON list": Case("a.json", b"[" + GOOD + b"] x", 0, "more text after"),
    # Tables.
    "header only": Case("a.csv", b"text,label\n", 0, "no rows"),
    "blank header": Case("a.csv", b"\na,x\n", 1, "header is blank"),
    "row too short": Case("a.csv", b"text,label\na,x\nb\n", 3, "1 cells where the header has 2"),
    "row too wide": Case("a.csv", b'text,label\n"b\nc",x\na,b,c\n', 4, "3 cells"),
    "quote unended": Case("a.csv", b'text,label\n"a,x\nb,y\n', 2, "quoted wrongly"),
    "text after quote": Case("a.csv", b'text,label\n"a" b,x\n', 2, "quoted wrongly"),
    "old Mac line ends": Case("a.csv", b"text,label\ra,x\rb,y\r", 1, "quoted wrongly|new-line"),
    "semicolons in a tsv": Case("a.tsv", b"text;label\na;x\n", 1, "one column, but ';'"),
    "bars": Case("a.csv", b"text|label\na|x\n", 1, "one column, but '.'"),
    "commas in a tsv": Case("a.tsv", b"text,label\na,x\n", 1, "one column, but ','"),
    "column stands twice": Case("a.csv", b"text,text\na,x\n", 1, "'text' stands twice"),
    "no header": Case("a.tsv", b"so good\t1\nso bad\t0\n", 2, "no known format"),
    # Columns and values.
    "column missing": Case(
        "a.jsonl", GOOD, 1, "no column 'lable'.*\n.*'label'", Columns(output="lable")
    ),
    "group missing": Case("a.jsonl", GOOD, 1, "no column 'user'", Columns(group="user")),
    "format does not fit": Case(
        "a.jsonl", GOOD, 1, "no column 'question'", format="question-answer"
    ),
    "alpaca without output": Case("a.jsonl", lines({"instruction": "a"}), 1, "no known format"),
    "several formats": Case(
        "a.jsonl",
        lines({"text": "a", "label": "b", "prompt": "a", "completion": "b"}),
        1,
        "fit several formats",
    ),
    "column gone later": Case("a.jsonl", GOOD + lines({"text": "b"}), 2, "no column 'label'"),
    "input empty": Case("a.csv", b"text,label\n ,x\n", 2, "'text': the input is empty"),
    "output empty": Case("a.csv", b"text,label\na,\n", 2, "'label': the output is empty"),
    "output null": Case("a.jsonl", b'{"text": "a", "label": null}', 1, "output is empty"),
    "output NaN": Case("a.jsonl", b'{"text": "a", "label": NaN}', 1, "'label' is not a number"),
    "output infinite": Case("a.jsonl", b'{"text": "a", "label": 1e999}', 1, "NaN or infinite"),
    "NaN inside JSON": Case("a.jsonl", b'{"text": "a", "fields": {"k": [NaN]}}', 1, "'fields'"),
    "outputs of two shapes": Case(
        "a.jsonl",
        lines({"text": "a", "fields": "x"}, {"text": "b", "fields": {"k": 1}}),
        2,
        "'fields' is an object, in the rows before it is text",
        kind="extraction",
    ),
    "JSON as a label": Case(
        "a.jsonl", lines({"text": "a", "fields": {"k": 1}}), 1, "not one label"
    ),
    "id stands twice": Case(
        "a.jsonl",
        lines({**ROW, "id": 7}, {**ROW, "id": "7"}),
        2,
        "id '7' stands at",
        Columns(id="id"),
    ),
    "id empty": Case("a.jsonl", lines({**ROW, "id": ""}), 1, "'id' is empty", Columns(id="id")),
    # Conversations.
    "messages are text": Case("a.jsonl", lines({"messages": "hi"}), 1, "not a list of messages"),
    "messages are empty": Case("a.jsonl", lines({"messages": []}), 1, "not a list of messages"),
    "message is text": Case("a.jsonl", lines({"messages": ["hi"]}), 1, r"messages\[0\] is not an"),
    "unknown role": Case(
        "a.jsonl", chat(("user", "a"), ("asistant", "b")), 1, "'asistant'\n.*'assistant'"
    ),
    "unknown key": Case(
        "a.jsonl", lines({"messages": [{"role": "user", "content": "a", "tone": "b"}]}), 1, "'tone'"
    ),
    "image": Case(
        "a.jsonl",
        lines({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        1,
        "more than text",
    ),
    "weight": Case(
        "a.jsonl",
        lines({"messages": [{"role": "user", "content": "a", "weight": 2}]}),
        1,
        "weight is 2",
    ),
    "weight 0 on the answer": Case(
        "a.jsonl",
        lines(
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b", "weight": 0},
                ]
            }
        ),
        1,
        "nothing would be trained",
    ),
    "starts with the assistant": Case("a.jsonl", chat(("assistant", "a")), 1, "'assistant' cannot"),
    "two users in a row": Case(
        "a.jsonl", chat(("user", "a"), ("user", "b"), ("assistant", "c")), 1, r"messages\[1\]: role"
    ),
    "system in the middle": Case(
        "a.jsonl", chat(("user", "a"), ("system", "b"), ("assistant", "c")), 1, "'system' cannot"
    ),
    "ends with the user": Case("a.jsonl", chat(("user", "a")), 1, "ends with role 'user'"),
    "tool result from nowhere": Case(
        "a.jsonl", chat(("user", "a"), ("assistant", "b"), ("tool", "c")), 1, "'tool' cannot"
    ),
    "tool calls of a user": Case(
        "a.jsonl",
        lines({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}),
        1,
        "tool_calls",
    ),
    "tools are text": Case(
        "a.jsonl",
        lines(
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ],
                "tools": "none",
            }
        ),
        1,
        "'tools'",
    ),
    "answer empty": Case("a.jsonl", chat(("user", "a"), ("assistant", " ")), 1, "answer is empty"),
    "question empty": Case(
        "a.jsonl", chat(("user", ""), ("assistant", "b")), 1, "message is empty"
    ),
    "sharegpt role": Case(
        "a.jsonl", sharegpt(("humann", "a"), ("gpt", "b")), 1, "'humann'\n.*'human'"
    ),
    "sharegpt order": Case("a.jsonl", sharegpt(("gpt", "a"), ("human", "b")), 1, "cannot follow"),
    "sharegpt without value": Case(
        "a.jsonl", lines({"conversations": [{"from": "human"}]}), 1, "empty"
    ),
    # Parquet.
    "no Parquet": Case("a.parquet", GOOD, 0, "no readable Parquet"),
    "Parquet cut short": Case("a.parquet", PARQUET[:-40], 0, "no readable Parquet"),
    "Parquet damaged": Case("a.parquet", PARQUET[:40] + b"\xff" * 30 + PARQUET[70:], 0, "Parquet"),
    "Parquet column twice": Case("a.parquet", repeated_column(), 0, "names a column twice"),
    "Parquet without rows": Case(
        "a.parquet", parquet({"text": pa.array([], pa.string())}), 0, "no rows"
    ),
    "Parquet NaN": Case(
        "a.parquet", parquet({"text": ["a"], "label": [float("nan")]}), 1, "'label'"
    ),
    "Parquet null": Case(
        "a.parquet", parquet({"text": ["a", None], "label": ["x", "y"]}), 2, "empty"
    ),
    "Parquet bytes": Case("a.parquet", parquet({"text": [b"a"], "label": ["x"]}), 1, "holds bytes"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_malformed_file_is_refused_with_place_cause_and_remedy(tmp_path: Path, case: Case) -> None:
    path = tmp_path / case.name
    path.write_bytes(case.content)
    with pytest.raises(DataError, match=case.words) as caught:
        read_examples(case.name, case.kind, tmp_path, case.format, case.columns)
    error = caught.value
    assert error.place == (f"{path}:{case.line}" if case.line else str(path))
    assert error.cause
    assert error.remedy
    assert len(str(error)) < 700


def test_there_are_enough_malformed_files() -> None:
    assert len(CASES) >= 90


def test_directory_and_missing_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(b"text,label\na,x\n")
    with pytest.raises(DataError, match="is a directory"):
        read_examples(".", "classification", tmp_path)
    with pytest.raises(DataError, match=r"did you mean 'train\.csv'"):
        read_examples("trian.csv", "classification", tmp_path)
    with pytest.raises(DataError, match="check the path"):
        read_examples("no/such/file.csv", "classification", tmp_path)
    with pytest.raises(DataError, match="is not a regular file"):
        read_examples("/dev/null", "classification", tmp_path)


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label\na,x\n")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(DataError, match="cannot be opened"):
        read_examples("a.csv", "classification", tmp_path)


@pytest.mark.parametrize("indent", [None, 1], ids=["one line", "many lines"])
def test_a_document_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None
) -> None:
    monkeypatch.setattr(files, "_MAX_DOCUMENT", 1000)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a", "label": "x"}] * 100, indent=indent))
    with pytest.raises(DataError, match="more than 1,000 bytes") as caught:
        read_examples("a.json", "classification", tmp_path)
    assert caught.value.place == str(path)


def test_unknown_builtin_is_refused_with_the_close_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'builtin:stdlib'"):
        read_examples("builtin:stdlb", "classification", tmp_path)


_SEEDS = [GOOD * 3, b"text,label\na,x\nb,y\n", chat(("user", "a"), ("assistant", "b")), PARQUET, GZ]
_NAMES = ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.csv.zst"]


@given(
    seed=st.sampled_from(_SEEDS),
    name=st.sampled_from(_NAMES),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4)), max_size=4),
)
def test_mutated_bytes_are_read_or_refused_never_a_traceback(
    tmp_path_factory: pytest.TempPathFactory,
    seed: bytes,
    name: str,
    edits: list[tuple[float, bytes]],
) -> None:
    content = bytearray(seed)
    for share, patch in edits:
        at = int(share * len(content))
        content[at : at + len(patch)] = patch
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(content)
    places: list[str] = []
    examples = []
    try:
        examples = read_examples(name, "expansion", path.parent)
    except DataError as error:
        places.append(error.place)
    assert bool(examples) != bool(places)
    assert all(place.startswith(str(path)) for place in places)
    assert all(row.answer.strip() and row.input.strip() for row in examples)
