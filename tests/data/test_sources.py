"""Reading good files: every format gives the same examples, ids and groups are stable."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from metier.data.files import MAX_ROW
from metier.data.sources import read_examples
from metier.errors import DataError
from metier.records import Example
from metier.task import Columns, Kind

ROWS = [
    {"text": "Where is my card?", "label": "arrival"},
    {"text": 'He said "no", twice,\nand left', "label": "other"},
    {"text": "café 🦉 <|endoftext|> \u2028 =1+1", "label": "other"},
]


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_json(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=2, ensure_ascii=False).encode()


def as_table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "jsonl": as_jsonl,
    "json": as_json,
    "csv": lambda rows: as_table(rows, ","),
    "tsv": lambda rows: as_table(rows, "\t"),
    "parquet": as_parquet,
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def read(
    tmp_path: Path, name: str, content: bytes, kind: Kind = "expansion", **options: Any
) -> list[Example]:
    (tmp_path / name).write_bytes(content)
    return read_examples(name, kind, tmp_path, **options)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_container_gives_the_same_examples(
    tmp_path: Path, suffix: str, compression: str
) -> None:
    content = COMPRESSIONS[compression](WRITERS[suffix](ROWS))
    examples = read(tmp_path, f"rows.{suffix}{compression}", content, "classification")
    reference = read(tmp_path, "reference.jsonl", as_jsonl(ROWS), "classification")
    assert [(e.input, e.answer) for e in examples] == [(r["text"], r["label"]) for r in ROWS]
    assert [(e.id, e.group, e.messages) for e in examples] == [
        (e.id, e.group, e.messages) for e in reference
    ]


def test_source_names_file_and_line(tmp_path: Path) -> None:
    sources = {
        suffix: [e.source for e in read(tmp_path, f"rows.{suffix}", write(ROWS))]
        for suffix, write in WRITERS.items()
    }
    expected = {"jsonl": [1, 2, 3], "json": [2, 6, 10], "csv": [2, 3, 5], "parquet": [1, 2, 3]}
    for suffix, numbers in expected.items():
        assert sources[suffix] == [f"{tmp_path}/rows.{suffix}:{n}" for n in numbers]


def test_a_json_list_on_one_line_may_be_longer_than_a_row(tmp_path: Path) -> None:
    rows = [{"text": sign * (MAX_ROW // 2), "label": "x"} for sign in "abc"]
    assert len(read(tmp_path, "rows.json", json.dumps(rows).encode())) == 3


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_byte_order_mark_is_accepted(tmp_path: Path, suffix: str) -> None:
    content = b"\xef\xbb\xbf" + WRITERS[suffix](ROWS)
    assert [e.input for e in read(tmp_path, f"rows.{suffix}", content)] == [r["text"] for r in ROWS]


LAYOUTS: dict[str, dict[str, Any]] = {
    "prompt-completion": {"prompt": "Q", "completion": "A"},
    "question-answer": {"question": "Q", "answer": "A"},
    "text-label": {"text": "Q", "label": "A"},
    "text-label, other names": {"Sentence": "Q", "intent": "A"},
    "alpaca": {"instruction": "Q", "input": "", "output": "A"},
    "alpaca without input": {"instruction": "Q", "output": "A"},
    "messages": {
        "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    },
    "messages in parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Q"}]},
            {"role": "assistant", "content": "A", "refusal": None},
        ]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
}


@pytest.mark.parametrize("row", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_becomes_the_same_chat(tmp_path: Path, row: dict[str, Any]) -> None:
    (example,) = read(tmp_path, "rows.jsonl", as_jsonl([row]))
    assert example.messages == (
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    )


def test_alpaca_context_follows_the_instruction(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Sort", "input": "3 1 2", "output": "1 2 3"},
        {"instruction": "", "input": "only this", "output": "x"},
        {"instruction": "no context", "output": "x"},
    ]
    inputs = [e.input for e in read(tmp_path, "rows.jsonl", as_jsonl(rows))]
    assert inputs == ["Sort\n\n3 1 2", "only this", "no context"]


def test_conversation_keeps_turns_tools_and_weights(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "assistant", "content": "one", "weight": 0},
        {"role": "user", "content": "second", "name": "Ada"},
        {"role": "assistant", "content": "two"},
    ]
    row = {"messages": turns, "tools": [{"type": "function", "function": {"name": "f"}}]}
    (example,) = read(tmp_path, "rows.jsonl", as_jsonl([row]))
    assert list(example.messages) == turns
    assert example.tools == tuple(row["tools"])
    assert (example.input, example.answer) == ("second", "two")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"),
        (2.5, "2.5"),
        (True, "true"),
        ({"b": 1, "a": [1, "é"]}, '{"b":1,"a":[1,"é"]}'),
        (["x", {"y": None}], '["x",{"y":null}]'),
        ("  kept as it is\n", "  kept as it is\n"),
    ],
)
def test_outputs_become_text(tmp_path: Path, value: Any, text: str) -> None:
    (example,) = read(tmp_path, "rows.jsonl", as_jsonl([{"text": "a", "label": value}]))
    assert example.answer == text


def test_labels_lose_the_blanks_around_them(tmp_path: Path) -> None:
    content = as_jsonl([{"text": "a", "label": " yes\n"}, {"text": "b", "label": 1}])
    examples = read(tmp_path, "rows.jsonl", content, "classification")
    assert [e.answer for e in examples] == ["yes", "1"]


def test_parquet_values_of_other_types_become_text(tmp_path: Path) -> None:
    import datetime
    import decimal

    rows = [{"text": "a", "label": datetime.date(2024, 2, 29)}]
    assert read(tmp_path, "a.parquet", as_parquet(rows))[0].answer == "2024-02-29"
    rows = [{"text": "a", "label": decimal.Decimal("9.10")}]
    assert read(tmp_path, "b.parquet", as_parquet(rows))[0].answer == "9.10"


def test_named_columns_win(tmp_path: Path) -> None:
    rows = [{"mr": "name[A]", "ref": "A is here.", "who": "u1", "key": "k", "when": "2024-01-01"}]
    columns = Columns(input="mr", output="ref", group="who", id="key", time="when")
    (example,) = read(tmp_path, "rows.csv", as_table(rows, ","), columns=columns)
    assert (example.input, example.answer) == ("name[A]", "A is here.")
    assert (example.id, example.group, example.time) == ("k", "u1", "2024-01-01")


def test_ids_are_hashes_of_content_with_a_number_for_copies(tmp_path: Path) -> None:
    rows = [ROWS[0], ROWS[1], ROWS[0], ROWS[0], {**ROWS[0], "label": "other"}]
    ids = [e.id for e in read(tmp_path, "rows.jsonl", as_jsonl(rows))]
    assert ids[2:4] == [f"{ids[0]}-2", f"{ids[0]}-3"]
    assert len(set(ids)) == 5
    backwards = [e.id for e in read(tmp_path, "back.jsonl", as_jsonl(rows[::-1]))]
    assert set(ids) == set(backwards)


def test_identical_inputs_share_a_group(tmp_path: Path) -> None:
    rows = [ROWS[0], {**ROWS[0], "label": "other"}, ROWS[1]]
    groups = [e.group for e in read(tmp_path, "rows.jsonl", as_jsonl(rows))]
    assert groups[0] == groups[1] != groups[2]


def test_requests_may_lack_answers(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    examples = read(tmp_path, "rows.jsonl", as_jsonl(rows), answers=False)
    assert [(e.input, e.answer) for e in examples] == [("a", ""), ("b", "")]
    named = Columns(input="text", output="label", id="key", group="who", time="when")
    examples = read(tmp_path, "rows.jsonl", as_jsonl(rows), answers=False, columns=named)
    assert [(e.input, e.answer) for e in examples] == [("a", ""), ("b", "")]
    kept = read(tmp_path, "keys.jsonl", as_jsonl([{"text": "a", "key": "k"}]), answers=False,
                columns=named)  # fmt: skip
    assert kept[0].id == "k"
    with pytest.raises(DataError, match="no column 'text'") as caught:
        read(tmp_path, "rows.jsonl", as_jsonl([{"test": "a"}]), answers=False, columns=named)
    assert caught.value.remedy == (
        "rename a column to 'text', as the task's data call it: the columns are test"
    )
    with pytest.raises(DataError, match="no known format") as caught:
        read(tmp_path, "rows.jsonl", as_jsonl([{"test": "a"}]), answers=False)
    assert caught.value.remedy.startswith("rename the column of the input")
    chats = [{"messages": [{"role": "user", "content": "a"}]}]
    (example,) = read(tmp_path, "chats.jsonl", as_jsonl(chats), answers=False)
    assert example.prompt == ({"role": "user", "content": "a"},)


def test_requests_may_be_empty_but_examples_may_not(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": ""}]
    turns = [{"from": "human", "value": ""}]
    for name, row in {
        "text": {"text": " "},
        "null": {"text": None},
        "chat": {"messages": chat},
        "turns": {"conversations": turns},
    }.items():
        (example,) = read(tmp_path, f"{name}.jsonl", as_jsonl([row]), answers=False)
        assert not example.input.strip()
    for name, row in {
        "text": {"text": " ", "label": "x"},
        "chat": {"messages": [*chat, {"role": "assistant", "content": "x"}]},
        "turns": {"conversations": [*turns, {"from": "gpt", "value": "x"}]},
    }.items():
        with pytest.raises(DataError, match="is empty"):
            read(tmp_path, f"{name}.jsonl", as_jsonl([row]))


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@given(
    rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5),
    suffix=st.sampled_from(["jsonl", "json", "parquet"]),
)
def test_any_text_survives_reading(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], suffix: str
) -> None:
    values = [{"prompt": p, "completion": c} for p, c in rows if p.strip() and c.strip()]
    if values:
        examples = read(tmp_path_factory.mktemp("any"), f"a.{suffix}", WRITERS[suffix](values))
        assert [{"prompt": e.input, "completion": e.answer} for e in examples] == values


def test_real_files_are_read(data_dir: Path) -> None:
    def count(name: str, kind: Kind, **columns: str) -> int:
        return len(read_examples(name, kind, data_dir, columns=Columns(**columns)))

    assert count("banking77/train.csv", "classification") == 10_003
    assert count("sroie/receipts.jsonl", "extraction", id="id") == 500
    assert count("e2e_nlg/devset.csv", "expansion", input="mr", output="ref") == 4672
    assert count("llamafactory_demo/alpaca_en_demo.json", "expansion") == 999
    assert count("gsm8k/train.jsonl", "expansion") == 7473
