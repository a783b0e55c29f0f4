from __future__ import annotations

from pathlib import Path

import pytest

from metier.errors import ConfigError
from metier.graders import load_grader

NAME = {"type": "string_check", "input": "{{sample.output_json.n}}", "operation": "eq"}
TEXT = {"type": "text_similarity", "evaluation_metric": "token_f1"}


def multi(formula: str, **graders):
    return load_grader(
        {"type": "multi", "name": "both", "graders": graders, "calculate_output": formula},
        "extraction",
        [],
        Path(),
    )


def test_the_formula_joins_the_values_and_keeps_them_as_parts(example):
    grader = multi("0.8 * name + 0.2 * text", name={**NAME, "reference": "x"}, text=TEXT)
    score = grader.grade('{"n": "x"}', example("n x y z"))
    assert score.parts == {"name": 1.0, "text": pytest.approx(2 * 2 / 6)}
    assert score.value == pytest.approx(0.8 + 0.2 * 2 / 3)
    assert "name: 1" in score.explanation
    assert "text: 0.666667" in score.explanation


def test_a_single_grader_is_allowed_as_in_the_schema(example):
    spec = {"type": "multi", "name": "m", "graders": {**TEXT, "name": "t"}, "calculate_output": "t"}
    assert load_grader(spec, "expansion", [], Path()).grade("a b", example("a b")).value == 1


def test_a_value_outside_0_to_1_is_an_error_that_names_the_row(example):
    grader = multi("2 * text", text=TEXT)
    assert grader.grade("none", example("word")).value == 0
    with pytest.raises(ConfigError, match="gives 2 for text = 1") as caught:
        grader.grade("word", example("word"))
    assert "data.jsonl:7" in caught.value.place


def test_no_value_is_an_error_too(example):
    with pytest.raises(ConfigError, match="gives nan"):
        multi("text / (1 - text)", text=TEXT).grade("word", example("word"))


@pytest.mark.parametrize(
    ("formula", "graders", "place"),
    [
        ("a + c", {"a": TEXT, "b": TEXT}, "grader.calculate_output"),
        ("a", {"a": {"type": "text_similarity"}}, "grader.graders.a: evaluation_metric"),
        ("a", {"a": {"type": "multi", "graders": {}}}, "grader.graders.a"),
        ("a", {}, "grader: graders"),
        ("a", {"a": {"type": "json_field"}}, "grader.graders.a: type"),
    ],
)
def test_errors_name_the_field(formula, graders, place):
    with pytest.raises(ConfigError) as caught:
        multi(formula, **graders)
    assert caught.value.place == place


def test_its_identity_holds_that_of_its_graders():
    same = multi("a", a=TEXT).identity
    assert same == multi("a", a=TEXT).identity
    assert same != multi("a", a={**TEXT, "evaluation_metric": "chrf"}).identity
