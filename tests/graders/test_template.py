from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.errors import DataError
from metier.graders.template import MissingField, check, fill


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("plain", "plain"),
        (
            "{{item.input}} {{ item.answer }}|{{sample.output_text}}",
            'why? {"a": {"b": [7, 8]}}|out',
        ),
        ("{{item.answer_json.a.b[1]}}", "8"),
        ("{{item.answer_json.a}}", '{"b": [7, 8]}'),
        ("{{item.messages[0].content}}", "why?"),
        ("{{item.id}}{{item.group}}{{item.source}}{{item.time}}", "a1gdata.jsonl:7"),
        ("{single} {{{item.id}}}", "{single} {a1}"),
    ],
)
def test_variables_are_filled(example, template, text):
    check(template)
    assert fill(template, "out", example('{"a": {"b": [7, 8]}}', "why?")) == text


@pytest.mark.parametrize(
    "template",
    ["{{item.reference}}", "{{item}}", "{{}}", "{{sample.choices}}", "{{item.__class__}}", "{{x}}"],
)
def test_unknown_variables_are_refused_with_those_there_are(template):
    with pytest.raises(ValueError, match=r"is no variable; known: item\.answer"):
        check(template)


@given(output=st.text(max_size=30))
def test_what_is_put_in_is_never_read_again(example, output):
    both = fill("{{sample.output_text}}{{item.id}}", output + "{{item.input}}", example("x"))
    assert both == output + "{{item.input}}a1"


@pytest.mark.parametrize("output", ["no json", "{}", "[1]", '{"a": 1}', "null"])
def test_a_field_the_output_lacks_is_reported_as_such(example, output):
    with pytest.raises(MissingField):
        fill("{{sample.output_json.a.b}}", output, example("x"))


def test_a_field_the_example_lacks_is_an_error_of_the_data(example):
    with pytest.raises(DataError, match=r"data.jsonl:7: has no value for"):
        fill("{{item.answer_json.a}}", "out", example("no json"))
