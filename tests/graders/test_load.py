from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from metier.errors import ConfigError
from metier.graders import load_grader


@pytest.mark.parametrize(
    ("kind", "answers", "name"),
    [
        ("classification", ["yes", "no"], "exact"),
        ("classification", ['{"a": 1}'], "exact"),
        ("extraction", ['{"a": 1}', "[1]"], "fields"),
        ("expansion", ['{"a": 1}'], "fields"),
        ("extraction", ['{"a": 1}', "plain"], "token_f1"),
        ("extraction", ["7", "8"], "token_f1"),
        ("extraction", [], "token_f1"),
        ("expansion", ["some words"], "rouge_l"),
    ],
)
def test_auto_chooses_by_kind_and_answers(kind, answers, name):
    assert load_grader("auto", kind, answers, Path()).name == name


@pytest.mark.parametrize(
    ("spec", "place", "remedy"),
    [
        ("exakt", "grader", "did you mean 'exact'?"),
        ("nothing like it", "grader", "there are auto, exact"),
        ("regex:", "grader", "there are"),
        ("python:file.py", "grader", "there are"),
        ({}, "grader: type", "there are exact"),
        ({"type": "sting_check"}, "grader: type", "did you mean 'string_check'?"),
        ({"type": ["exact"]}, "grader: type", "did you mean 'exact'"),
        (
            {"type": "exact", "ignorecase": True},
            "grader: ignorecase",
            "did you mean 'ignore_case'?",
        ),
        ({"type": "string_check"}, "grader: operation", "add it"),
        ({"type": "string_check", "operation": "eq", "input": "{{a}}"}, "grader: input", "change"),
    ],
)
def test_wrong_specs_name_place_and_remedy(spec, place, remedy):
    with pytest.raises(ConfigError) as caught:
        load_grader(spec, "expansion", ["x"], Path())
    assert caught.value.place == place
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("name", ["exact", "fields", "token_f1", "rouge_l", "chrf"])
def test_short_names_are_specs(example, name):
    grader = load_grader(name, "expansion", ['{"a": 1}'], Path())
    assert grader.name == name
    spec = grader.identity
    assert json.loads(json.dumps(spec)) == spec
    same = load_grader(spec, "expansion", ['{"a": 1}'], Path())
    assert same.grade("out", example('{"a": 1}')) == grader.grade("out", example('{"a": 1}'))


def test_loading_graders_imports_nothing_heavy():
    heavy = "{'torch', 'sklearn', 'scipy', 'numpy', 'sacrebleu', 'transformers'} & set(sys.modules)"
    code = f"import sys, metier.graders; sys.exit(str({heavy}) if {heavy} else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_specs_made_with_the_openai_client_load(example):
    graders = pytest.importorskip("openai.types.graders")
    texts = {"input": "{{sample.output_text}}", "reference": "{{item.answer}}"}
    check = graders.StringCheckGrader(name="c", type="string_check", operation="like", **texts)
    alike = graders.TextSimilarityGrader(
        name="t", type="text_similarity", evaluation_metric="rouge_l", **texts
    )
    both = graders.MultiGrader(name="m", type="multi", graders=check, calculate_output="c / 2")
    for made, value in ((check, 1), (alike, 2 / 3), (both, 0.5)):
        grader = load_grader(made.model_dump(exclude_none=True), "expansion", [], Path())
        assert grader.name == made.name
        assert grader.grade("the answer", example("answer")).value == pytest.approx(value)
