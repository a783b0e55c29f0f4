"""The audit: counts that a person can check by hand."""

from __future__ import annotations

import dataclasses
import statistics

import pytest

from metier.data.audit import audit, has_card, has_phone
from metier.data.split import Parts
from metier.records import Example, Message


def example(name: str, text: str, answer: str) -> Example:
    return Example(
        name, ({"role": "user", "content": text}, {"role": "assistant", "content": answer}), text
    )


ROWS = (
    example("1", "where is my parcel with the red shoes", "delivery"),
    example("2", "where is my parcel with the red shoes", "delivery"),
    example("3", "where is my parcel with the red shoes?", "refund"),
    example("4", "Where is my parcel  with the red shoes", "refund"),
    example("5", "please call +44 20 7946 0958 now", "call"),
    example("6", "write to jo.doe+x@mail.example.org or to no one", "delivery"),
    example("7", "card 4111 1111 1111 1111 was declined", "N/A"),
)
PARTS = Parts(ROWS[:4], ROWS[4:6], ROWS[6:], {}, {"train-duplicate-of-test": 3}, ("look",))


def test_counts_can_be_checked_by_hand() -> None:
    found = audit(PARTS, "classification", 0.8)
    assert found.rows == 7
    assert found.parts == {"train": 4, "validation": 2, "test": 1}
    assert found.labels == {"delivery": 3, "refund": 2, "call": 1, "N/A": 1}
    assert found.imbalance == 3.0
    assert (found.identical.rows, found.identical.examples) == (1, ("2",))
    assert found.conflicting.examples == ("1", "2", "4")
    assert found.near_duplicates.examples == ("1", "2", "3", "4")
    assert found.empty_answers.examples == ("7",)
    assert found.emails.examples == ("6",)
    assert found.phones.examples == ("5",)
    assert found.cards.examples == ("7",)
    assert found.removed == {"train-duplicate-of-test": 3}
    assert found.warnings == ("look",)


def test_findings_say_where_a_row_stands() -> None:
    row = dataclasses.replace(ROWS[4], source="/some/where/rows.csv:7")
    found = audit(Parts((row,), (), (), {}, {}, ()), "expansion", 0.8)
    assert found.phones.examples == ("rows.csv:7",)


def test_lengths_are_percentiles() -> None:
    rows = tuple(example(str(n), "word " * n, "x" * n) for n in range(1, 101))
    found = audit(Parts(rows, (), (), {}, {}, ()), "expansion", 0.8)
    lengths = list(range(1, 101))
    assert found.input_words.p50 == statistics.median_low(lengths)
    assert found.input_words.p95 == 95
    assert found.input_words.max == 100
    assert found.answer_characters.max == 100
    assert found.labels == {}
    assert found.imbalance is None


def test_an_input_is_all_turns_of_a_chat() -> None:
    turns = (("user", "one two"), ("assistant", "three"), ("user", "four"), ("assistant", "five"))
    chat = tuple(Message(role=role, content=text) for role, text in turns)
    found = audit(Parts((Example("1", chat),), (), (), {}, {}, ()), "expansion", 0.8)
    assert found.input_words.max == 4
    assert found.input_characters.max == len("one two three four") == found.input_characters.p50
    assert found.answer_words.max == 1


@pytest.mark.parametrize(
    ("text", "phone"),
    [
        ("+49 30 901820", True),
        ("(020) 7946 0958", True),
        ("call 555-123-4567.", True),
        ("on 2018-10-12", False),
        ("at 20:49:59", False),
        ("barcode 9556939040116", False),
        ("9.99 and 10.00 20.00", False),
        ("room 12 and 13", False),
    ],
)
def test_phone_numbers(text: str, phone: bool) -> None:
    assert has_phone(text) is phone


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("4111111111111111", True),
        ("5500-0000-0000-0004", True),
        ("3400 000000 00009", True),
        ("4111111111111112", False),
        ("1234567812345670", False),
        ("x4111111111111111", False),
    ],
)
def test_card_numbers_pass_luhn(text: str, card: bool) -> None:
    assert has_card(text) is card
