"""Columns of real exports: what is the input, what the output, and what a person is warned of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from metier.data.propose import propose
from metier.data.sources import read_examples
from metier.errors import DataError
from metier.task import Columns, Task
from tests.data.test_propose import proposal, sentences, write

S = sentences(250)


def table(path: Path, text: str) -> tuple[Task, str]:
    path.write_text(text, "utf-8")
    proposed = propose(path)
    path.with_name("task.yaml").write_text(proposed, "utf-8")
    return Task.load(path.with_name("task.yaml")), proposed


@pytest.mark.parametrize("asked", ["question", "instruction"])
@pytest.mark.parametrize("name", ["context", "passage"])
def test_a_question_is_asked_with_its_context(tmp_path: Path, asked: str, name: str) -> None:
    output = "answer" if asked == "question" else "response"
    rows = [
        {"id": i, name: s * 3, asked: f"what {i}?", output: s[:9]}
        for i, s in enumerate(sentences(250))
    ]
    task, text = proposal(tmp_path / "a.jsonl", rows)
    assert f"# The input is '{asked}' with '{name}' below it." in text
    assert "Not used" not in text
    assert (task.kind, task.data.columns.id) == ("extraction", "id")
    examples = read_examples("a.jsonl", task.kind, tmp_path, task.data.format, task.data.columns)
    assert examples[0].input == f"{rows[0][asked]}\n\n{rows[0][name]}"
    bare = read_examples(
        "a.jsonl", "expansion", tmp_path, columns=Columns(input=asked, output=output)
    )
    assert bare[0].input == rows[0][asked]


def test_more_text_than_in_the_input_is_pointed_out(tmp_path: Path) -> None:
    rows = [{"question": s[:20], "answer": s[:5], "story": s * 3, "url": "x" * 99} for s in S]
    _, text = proposal(tmp_path / "a.jsonl", rows)
    assert "They fit the format question-answer in part." in text
    assert "# GUESS, please check: 'question' is the input, 'answer' the output." in text
    assert "# CAREFUL: there is more text in story than in the input." in text
    short = [{**row, "story": "a story"} for row in rows]
    _, text = proposal(tmp_path / "b.jsonl", short)
    assert "They fit the format question-answer." in text
    assert "CAREFUL" not in text


REVIEWS: dict[str, list[Any]] = {
    "review_id": list(range(250)), "review": S, "NAME": [1, 2, 3, 4, 5],
    "helpful_votes": list(range(30)), "product": ["A", "B"],
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["stars", "Rating", "score", "polarity", "priority", "department", "tag", "grade"]
)
def test_names_of_labels_beat_fewer_values(tmp_path: Path, name: str) -> None:
    columns = {name if key == "NAME" else key: values for key, values in REVIEWS.items()}
    rows = [{key: values[i % len(values)] for key, values in columns.items()} for i in range(250)]
    task, text = proposal(tmp_path / "a.jsonl", rows)
    assert (task.data.columns.input, task.data.columns.output) == ("review", name)
    assert f"'{name}' the output (or is it 'product'?)." in text


def test_all_empty_inputs_are_named_at_once(tmp_path: Path) -> None:
    rows = [{"text": "" if i in (3, 40) else s, "label": i % 2} for i, s in enumerate(S)]
    with pytest.raises(DataError, match=r"input is empty in 2 of 250 rows \(lines 4, 41\)"):
        propose(write(tmp_path / "a.jsonl", rows))


def test_an_empty_context_is_no_empty_input(tmp_path: Path) -> None:
    rows = [{"instruction": s, "input": "", "output": s[::-1]} for s in S]
    assert proposal(tmp_path / "a.jsonl", rows)[0].data.format == "alpaca"


def test_empty_columns_without_a_name_are_passed_over(tmp_path: Path) -> None:
    lines = ["v1,v2,,,", *(f"{'ham' if i % 3 else 'spam'},{s},,," for i, s in enumerate(S))]
    task, text = table(tmp_path / "a.csv", "\n".join(lines))
    assert (task.data.columns.input, task.data.columns.output) == ("v2", "v1")
    assert "# 250 rows with the columns v1, v2." in text
    lines[5] += "and more"
    _, text = table(tmp_path / "a.csv", "\n".join(lines))
    assert "# Not used: column 5." in text


def test_an_index_without_a_name_is_told_by_its_place(tmp_path: Path) -> None:
    lines = [",text,label", *(f"{i},{s},{'ab'[i % 2]}" for i, s in enumerate(S))]
    task, text = table(tmp_path / "a.csv", "\n".join(lines))
    assert task.data.format == "text-label"
    assert "# Not used: column 1." in text


def test_semicolons_separate_where_the_header_has_no_comma(tmp_path: Path) -> None:
    lines = ["Text;Label", *(f'"{s}; {s}, 1";{"ab"[i % 2]}' for i, s in enumerate(S))]
    task, _ = table(tmp_path / "a.csv", "\r\n".join(lines))
    (first, *_) = read_examples("a.csv", task.kind, tmp_path, columns=task.data.columns)
    assert (first.input, first.answer) == (f"{S[0]}; {S[0]}, 1", "a")
    (tmp_path / "b.csv").write_text("text;label\na;b;c\n")
    with pytest.raises(DataError, match="3 cells where the header has 2"):
        propose(tmp_path / "b.csv")


def test_labels_that_differ_in_case_are_pointed_out(tmp_path: Path) -> None:
    labels = ["Billing", "billing", "Tech support"]
    rows = [{"text": s, "label": labels[i % 3]} for i, s in enumerate(S)]
    task, text = proposal(tmp_path / "a.jsonl", rows)
    assert set(task.labels) == set(labels)
    assert "# CAREFUL: labels that differ only in how they are written" in text
    assert "'Billing' and 'billing'" in text
    rows = [{"text": s, "label": labels[i % 2 * 2]} for i, s in enumerate(S)]
    assert "CAREFUL" not in proposal(tmp_path / "b.jsonl", rows)[1]


def test_labels_that_differ_in_white_space_are_refused(tmp_path: Path) -> None:
    rows = [
        {"text": s, "label": ["Tech support", "Tech  support", "x"][i % 3]} for i, s in enumerate(S)
    ]
    with pytest.raises(DataError, match="'Tech  support' differs from 'Tech support'") as caught:
        propose(write(tmp_path / "a.jsonl", rows))
    assert caught.value.place.endswith("a.jsonl:2")
    around = [{"text": s, "label": ["yes", "yes ", "no"][i % 3]} for i, s in enumerate(S)]
    assert proposal(tmp_path / "b.jsonl", around)[0].labels == ("no", "yes")


def test_a_file_from_windows_is_refused_with_the_way_to_mend_it(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nPrüfung,ja\n", "cp1252")
    with pytest.raises(DataError, match="iconv -f CP1252 -t UTF-8"):
        propose(tmp_path / "a.csv")


def test_json_in_a_cell_is_no_context(tmp_path: Path) -> None:
    rows = [{"question": s[:9], "answer": s[:3], "found": [s]} for s in S]
    text = propose(write(tmp_path / "a.jsonl", rows))
    assert "CAREFUL" not in text
    assert json.dumps("found") not in text
