from __future__ import annotations

import json
from pathlib import Path

import pytest

from metier.errors import ConfigError
from metier.graders import load_grader


@pytest.mark.parametrize(
    ("output", "expected", "value"),
    [
        ("card arrival", "card arrival", 1),
        ("  card \n arrival\t", "card arrival", 1),
        ("Card Arrival", "card arrival", 0),
        ("caf\u0065\u0301", "caf\u00e9", 1),
        ("", "card arrival", 0),
        ("card arrival.", "card arrival", 0),
    ],
)
def test_exact_ignores_white_space_and_composition_but_nothing_else(
    example, output, expected, value
):
    score = load_grader("exact", "extraction", [expected], Path()).grade(output, example(expected))
    assert score.value == value
    assert expected in score.explanation


def test_exact_ignores_case_of_labels_unless_two_labels_differ_only_there(example):
    folding = load_grader("exact", "classification", ["Card", "cash"], Path())
    assert folding.grade("CARD", example("Card")).value == 1
    strict = load_grader("exact", "classification", ["us", "US"], Path())
    assert strict.grade("US", example("us")).value == 0


@pytest.mark.parametrize(
    ("operation", "output", "value"),
    [
        ("eq", "Paris", 1),
        ("eq", "paris", 0),
        ("eq", "Paris ", 0),
        ("ne", "Paris", 0),
        ("ne", "Rome", 1),
        ("like", "It is Paris.", 1),
        ("like", "It is paris.", 0),
        ("ilike", "It is PARIS.", 1),
        ("ilike", "It is Rome.", 0),
    ],
)
def test_string_check_has_openai_operations(example, operation, output, value):
    spec = {
        "type": "string_check",
        "name": "capital",
        "input": "{{sample.output_text}}",
        "reference": "{{ item.answer }}",
        "operation": operation,
    }
    grader = load_grader(spec, "expansion", [], Path())
    assert (grader.name, grader.binary) == ("capital", True)
    assert grader.grade(output, example("Paris")).value == value


def test_string_check_says_what_is_the_case_whatever_the_operation(example):
    spec = {"type": "string_check", "operation": "ne"}
    score = load_grader(spec, "expansion", [], Path()).grade("Paris", example("Paris"))
    assert score.value == 0
    assert score.explanation == "'Paris' equals 'Paris'"


def test_string_check_reads_fields_of_json_output(example):
    spec = {
        "type": "string_check",
        "input": "{{sample.output_json.city}}",
        "reference": "{{item.answer_json.place.city}}",
        "operation": "eq",
    }
    grader = load_grader(spec, "extraction", [], Path())
    row = example('{"place": {"city": "Leeds"}}')
    assert grader.grade('{"city": "Leeds"}', row).value == 1
    missing = grader.grade('{"town": "Leeds"}', row)
    assert missing.value == 0
    assert "no field city" in missing.explanation
    assert grader.grade("Leeds", row).value == 0


def test_regex_without_group_asks_only_for_the_pattern(example):
    grader = load_grader(r"regex:^\d{4}-\d\d$", "extraction", ["any"], Path())
    assert grader.grade("2024-05", example("any")).value == 1
    assert grader.grade("in 2024-05", example("any")).value == 0


def test_regex_group_compares_final_results(example):
    grader = load_grader(r"regex:#### *(.+)", "expansion", [], Path())
    gold = example("2 + 2 is 4\n#### 4")
    assert grader.grade("two and two make four #### 4 ", gold).value == 1
    assert grader.grade("#### 5", gold).value == 0
    assert grader.grade("4", gold).value == 0
    assert grader.grade("#### 4", example("4")).value == 1, "the whole answer is the result"


@pytest.mark.parametrize("pattern", ["(", "a{2,1}", "*", "(?P<n>a)(?P<n>b)"])
def test_a_broken_pattern_is_refused(pattern):
    with pytest.raises(ConfigError, match="is not a regular expression"):
        load_grader({"type": "regex", "pattern": pattern}, "expansion", [], Path())


def test_real_word_problems_are_graded_by_their_result(example, data_dir):
    grader = load_grader(r"regex:#### *(.+)", "expansion", [], Path())
    file = next((data_dir / "gsm8k").glob("*.jsonl"))
    with file.open(encoding="utf-8") as lines:
        answers = [json.loads(line)["answer"] for line, _ in zip(lines, range(200), strict=False)]
    for answer in answers:
        result = answer.split("####")[1].strip()
        assert grader.grade(f"So it is\n#### {result}", example(answer)).value == 1
        assert grader.grade(f"#### {result}0", example(answer)).value == 0
        assert grader.grade(result, example(answer)).value == 0
