"""A proposed task.yaml loads, says what it guessed, and leads to a split."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metier.data.propose import propose
from metier.data.sources import read_examples
from metier.data.split import read_parts
from metier.errors import DataError
from metier.task import Task

ROOT = Path(__file__).resolve().parents[2]
WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in "lnrs"]


def sentences(count: int, words: int = 8) -> list[str]:
    source = random.Random(count)
    return [" ".join(source.choices(WORDS, k=words)) for _ in range(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    return path


def load(path: Path, text: str) -> Task:
    """The task as `metier run` would load it."""
    file = path.with_name("task.yaml")
    file.write_text(text, "utf-8")
    return Task.load(file)


def proposal(path: Path, rows: list[dict[str, Any]]) -> tuple[Task, str]:
    text = propose(write(path, rows))
    return load(path, text), text


def test_few_short_outputs_are_a_classification(tmp_path: Path) -> None:
    labels = ["yes", "no", "1", "null", "a: b", "#x", "über"]
    rows = [{"text": s, "label": labels[i % 7]} for i, s in enumerate(sentences(300))]
    task, text = proposal(tmp_path / "My File (2).jsonl", rows)
    assert (task.name, task.kind, task.grader) == ("my-file-2", "classification", "exact")
    assert set(task.labels) == set(labels)
    assert task.data.format == "text-label"
    assert (task.data.columns.input, task.data.columns.output) == ("text", "label")
    assert "# There are only 7 different outputs, all short." in text
    assert "# By group; near-duplicates of rows in another part are left out." in text
    assert read_parts(task, tmp_path).test


def test_rare_labels_are_named_in_a_comment(tmp_path: Path) -> None:
    rows = [{"text": s, "label": "ab"[i % 2]} for i, s in enumerate(sentences(300))]
    rows[7]["label"] = "seldom"
    _, text = proposal(tmp_path / "a.jsonl", rows)
    assert '# Fewer than 10 rows: ["seldom"].' in text


def test_json_outputs_are_an_extraction(tmp_path: Path) -> None:
    rows = [{"id": i, "text": s, "fields": {"n": i % 3}} for i, s in enumerate(sentences(300))]
    task, text = proposal(tmp_path / "a.jsonl", rows)
    assert (task.kind, task.grader) == ("extraction", "fields")
    assert task.data.columns.id == "id"
    assert "# Every output is JSON." in text


@pytest.mark.parametrize("odd", ['{"n": NaN}', "[" * 100_000 + "]" * 100_000])
def test_what_no_grader_takes_for_json_is_none(tmp_path: Path, odd: str) -> None:
    rows = [{"text": s, "label": '{"n": 1}'} for s in sentences(50)]
    rows[7]["label"] = odd
    task, text = proposal(tmp_path / "a.jsonl", rows)
    assert "Every output is JSON" not in text
    assert task.grader != "fields"


def test_spans_of_the_input_are_an_extraction(tmp_path: Path) -> None:
    rows = [{"question": s, "answer": " ".join(s.split()[2:4])} for s in sentences(300)]
    task, text = proposal(tmp_path / "a.jsonl", rows)
    assert (task.kind, task.grader) == ("extraction", "token_f1")
    assert "100% of the outputs stand word for word in their input" in text


def test_free_text_is_an_expansion(tmp_path: Path) -> None:
    rows = [{"prompt": s, "completion": o} for s, o in zip(sentences(300), sentences(300, 9), strict=True)]  # fmt: skip  # noqa: E501
    task, _ = proposal(tmp_path / "a.jsonl", rows)
    assert (task.kind, task.grader) == ("expansion", "rouge_l")


LAYOUTS = {
    "messages": '{"messages": [{"role":"user","content":Q}, {"role":"assistant","content":A}]}',
    "sharegpt": '{"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]}',
    "alpaca": '{"instruction": Q, "input": "", "output": A}',
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_chats_and_alpaca_need_no_columns(tmp_path: Path, name: str) -> None:
    rows = [
        json.loads(LAYOUTS[name].replace("Q", json.dumps(s)).replace("A", json.dumps(s[::-1])))
        for s in sentences(250)
    ]
    task, _ = proposal(tmp_path / "a.jsonl", rows)
    assert task.data.format == name
    assert task.data.columns.input is None
    assert len(read_parts(task, tmp_path).train) > 100


def test_unknown_columns_are_guessed_and_marked(tmp_path: Path) -> None:
    rows = [{"mr": s, "ref": s[::-1]} for s in sentences(250)]
    task, text = proposal(tmp_path / "a.jsonl", rows)
    assert (task.data.columns.input, task.data.columns.output) == ("mr", "ref")
    assert "GUESS, please check: 'mr' is the input, 'ref' the output." in text
    wide = [
        {"id": i, "body": s, "note": "-", "team": "xy"[i % 2]} for i, s in enumerate(sentences(250))
    ]
    task, text = proposal(tmp_path / "b.jsonl", wide)
    assert (task.data.columns.input, task.data.columns.output) == ("body", "team")
    assert "# Not used: note." in text


def test_columns_that_cannot_be_guessed_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"id": 1, "question": [["q"]], "function": [{}]}])
    with pytest.raises(DataError, match="no known format"):
        propose(path)


def test_small_data_is_warned_of(tmp_path: Path) -> None:
    rows = [{"prompt": s, "completion": s[::-1]} for s in sentences(60)]
    task, text = proposal(tmp_path / "a.jsonl", rows)
    assert "# SMALL: 60 rows." in text
    assert task.margin == 0.05
    assert task.split.test == 0.3


def test_large_data_is_capped_and_says_so(tmp_path: Path) -> None:
    rows = [{"prompt": s, "completion": s[::-1]} for s in sentences(1000, words=400)]
    task, text = proposal(tmp_path / "a.jsonl", rows[:80])
    assert task.split.max_train is None
    assert "max_*" not in text
    task, text = proposal(tmp_path / "b.jsonl", rows)
    assert task.split.max_train is not None
    assert task.split.max_train < 700
    assert "# max_*: all 1,000 rows would take more than the budget" in text


def test_one_endless_answer_counts_as_a_full_context(tmp_path: Path) -> None:
    rows = [{"prompt": s, "completion": s[::-1]} for s in sentences(3000)]
    rows[7]["completion"] = "word " * 20_000
    task, _ = proposal(tmp_path / "a.jsonl", rows)
    assert (task.split.max_test or 600) > 300


def test_columns_are_told_by_their_names(tmp_path: Path) -> None:
    rows = [
        {"text": s * 3, "note": "ab"[i % 2], "instruction": s[::-1], "id": i}
        for i, s in enumerate(sentences(250))
    ]
    task, _ = proposal(tmp_path / "a.jsonl", rows)
    assert (task.data.columns.input, task.data.columns.output) == ("instruction", "note")
    task, _ = proposal(
        tmp_path / "b.jsonl", [{"lang": "en", "summary": s, "body": s * 4} for s in sentences(250)]
    )
    assert (task.data.columns.input, task.data.columns.output) == ("body", "summary")
    spans = [{"body": s, "entities": [{"text": s[:4]}]} for s in sentences(250)]
    task, _ = proposal(tmp_path / "c.jsonl", spans)
    assert (task.kind, task.data.columns.output) == ("extraction", "entities")


S = sentences(250)
GUESSES: dict[str, tuple[dict[str, Any], str, str]] = {
    "source is a channel": (
        {"review": S, "sentiment": ["good", "bad"], "source": ["web", "app", "mail"]},
        "review", "sentiment",
    ),
    "source is a paper": (
        {"document": S, "summary": S[::-1], "source": ["web", "paper"], "url": [s[:5] for s in S]},
        "document", "summary",
    ),
    "the query is short": (
        {"content": S, "target": S[::-1], "query": [s[:9] for s in S]}, "content", "target",
    ),
    "a label beats free text": (
        {"response": S, "label": ["good", "bad"]}, "response", "label",
    ),
    "one prompt for all": (
        {"prompt": ["judge"], "note_text": S, "grade": ["a", "b"]}, "note_text", "grade",
    ),
    "labels first": ({"v1": ["ham", "spam"], "v2": S}, "v2", "v1"),
    "long labels": ({"a": [s[:9] for s in S], "b": ["x" * 70, "y" * 70]}, "a", "b"),
    "fewest values": (
        {"comment_id": list(range(250)), "comment": S, "toxic": [0, 1], "date": list("abcde")},
        "comment", "toxic",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("columns", "source", "output"), GUESSES.values(), ids=GUESSES.keys())
def test_columns_are_told_by_names_and_values(
    tmp_path: Path, columns: dict[str, Any], source: str, output: str
) -> None:
    rows = [{n: values[i % len(values)] for n, values in columns.items()} for i in range(250)]
    task, _ = proposal(tmp_path / "a.jsonl", rows)
    assert (task.data.columns.input, task.data.columns.output) == (source, output)
    few = len(columns[output]) < 10
    assert task.kind == ("classification" if few else "expansion")


@pytest.mark.parametrize("name", ["team", "category"])
def test_one_empty_output_does_not_change_the_guess(tmp_path: Path, name: str) -> None:
    rows = [{"mail": s, name: "ab"[i % 2], "subject": s[:9]} for i, s in enumerate(S)]
    rows[7][name] = ""
    with pytest.raises(
        DataError, match=rf"'{name}': the output is empty in 1 of 250 rows .lines 8\)"
    ):
        propose(write(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize("name", ["the\nlabel", "the\u2028label", "the\x07label"])
def test_line_breaks_in_names_stay_out_of_comments(tmp_path: Path, name: str) -> None:
    task, text = proposal(
        tmp_path / "a.jsonl", [{"mail": s, name: "ab"[i % 2]} for i, s in enumerate(S)]
    )
    assert task.data.columns.output == name
    assert "'the label' the output." in text


def test_long_names_of_columns_are_names(tmp_path: Path) -> None:
    name = "What did you like about the course, and what should we do better next year?"
    lines = [f'"{name}",level', *(f"{s},{'ab'[i % 2]}" for i, s in enumerate(S))]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    assert load(tmp_path / "x", propose(tmp_path / "a.csv")).data.columns.input == name


def test_labels_with_a_hyphen_are_no_tags(tmp_path: Path) -> None:
    labels = ["E-commerce", "B-stock", "S-class"]
    rows = [{"message": s, "department": labels[i % 3]} for i, s in enumerate(S)]
    assert set(proposal(tmp_path / "a.jsonl", rows)[0].labels) == set(labels)


def test_json_keys_are_asked_for(tmp_path: Path) -> None:
    rows = [{"text": s, "fields": {"b": 1, "a": s[:3]}} for s in sentences(250)]
    task, _ = proposal(tmp_path / "a.jsonl", rows)
    assert task.instruction == "Answer with a JSON object that has these keys: b, a."


def test_labels_of_all_official_parts_are_listed(tmp_path: Path) -> None:
    rows = [{"text": s, "label": "ab"[i % 2]} for i, s in enumerate(sentences(300))]
    write(tmp_path / "desk_test.jsonl", [*rows[:50], {"text": "something else", "label": "c"}])
    write(tmp_path / "desk_devel.jsonl", rows[50:80])
    task, text = proposal(tmp_path / "desk_train.jsonl", rows[80:])
    assert task.labels == ("a", "b", "c")
    assert (task.data.validation, task.data.test) == ("desk_devel.jsonl", "desk_test.jsonl")
    assert "# Official parts, found beside the file: the test file is the sealed part." in text
    assert "About 51 different test inputs" in text
    assert "validation:" not in text.partition("split:")[2].partition("#")[0]


def test_rows_with_several_labels_are_seen(tmp_path: Path) -> None:
    """As lists, and as text with a comma or a bar; where no row has several, each has one."""
    texts = sentences(300)
    for sign, several in {"list": ["1", "2"], "comma": "1,2", "bar": "1 | 2"}.items():
        one = ["1"] if sign == "list" else "1"
        kinds = [one, ["2"] if one == ["1"] else "2", several]
        rows = [{"text": s, "label": kinds[i % 3]} for i, s in enumerate(texts)]
        task, text = proposal(tmp_path / f"{sign}.jsonl", rows)
        assert (task.kind, task.labels, task.grader) == ("multi-label", ("1", "2"), "fields")
        assert ("100 rows have several labels" in text) == (sign != "list")
        assert {arm.name for arm in task.chosen_arms()} >= {"classical", "lora"}
    single = [{"text": s, "label": "12"[i % 2]} for i, s in enumerate(texts)]
    assert proposal(tmp_path / "one.jsonl", single)[0].kind == "classification"
    free = [{"text": s, "label": [s[:9], s[9:20]]} for s in texts]
    assert proposal(tmp_path / "free.jsonl", free)[0].kind == "extraction"


TABLES = {
    "a label for a name": ("a.csv", "good film,1\nbad film,0\nbest film,1\ngone,1\n", "'1'"),
    "a word for a name": ("a.csv", "good film,pos\nbad,neg\nbest,pos\nfun,pos\n", "'pos'"),
    "a sentence for a name": ("a.tsv", f"{'so long ' * 9}\t{'or not ' * 9}\nold\tc\n", "'so long"),
    "one token a row": ("a.csv", "token,tag\nParis,B-place\nis,O\nRome,B-place\nis,O\n", "CoNLL"),
}


@pytest.mark.parametrize(("name", "content", "cause"), TABLES.values(), ids=TABLES.keys())
def test_tables_without_rows_of_examples_are_refused(
    tmp_path: Path, name: str, content: str, cause: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=cause):
        propose(tmp_path / name)


def test_all_empty_outputs_are_named_at_once(tmp_path: Path) -> None:
    rows = [{"text": s, "label": "" if i in (3, 40) else i % 2} for i, s in enumerate(sentences(99))]  # fmt: skip  # noqa: E501
    with pytest.raises(DataError, match=r"empty in 2 of 99 rows \(lines 4, 41\)") as caught:
        propose(write(tmp_path / "a.jsonl", rows))
    assert caught.value.place.endswith("a.jsonl:4")


def test_templated_inputs_count_only_equal_ones(tmp_path: Path) -> None:
    rows = [{"prompt": f"name[{w}], food[Italian], area[riverside], price[cheap], near[the river]",
             "completion": f"{w} is here"} for w in WORDS[:120]]  # fmt: skip
    rows += [{"prompt": "another one", "completion": "x"}, {"prompt": "a third", "completion": "y"}]
    task, text = proposal(tmp_path / "a.jsonl", rows)
    assert task.split.near_duplicate == 1.0
    assert "as if" in text


def test_inputs_with_a_frame_get_the_plain_template(tmp_path: Path) -> None:
    rows = [{"question": f"### Question:\n{s}\n\n### Answer:", "answer": s} for s in sentences(250)]
    assert proposal(tmp_path / "a.jsonl", rows)[0].template == "plain"


def test_long_rows_may_be_left_out(tmp_path: Path) -> None:
    rows = [
        {"prompt": s * (300 if i == 3 else 1), "completion": s}
        for i, s in enumerate(sentences(250))
    ]
    task, text = proposal(tmp_path / "a.jsonl", rows)
    assert task.training.too_long == "drop"
    assert "# 1 rows may be longer than the 1,024 tokens the starter reads" in text
    assert "CAREFUL" not in text


def test_rows_that_are_nearly_all_too_long_need_another_base(tmp_path: Path) -> None:
    rows = [
        {"prompt": s * (1 if i < 9 else 300), "completion": s} for i, s in enumerate(sentences(100))
    ]
    task, text = proposal(tmp_path / "a.jsonl", rows)
    assert task.training.too_long == "refuse"
    base = text.partition("kind:")[2].partition("base:")[0]
    assert "# CAREFUL: 91 of 100 rows are longer than the 1,024 tokens the starter reads:" in base
    assert "name a base with a longer context here, and raise training.max_length" in base


def test_the_gain_that_can_be_found_is_found_in_four_of_five_runs(tmp_path: Path) -> None:
    """Against a simulation: arms that differ on a fifth of the inputs, a bound over the margin."""
    rows = [{"prompt": s, "completion": s[::-1]} for s in sentences(1000)]
    task, text = proposal(tmp_path / "a.jsonl", rows)
    found = re.search(r"About (\d+) different test inputs find a gain of (\d+) points", text)
    assert found
    count, gain = int(found[1]), int(found[2]) / 100
    draws = np.random.default_rng(0)
    chances = [(0.2 + gain) / 2, (0.2 - gain) / 2, 0.8]
    runs = draws.choice([1, -1, 0], p=chances, size=(4000, count))
    bounds = runs.mean(1) - 1.96 * runs.std(1, ddof=1) / math.sqrt(count)
    assert 0.75 < (bounds > task.margin).mean() < 0.9


def test_copies_of_an_input_add_no_power(tmp_path: Path) -> None:
    rows = [{"prompt": s, "completion": s[::-1]} for s in sentences(300)]
    about = re.compile(r"About \d+ different test inputs find a gain of \d+ points")
    once = about.search(proposal(tmp_path / "a.jsonl", rows)[1])
    often = about.search(proposal(tmp_path / "b.jsonl", rows * 5)[1])
    assert once
    assert often
    assert once[0] == often[0]


def test_a_task_that_cannot_be_run_says_why(tmp_path: Path) -> None:
    rows = [{"prompt": s, "completion": "ab"[i % 2]} for i, s in enumerate(sentences(12))]
    task, text = proposal(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="too few") as caught:
        read_parts(task, tmp_path)
    assert (
        f"# CAREFUL: this task cannot be run yet. {caught.value.place}: {caught.value.cause}."
        in text
    )
    rows = [{"prompt": s, "completion": "ab"[i % 2]} for i, s in enumerate(sentences(60))]
    task, text = proposal(tmp_path / "b.jsonl", rows)
    assert read_parts(task, tmp_path).test
    assert "cannot be run" not in text


def test_groups_and_official_parts_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "Support Desk"
    folder.mkdir()
    rows = [
        {"text": s, "label": "ab"[i % 2], "user_id": f"u{i // 5}"}
        for i, s in enumerate(sentences(300))
    ]
    write(folder / "test.jsonl", rows[:100])
    write(folder / "dev.jsonl", rows[100:150])
    task, text = proposal(folder / "train.jsonl", rows[150:])
    assert task.name == "support-desk"
    assert (task.data.train, task.data.validation, task.data.test) == (
        "train.jsonl", "dev.jsonl", "test.jsonl",
    )  # fmt: skip
    assert task.data.columns.group == "user_id"
    assert "alike, a verdict is as sure as groups are many, not rows: 30 here." in text
    assert "About 100 different test inputs find a gain" in text
    parts = read_parts(task, folder)
    assert len(parts.test) == 100


@pytest.mark.parametrize("test", ["no output", "an empty output"])
def test_a_part_without_outputs_is_not_used(tmp_path: Path, test: str) -> None:
    rows = [{"id": i, "text": s, "label": "ab"[i % 2]} for i, s in enumerate(sentences(300))]
    empty = {} if test == "no output" else {"label": ""}
    write(tmp_path / "test.jsonl", [{"id": i, "text": "x", **empty} for i in range(9)])
    task, text = proposal(tmp_path / "train.jsonl", rows)
    assert (task.data.file, task.data.test) == ("train.jsonl", None)
    assert task.data.columns.id == "id"
    assert "# test.jsonl beside it is not used as the test part: " in text
    assert read_parts(task, tmp_path).test


@pytest.mark.parametrize(("column", "name"), [("id", "id"), ("group", "user")])
def test_id_and_group_must_be_in_every_part(tmp_path: Path, column: str, name: str) -> None:
    unique = name == "id"
    rows: list[dict[str, Any]] = [
        {name: f"u{i if unique else i // 5}", "text": s, "label": "ab"[i % 2]}
        for i, s in enumerate(sentences(300))
    ]
    write(tmp_path / "test.jsonl", rows[:100])
    path = tmp_path / "train.jsonl"
    assert getattr(proposal(path, rows[100:])[0].data.columns, column) == name
    write(tmp_path / "test.jsonl", [{**row, name: ""} for row in rows[:100]])
    assert getattr(proposal(path, rows[100:])[0].data.columns, column) is None
    write(tmp_path / "test.jsonl", [{k: row[k] for k in ("text", "label")} for row in rows[:100]])
    task, _ = proposal(path, rows[100:])
    assert (task.data.test, getattr(task.data.columns, column)) == ("test.jsonl", None)
    assert len(read_parts(task, tmp_path).test) == 100


def test_one_empty_id_and_none_is_proposed(tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": s, "label": "ab"[i % 2]} for i, s in enumerate(sentences(300))]
    rows[7]["id"] = " "
    assert proposal(tmp_path / "a.jsonl", rows)[0].data.columns.id is None


def test_the_file_is_named_from_where_the_task_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": s, "completion": s[::-1]} for s in sentences(60)]
    (tmp_path / "data").mkdir()
    path = write(tmp_path / "data" / "rows.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    relative = Path("data/rows.jsonl")
    assert load(path, propose(relative)).data.file == "rows.jsonl"
    assert load(tmp_path / "x", propose(relative, Path())).data.file == "data/rows.jsonl"
    elsewhere = load(tmp_path / "x", propose(relative, tmp_path / "tasks"))
    assert elsewhere.data.file == str(path)


@settings(max_examples=40)
@example(name="\x85", pairs=[("a text", "a")])
@given(
    name=st.text(min_size=1, max_size=30).filter(lambda n: "/" not in n and "\0" not in n),
    pairs=st.lists(
        st.tuples(
            *[st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))] * 2
        ),
        min_size=1,
        max_size=8,
    ),
)
def test_any_readable_file_gives_a_task_that_loads(
    tmp_path_factory: pytest.TempPathFactory, name: str, pairs: list[tuple[str, str]]
) -> None:
    rows = [{"text": a, "label": b} for a, b in pairs if a.strip() and b.strip()]
    folder = tmp_path_factory.mktemp("any")
    try:
        path = folder / f"{name}.jsonl"
        path.write_bytes(b"")
    except (OSError, UnicodeEncodeError):
        return
    if rows:
        task, _ = proposal(path, rows)
        assert task.data.file == path.name


REAL = {
    "banking77/train.csv": ("classification", "text", "category", "exact"),
    "sroie/receipts.jsonl": ("extraction", "text", "fields", "fields"),
    "e2e_nlg/devset.csv": ("expansion", "mr", "ref", "rouge_l"),
    "dolly_part/dolly_flan_t5_xl.jsonl": ("expansion", "instruction", "text", "rouge_l"),
    "gsm8k/train.jsonl": ("expansion", "question", "answer", "regex:#### (.+)"),
    "llamafactory_demo/alpaca_en_demo.json": ("expansion", None, None, "rouge_l"),
}


@pytest.mark.parametrize("file", REAL)
def test_real_files_are_understood(data_dir: Path, tmp_path: Path, file: str) -> None:
    task = load(tmp_path / "x", propose(data_dir / file, tmp_path))
    columns = task.data.columns
    assert (task.kind, columns.input, columns.output, task.grader) == REAL[file]
    if task.kind == "classification":
        assert len(task.labels) == 77
    if file.startswith("sroie"):  # receipts in capitals take a token for every other sign
        assert task.training.too_long == "drop"
    examples = read_examples(str(data_dir / file), task.kind, tmp_path, task.data.format, columns)
    train = min(task.split.max_train or len(examples), round(0.7 * len(examples)))
    characters = sum(len(row.input) + len(row.answer) for row in examples) / len(examples)
    # The demo's speed on two cores: 5,300 tokens a second through ten passes with three seeds.
    assert 30 * train * characters / 2.5 / 5300 < 45 * 60


UNREADABLE = {
    "snips/train_AddToPlaylist.json": "not a JSON list",
    "bfcl/BFCL_v4_multiple.jsonl": "no column for the input",
    "lamini_docs/lamini_docs.jsonl.gz": "the output is empty in 1 of 1,400 rows",
    "codealpaca_2k/code_alpaca_2k.json": "the output is empty in 2 of 2,017 rows",
    "goemotions/train.tsv": "not like names of columns: '27'",
    "sst2/train.tsv": "not like names of columns",
}


@pytest.mark.parametrize("file", UNREADABLE)
def test_real_files_that_must_be_mended_first(data_dir: Path, file: str) -> None:
    with pytest.raises(DataError, match=UNREADABLE[file]):
        propose(data_dir / file)


@pytest.mark.parametrize(
    ("name", "source", "file", "rows"),
    [
        ("snips", "snips", "train.jsonl", 2100),
        ("bfcl", "bfcl", "bfcl.jsonl", 858),
        ("lamini_docs", "lamini_docs/lamini_docs.jsonl.gz", "lamini_docs.jsonl", 1394),
    ],
)
def test_prepared_sets_lead_to_a_split(
    data_dir: Path, tmp_path: Path, name: str, source: str, file: str, rows: int
) -> None:
    script = [sys.executable, str(ROOT / "examples" / "prepare.py"), name]
    subprocess.run(
        [*script, str(data_dir / source), str(tmp_path)], check=True, capture_output=True
    )
    path = tmp_path / file
    assert len(path.read_text("utf-8").splitlines()) == rows
    task = load(path, propose(path))
    assert task.kind == ("expansion" if name == "lamini_docs" else "extraction")
    parts = read_parts(task, tmp_path)
    assert len(parts.train) > 0.6 * rows
    if name == "snips":
        first = json.loads(path.read_text("utf-8").splitlines()[0])
        assert first["output"] == {
            "intent": "AddToPlaylist",
            "slots": {
                "entity_name": "Stani, stani Ibar vodo",
                "playlist_owner": "my",
                "playlist": "música libre",
            },
        }
        assert len(parts.test) == 700
    if name == "bfcl":
        assert json.loads(parts.train[0].answer).keys() == {"name", "arguments"}


def test_prepare_refuses_a_folder_without_the_set(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "examples" / "prepare.py"), "snips"]
    done = subprocess.run([*script, str(tmp_path), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "holds no files train_*.json" in done.stderr
    assert "Traceback" not in done.stderr
