"""Tokens with tags and texts with spans become examples; what cannot be read is named."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from metier.data.propose import propose
from metier.data.sources import read_examples
from metier.errors import DataError
from metier.records import Example
from metier.task import Format, Task

CONLL = "Ada\tB-person\nLovelace\tI-person\nin\tO\nLondon\tB-place\n\n\t\nnobody\tO\n"
PAIRS = [
    ("Ada Lovelace in London", {"person": ["Ada Lovelace"], "place": ["London"]}),
    ("nobody", {}),
]


def read(
    directory: Path,
    name: str,
    content: str | bytes,
    format: Format = "auto",  # noqa: A002
    answers: bool = True,
) -> list[Example]:
    data = content if isinstance(content, bytes) else content.encode()
    (directory / name).write_bytes(data)
    return read_examples(name, "extraction", directory, format, answers=answers)


def pairs(examples: list[Example]) -> list[tuple[str, Any]]:
    return [(example.input, json.loads(example.answer)) for example in examples]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.conll", CONLL),
        ("a.bio", CONLL.replace("\n", "\r\n")),
        ("a.txt", CONLL.replace("\t", " ")),
        ("a.iob2", "# a comment, which has no tag\n" + CONLL),
        ("a.tsv", "\n" + CONLL),
        ("a.conll.gz", gzip.compress(CONLL.encode(), mtime=0)),
        ("a.conll", "-DOCSTART- -X- O O\n\nAda NNP B-NP B-person\nLovelace NNP I-NP I-person\n"
                    "in IN B-PP O\nLondon NNP B-NP B-place\n\nnobody DT O O"),
    ],
)  # fmt: skip
def test_files_in_conlls_form_are_read(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert pairs(read(tmp_path, name, content)) == PAIRS


ROWS: dict[str, dict[str, Any]] = {
    "tokens and tags": {"tokens": ["In", "Rome"], "tags": ["O", "B-place"]},
    "names of the Hub": {"id": "1", "words": ["In", "Rome"], "ner_tags": ["O", "B-place"]},
    "Prodigy": {"text": "In Rome", "spans": [{"start": 3, "end": 7, "label": "place"}]},
    "doccano": {"text": "In Rome", "spans": [[3, 7, "place"]]},
    "a blank too much": {"text": "In Rome", "spans": [[2, 7, "place"]]},
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_rows_with_marks_are_read(tmp_path: Path, row: dict[str, Any]) -> None:
    assert pairs(read(tmp_path, "a.jsonl", json.dumps(row))) == [("In Rome", {"place": ["Rome"]})]


def test_a_table_whose_columns_have_names_stays_a_table(tmp_path: Path) -> None:
    (example,) = read(tmp_path, "a.tsv", "prompt\tcompletion\nIn Rome\tO\n")
    assert (example.input, example.answer) == ("In Rome", "O")


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "In Rome"}',
        '{"tokens": ["In", "Rome"]}',
        '{"tokens": ["In", "Rome"], "tags": ["O", "O"]}',
    ],
)
def test_requests_need_no_marks(tmp_path: Path, content: str) -> None:
    (example,) = read(tmp_path, "a.jsonl", content, "tags", answers=False)
    assert example.input == "In Rome"


WRONG = {
    "a line without a tag": ("a.conll", "Rome\tB-place\nis\n", 2, "no token with its tag"),
    "a tag that is none": ("a.conll", "Rome\tB-place\nis\tx\n", 2, "no token with its tag"),
    "running text": ("a.txt", "\nOnce upon a time.\n", 2, "no token with its tag"),
    "a later line of a table": ("a.tsv", "is\tO\n\nRome\tplace\n", 3, "no token with its tag"),
    "numbers for tags": ("a.jsonl", '{"tokens": ["a"], "ner_tags": [0]}', 1, "no list of texts"),
    "a tag too few": ("a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}', 1, "2 tokens and 1 tags"),
    "a blank token": ("a.jsonl", '{"tokens": ["a", " "], "tags": ["O", "O"]}', 1, "2 is blank"),
    "a wrong tag": ("a.jsonl", '{"tokens": ["a"], "tags": ["place"]}', 1, "'place' of token 1"),
    "a span outside": ("a.jsonl", '{"text": "ab", "spans": [[1, 3, "x"]]}', 1, "from 1 to 3"),
    "an empty span": ("a.jsonl", '{"text": "a b", "spans": [[1, 2, "x"]]}', 1, "from 1 to 2"),
    "half a span": ("a.jsonl", '{"text": "a b", "spans": [{"start": 0}]}', 1, "span 1 has not"),
    "spans that are none": ("a.jsonl", '{"text": "a b", "spans": "x"}', 1, "no list of spans"),
    "nothing marked": ("a.jsonl", '{"text": "a b", "spans": null}', 1, "the output is empty"),
}


@pytest.mark.parametrize(("name", "content", "line", "cause"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: str, line: int, cause: str
) -> None:
    with pytest.raises(DataError, match=cause) as caught:
        read(tmp_path, name, content)
    assert caught.value.place.endswith(f"{name}:{line}")


def test_a_file_without_blank_lines_is_refused_before_memory_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sentence is longer than 10,000,000 characters"):
        read(tmp_path, "a.conll", ("x" * 997 + "\tO\n") * 10_001)


def test_the_format_is_asked_for_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'tags'"):
        read(tmp_path, "a.jsonl", '{"tokens": ["a"], "text": "a", "label": "x"}', "tags")


REAL = {
    "wnut17/train.conll": (3394, 1975),
    "wnut17/dev.conll": (1009, None),
    "ncbi_disease/train.tsv": (5432, None),
    "crossner/ai/train.txt": (100, None),
}


@pytest.mark.parametrize("file", REAL)
def test_real_files_hold_what_their_lines_hold(data_dir: Path, file: str) -> None:
    """Oracle: lines counted as lines. Every span begins with a B in these files."""
    examples = read_examples(str(data_dir / file), "extraction", Path())
    lines = (data_dir / file).read_text("utf-8").split("\n")
    begun = Counter(line.split("\t")[-1][2:] for line in lines if "\tB-" in line)
    found: Counter[str] = Counter()
    for example in examples:
        for kind, texts in json.loads(example.answer).items():
            found[kind] += len(texts)
            assert all(text in example.input for text in texts)
    assert found == begun
    sentences, spans = REAL[file]
    assert len(examples) == sentences
    assert spans in (None, found.total())
    words = [word for example in examples for word in example.input.split(" ")]
    assert words == [line.split("\t")[0] for line in lines if line.strip()]


def test_a_proposal_compares_writing_with_tagging(data_dir: Path, tmp_path: Path) -> None:
    text = propose(data_dir / "wnut17" / "train.conll", tmp_path)
    (tmp_path / "task.yaml").write_text(text, "utf-8")
    task = Task.load(tmp_path / "task.yaml")
    assert (task.name, task.kind, task.data.format, task.grader) == (
        "wnut17", "extraction", "tags", "fields",
    )  # fmt: skip
    assert task.arms == ("prompt", "few-shot", "rag", "lora", "lora/tags")
    assert task.data.validation == str(data_dir / "wnut17" / "dev.conll")
    assert task.data.columns.input is None
    assert "write {} where it names none" in task.instruction
    assert all(kind in task.instruction for kind in ("person", "creative-work"))
    assert "They fit the format tags." in text
