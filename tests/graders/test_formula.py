from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.graders.formula import Formula


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a", 0.25),
        ("0.5 * a + 0.5*b", 0.5),
        ("(a + b) / 2", 0.5),
        ("b ^ 2", 0.5625),
        ("2 ** -1", 0.5),
        ("min(a, b, 1)", 0.25),
        ("max(a, b)", 0.75),
        ("-a + +b - abs(a - b)", 0.0),
        ("floor(b) + ceil(a)", 1.0),
        ("sqrt(a)", 0.5),
        ("log(exp(a))", 0.25),
    ],
)
def test_arithmetic(text, value):
    assert Formula(text, ["a", "b"])({"a": 0.25, "b": 0.75}) == pytest.approx(value)


@pytest.mark.parametrize("text", ["a / (b - b)", "log(a - 1)", "exp(10 ^ 9)", "sqrt(0 - 1)"])
def test_no_value_is_nan(text):
    assert math.isnan(Formula(text, ["a", "b"])({"a": 0.5, "b": 0.5}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a +",
        "c",
        "a.real",
        "a if b else a",
        "__import__('os')",
        "(lambda: 1)()",
        "[a]",
        "'a'",
        "True",
        "min(a, key=b)",
        "pow(a, b)",
        "sqrt(a, b)",
        "a < b",
        "a; b",
        "a = 1",
        "(" * 150 + "a" + ")" * 150,
        "a+" * 150 + "a",
        "a\0",
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match=r"cannot be read|is not offered|is longer|null"):
        Formula(text, ["a", "b"])


@given(st.text(alphabet="ab+-*/^()., 0123456789min", max_size=30))
def test_any_text_is_refused_or_computes_a_number(text):
    try:
        formula = Formula(text, ["a", "b"])
    except ValueError:
        return
    assert isinstance(formula({"a": 0.5, "b": 1.0}), float)
