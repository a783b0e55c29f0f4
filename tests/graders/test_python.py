from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from metier.errors import ConfigError
from metier.graders import load_grader


@pytest.fixture
def load(tmp_path: Path):
    def make(code: str, function: str = "grade"):
        (tmp_path / "mine.py").write_text(code, encoding="utf-8")
        return load_grader(f"python:mine.py:{function}", "expansion", ["x"], tmp_path)

    return make


@pytest.mark.parametrize(
    ("returns", "value"),
    [
        ("True", 1),
        ("False", 0),
        ("0.25", 0.25),
        ("1", 1),
        ("np.float32(0.5)", 0.5),
        ("np.bool_(1)", 1),
    ],
)
def test_numbers_and_truth_values_are_scores(load, example, returns, value):
    grader = load(f"import numpy as np\ndef grade(output, example):\n    return {returns}\n")
    score = grader.grade("out", example("x"))
    assert (score.value, score.answer) == (value, "out")
    assert np.isfinite(score.value)
    assert "mine.py:grade gave" in score.explanation
    assert (grader.name, grader.binary) == ("grade", False)


def test_a_dict_gives_every_field_of_a_score(load, example):
    grader = load(
        "def grade(output, example):\n"
        "    return {'value': output == example['answer'], 'answer': output.upper(),\n"
        "            'explanation': example['input'] + example['id'], 'parts': {'length': 3}}\n"
    )
    score = grader.grade("out", example("out", "why?"))
    assert (score.value, score.answer, score.explanation) == (1, "OUT", "why?a1")
    assert score.parts == {"length": 3.0}


def test_the_function_sees_a_copy_of_the_example(load, example):
    grader = load(
        "def grade(output, example):\n"
        "    example['messages'][0]['content'] = 'changed'\n"
        "    return sorted(example) == ['answer', 'group', 'id', 'input', 'messages', 'source',"
        " 'time']\n"
    )
    row = example("x")
    assert grader.grade("out", row).value == 1
    assert row.input == "question"


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ("return float('nan')", "nan, which is no number"),
        ("return float('inf')", "inf, which is no number"),
        ("return 1.01", "1.01, which is not from 0 to 1"),
        ("return -1", "-1.0, which is not from 0 to 1"),
        ("return None", "None, which is no number"),
        ("return 'good'", "'good', which is no number"),
        ("return {'score': 1}", "the unknown key 'score'"),
        ("return {'explanation': 'no value'}", "None, which is no number"),
        ("return {'value': 1, 'parts': {'p': 'x'}}", "'x', which is no number"),
        ("return {'value': 1, 'parts': [1]}", "'parts' that are no dict"),
        ("raise KeyError('total')", "raised KeyError: 'total' (line 2)"),
        ("raise SystemExit(3)", "raised SystemExit: 3 (line 2)"),
        ("import json; json.loads('x')", "raised JSONDecodeError"),
    ],
)
def test_what_is_no_score_is_an_error_that_names_function_and_row(load, example, body, cause):
    grader = load(f"def grade(output, example):\n    {body}\n")
    with pytest.raises(ConfigError) as caught:
        grader.grade("out", example("x"))
    assert caught.value.place == "grader mine.py:grade, data.jsonl:7"
    assert cause in caught.value.cause
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("code", "function", "cause"),
    [
        ("def other(): pass", "grade", "has no function 'grade'"),
        ("grade = 3", "grade", "has no function 'grade'"),
        ("def grade(:", "grade", "cannot be imported: SyntaxError"),
        ("import no_such_module_at_all", "grade", "cannot be imported: ModuleNotFoundError"),
        ("raise SystemExit", "grade", "cannot be imported: SystemExit"),
        ("def grade(o, e): return 1", "not a name", "should match pattern"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(load, code, function, cause):
    with pytest.raises(ConfigError, match=cause):
        load(code, function)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.py: cannot be read"):
        load_grader("python:nowhere.py:grade", "expansion", [], tmp_path)
    (tmp_path / "notes.txt").write_text("def grade(o, e): return 1")
    with pytest.raises(ConfigError, match="is not a Python file"):
        load_grader("python:notes.txt:grade", "expansion", [], tmp_path)


def test_source_code_in_a_spec_is_never_run(tmp_path):
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').close()\ndef grade(sample, item): return 1\n"
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    spec = {"type": "python", "name": "g", "source": code}
    for more in ({}, {"path": "mine.py"}):
        with pytest.raises(ConfigError, match="is not run"):
            load_grader(spec | more, "expansion", [], tmp_path)
    assert not canary.exists()
    load_grader({"type": "python", "path": "mine.py"}, "expansion", [], tmp_path)
    assert canary.exists(), "control: the file of a task.yaml does run"


def test_a_file_may_define_dataclasses_with_late_annotations(load, example):
    grader = load(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Found:\n"
        "    value: float\n"
        "def grade(output, example):\n"
        "    return Found(0.5).value\n"
    )
    assert grader.grade("out", example("x")).value == 0.5


def test_files_of_one_name_do_not_meet(tmp_path, example):
    graders = []
    for name, value in (("a", 0.25), ("b", 0.75)):
        (tmp_path / name).mkdir()
        code = f"import sys\nVALUE = {value}\n"
        code += "def grade(o, e):\n    return sys.modules[__name__].VALUE\n"
        (tmp_path / name / "mine.py").write_text(code)
        graders.append(load_grader("python:mine.py:grade", "expansion", [], tmp_path / name))
    assert [grader.grade("out", example("x")).value for grader in graders] == [0.25, 0.75]


def test_a_file_that_cannot_be_imported_leaves_no_module(load):
    before = set(sys.modules)
    with pytest.raises(ConfigError, match="no_such_module_at_all") as caught:
        load("import no_such_module_at_all")
    assert set(sys.modules) == before
    assert "no file beside it" in caught.value.remedy


def test_its_identity_changes_with_the_code(load):
    first = load("def grade(o, e): return 1\n").identity
    assert first == load("def grade(o, e): return 1\n").identity
    assert first != load("def grade(o, e): return 0\n").identity
