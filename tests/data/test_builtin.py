"""The built-in tasks: real, well-posed, the same every time."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from metier.data import builtin, docstrings
from metier.data.builtin import MODULES, NAMES, read, task_values, topics
from metier.data.docstrings import Contract, contract, description, mask, read_module
from metier.data.prepare import normalise
from metier.data.split import PARTS, Parts, read_parts
from metier.errors import DataError
from metier.records import Example
from metier.task import Task


@pytest.fixture(scope="module")
def stdlib() -> list[Example]:
    return read("stdlib")


@pytest.fixture(scope="module")
def extract() -> list[Example]:
    return read("extract")


def split_of(name: str, monkeypatch: pytest.MonkeyPatch, rows: list[Example]) -> Parts:
    """The task's own parts, without reading the sources again."""
    monkeypatch.setattr(builtin, "read", lambda _: rows)
    return read_parts(Task.parse(task_values(name), name), Path())


def test_stdlib_has_enough_rows_of_every_module(stdlib: list[Example]) -> None:
    counts = Counter(row.answer for row in stdlib)
    assert set(counts) == set(MODULES)
    assert len(MODULES) >= 30
    assert 2100 <= len(stdlib) <= 2600
    assert min(counts.values()) >= 20
    assert max(counts.values()) <= 150


def test_stdlib_masks_the_name_of_the_module(stdlib: list[Example]) -> None:
    for row in stdlib:
        assert not re.search(rf"\b{row.answer}\b", row.input, re.IGNORECASE)
    assert sum("___" in row.input for row in stdlib) > 50, "control: names do occur"


def test_stdlib_texts_are_prose_of_some_length_and_unambiguous(stdlib: list[Example]) -> None:
    texts = [normalise(row.input) for row in stdlib]
    assert len(set(texts)) == len(texts)
    assert all(5 <= len(text.split()) <= 60 for text in texts)
    assert not any(">>>" in text for text in texts)


def test_stdlib_labels_are_true(stdlib: list[Example]) -> None:
    """Importing and `inspect` say the same as the syntax tree."""
    rows = [row for row in stdlib if row.source.startswith(("statistics.", "shutil."))]
    assert len(rows) > 40
    for row in rows:
        module, _, name = row.source.partition(".")
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        document = inspect.getdoc(found) or ""
        words = [word for word in row.input.split() if word.isalpha()]
        assert module == row.answer
        assert sum(word in document for word in words) >= 0.9 * len(words)


@pytest.mark.parametrize("name", NAMES)
def test_builtin_task_is_whole_and_splits_without_loss(
    name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    rows: list[Example] = request.getfixturevalue(name)
    parts = split_of(name, monkeypatch, rows)
    assert not [reason for reason in parts.removed if not reason.startswith("over-max")]
    assert len(parts.train) <= 1500
    assert 200 <= len(parts.test) <= 400
    assert len({parts.clusters[row.id] for row in parts.test}) >= 100
    if name == "stdlib":
        for part in PARTS:
            assert {row.answer for row in getattr(parts, part)} == set(MODULES)


def test_ids_are_distinct_and_reading_is_repeatable(
    stdlib: list[Example], extract: list[Example]
) -> None:
    assert len({row.id for row in stdlib}) == len(stdlib)
    assert len({row.id for row in extract}) == len(extract)
    assert builtin.read("stdlib") == stdlib


def test_extract_answers_stand_in_the_input(extract: list[Example]) -> None:
    """The answer is derived again from the input alone: signature by `ast`, the rest from words."""
    assert len(extract) == 1200
    for row in extract:
        line, _, text = row.input.partition("\n")
        node = ast.parse(f"{line} pass").body[0]
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        truth = json.loads(row.answer)
        shown = contract(node)
        assert truth["parameters"] == list(shown.parameters)
        assert truth["defaults"] == shown.defaults
        assert all(name in text for name in truth["raises"])
        assert ("return" in text.lower()) or truth["returns"] != "value"


def test_extract_is_not_one_answer_for_all(extract: list[Example]) -> None:
    truths = [json.loads(row.answer) for row in extract]
    assert {truth["returns"] for truth in truths} == {"value", "none", "iterator"}
    assert sum(len(truth["parameters"]) > 1 for truth in truths) > 500
    assert sum(bool(truth["defaults"]) for truth in truths) > 300
    assert sum(bool(truth["raises"]) for truth in truths) > 50
    assert Counter(row.answer for row in extract).most_common(1)[0][1] < 40


def function(source: str) -> docstrings.Function:
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return node


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(): pass", Contract((), {}, "none", ())),
        ("def f(self, a, b=1): return a", Contract(("a", "b"), {"b": "1"}, "value", ())),
        (
            "def f(a, /, b, *c, d, e='x', **g): return None",
            Contract(("a", "b", "c", "d", "e", "g"), {"e": "'x'"}, "none", ()),
        ),
        (
            "def f(cls, a=None, b=[1]): yield",
            Contract(("a", "b"), {"a": "None", "b": "[1]"}, "iterator", ()),
        ),
        ("async def f(a: int = 2): return a", Contract(("a",), {"a": "2"}, "value", ())),
        (
            "def f(a):\n if a: raise ValueError('x')\n raise os.OSFault\n",
            Contract(("a",), {}, "none", ("ValueError", "OSFault")),
        ),
        (
            "def f(a):\n try: g()\n except E as e: raise e\n finally: raise\n",
            Contract(("a",), {}, "none", ()),
        ),
        (
            "def f(a):\n def g(): raise E\n lambda: (yield)\n class C:\n  def h(self): return 1\n",
            Contract(("a",), {}, "none", ()),
        ),
    ],
)
def test_contract_is_read_from_code(source: str, expected: Contract) -> None:
    assert contract(function(source)) == expected


