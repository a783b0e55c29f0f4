"""How numbers are written."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.evaluation import units

SCALES = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "MB": 1e6, "GB": 1e9}


def plainly(text: str) -> str:
    return text.replace("\u00a0", " ").replace("\u2212", "-")


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (units.percent, 0.8734, "87.3 %"),
        (units.percent, 0.0, "0.0 %"),
        (units.percent, 1.0, "100.0 %"),
        (units.percent, 0.99996, "> 99.9 %"),
        (units.percent, 0.00004, "< 0.1 %"),
        (units.percent, -0.012, "-1.2 %"),
        (units.percent, math.nan, "–"),
        (units.percent, None, "–"),
        (units.points, 0.0321, "+3.2"),
        (units.points, -0.0321, "-3.2"),
        (units.points, 0.0, "0.0"),
        (units.points, -0.0001, "0.0"),
        (units.points, math.inf, "–"),
        (units.plain, 0.7312, "0.731"),
        (units.plain, 0.00012345, "0.000123"),
        (units.plain, 12.0, "12"),
        (units.plain, 1234.5, "1,234"),
        (units.plain, -0.5, "-0.500"),
        (units.plain, 0.0, "0"),
        (units.decimal, 1.8344, "1.834"),
        (units.count, 12400, "12,400"),
        (units.tokens, 12.44, "12.4"),
        (units.tokens, 0.0, "0"),
        (units.seconds, 0.0, "0 s"),
        (units.seconds, 0.00213, "2.13 ms"),
        (units.seconds, 0.34, "340 ms"),
        (units.seconds, 0.99972, "1.00 s"),
        (units.seconds, 1.424, "1.42 s"),
        (units.seconds, 59.97, "1 min"),
        (units.seconds, 125.2, "2 min 5 s"),
        (units.seconds, 4320, "1 h 12 min"),
        (units.seconds, 3599.9, "1 h"),
        (units.size, 640_000_000, "640 MB"),
        (units.size, 1_234_000_000, "1.23 GB"),
        (units.size, 999_900_000, "1.00 GB"),
        (units.size, 0, "–"),
        (units.probability, 0.0123, "0.012"),
        (units.probability, 0.5, "0.50"),
        (units.probability, 1.0, "1.00"),
        (units.probability, 0.998, "> 0.99"),
        (units.probability, 0.00023, "0.00023"),
        (units.probability, 0.0, "< 0.0001"),
        (units.probability, None, "–"),
    ],
)
def test_numbers_are_written_for_people(write, value, text):
    assert plainly(write(value)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "EUR 0.00"), (0.0123, "EUR 0.0123"), (3.5, "EUR 3.50"), (1234.5, "EUR 1,234.50")],
)
def test_prices(value, text):
    assert plainly(units.money(value, "EUR")) == text


@given(st.floats(1e-4, 1e6))
def test_a_duration_read_back_is_within_its_last_digit(value):
    parts = re.findall(r"([\d.,]+) (ms|s|min|h)", plainly(units.seconds(value)))
    read = sum(float(number.replace(",", "")) * SCALES[unit] for number, unit in parts)
    last_unit = 60 if value > 3599 else 1
    assert read == pytest.approx(value, rel=0.006, abs=0.0 if value < 59 else last_unit)


@given(st.floats(1e5, 1e12))
def test_a_size_read_back_is_within_its_last_digit(value):
    number, unit = plainly(units.size(value)).split()
    assert float(number.replace(",", "")) * SCALES[unit] == pytest.approx(value, rel=0.006)


@given(st.floats(0, 1))
def test_percent_never_claims_all_or_nothing_wrongly(value):
    text = plainly(units.percent(value))
    assert (text == "100.0 %") == (value == 1)
    assert (text == "0.0 %") == (value == 0)
    if text[0].isdigit():
        assert float(text.removesuffix(" %")) == pytest.approx(value * 100, abs=0.0501)


@given(st.floats(1e-9, 1))
def test_a_p_value_is_never_written_as_zero_or_as_one(value):
    text = plainly(units.probability(value))
    assert text not in ("0", "0.00")
    assert (text == "1.00") == (value == 1)