def test_contract_agrees_with_inspect() -> None:
    """`inspect.signature` on live functions as an independent witness of names and defaults."""
    import shutil
    import textwrap

    checked = 0
    for item in [*read_module("shutil"), *read_module("textwrap")]:
        live = getattr({"shutil": shutil, "textwrap": textwrap}[item.module], item.name, None)
        if not inspect.isfunction(live) or not isinstance(item.node, ast.FunctionDef):
            continue
        signature = inspect.signature(live)
        found = contract(item.node)
        assert list(found.parameters) == list(signature.parameters)
        optional = [p.name for p in signature.parameters.values() if p.default is not p.empty]
        assert set(found.defaults) == set(optional)
        checked += 1
    assert checked >= 15


@pytest.mark.parametrize(
    ("docstring", "words", "expected"),
    [
        ("f(x, y=1) -> z\n\nAdds things.\n  More.", 60, "Adds things. More."),
        ("Adds.\n\n>>> f(1)\n2\n\nAfter.\n\n    >>> f(2)\n    3", 60, "Adds. After."),
        ("One two three. Four five six seven.", 5, "One two three."),
        ("One, e.g. two three four five six.", 4, "One, e.g. two three"),
        ("x" * 9, 60, "xxxxxxxxx"),
    ],
)
def test_description_is_the_prose(docstring: str, words: int, expected: str) -> None:
    assert description(docstring, words) == expected


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("An Email, emails and email.message.Message", ("email",), "An ___, ___ and ___"),
        ("SSL_version of ssl", ("ssl",), "____version of ___"),
        ("emailing is not masked", ("email",), "emailing is not masked"),
        ("the _pydecimal twin of decimal", ("decimal", "_pydecimal"), "the ___ twin of ___"),
        ("See os.path.join. Then go.", ("os",), "See ___. Then go."),
    ],
)
def test_mask_hides_names_and_nothing_else(
    text: str, names: tuple[str, ...], expected: str
) -> None:
    assert mask(text, names) == expected


def test_reading_imports_no_module_it_describes() -> None:
    before = set(sys.modules)
    assert sum(1 for _ in read_module("imaplib")) > 20
    assert sum(1 for _ in read_module("mailbox")) > 20
    assert not {"imaplib", "mailbox"} & (set(sys.modules) - before)


def test_private_names_and_tests_are_left_out() -> None:
    names = [f"{item.module}.{item.name}" for item in read_module("unittest")]
    assert names
    assert not any(part.startswith("_") for name in names for part in name.split("."))
    assert not any(".test." in name for name in names)
    every = [item.name for item in read_module("shutil", private=True)]
    assert any(name.startswith("_") for name in every), "control"


def test_python_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "_library", lambda: tmp_path)
    with pytest.raises(DataError, match="standard library's source cannot be read"):
        read("stdlib")


def test_topics_are_long_general_text() -> None:
    texts = topics()
    assert len(texts) > 60
    assert sum(map(len, texts)) > 300_000


@pytest.mark.parametrize("name", NAMES)
def test_task_values_are_a_valid_task(name: str) -> None:
    task = Task.parse(task_values(name), name)
    assert task.instruction
    assert task.good
    assert task.better
    assert task.bad
    assert task.split.max_train == 1500
    assert task.split.max_test == 400
