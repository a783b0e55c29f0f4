from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.evaluation.wording import BARE, Phrasing, Wording, default_instruction, phrasings
from metier.records import Message
from metier.task import Data, Kind, Task

KINDS: tuple[Kind, ...] = ("classification", "extraction", "expansion")


def _task(kind: Kind, **fields: str) -> Task:
    return Task(name="t", kind=kind, data=Data(file="d.jsonl"), **fields)


def test_the_users_own_instruction_wins() -> None:
    task = _task("classification", instruction="Route it.", good="short", bad="long")
    assert default_instruction(task, ["a"]) == "Route it."


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_an_instruction_with_the_users_words_on_good_and_bad(kind: Kind) -> None:
    plain = default_instruction(_task(kind), ["a"])
    told = default_instruction(_task(kind, good="is short", bad="is rude"), ["a"])
    assert told.startswith(plain)
    assert "is short" in told
    assert "is rude" in told


def test_json_answers_name_their_keys() -> None:
    answers = ['{"total": 1, "date": "x"}', '{"company": "y", "date": null}']
    assert "total, date, company" in default_instruction(_task("extraction"), answers)


def test_more_keys_than_an_instruction_can_name_are_not_named() -> None:
    many = {f"key{n}": 1 for n in range(20)}
    assert "key19" in default_instruction(_task("extraction"), [json.dumps(many)])
    told = default_instruction(_task("extraction"), [json.dumps(many), '{"one more": 1}'])
    assert "key" not in told


@pytest.mark.parametrize("odd", ["[1]", "no JSON", "1"])
def test_answers_that_are_no_json_objects_name_no_keys(odd: str) -> None:
    told = default_instruction(_task("extraction"), ['{"total": 1}', odd])
    assert "total" not in told


def test_only_the_first_user_message_carries_the_task() -> None:
    chat: list[Message] = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
    ]
    worded = Wording(Phrasing("p", "{task} :: {input}", "next {input}"), "do", ("a", "b"))(chat)
    assert [message["content"] for message in worded] == [
        "be kind",
        "do\nLabels: a, b :: one",
        "1",
        "next two",
    ]
    assert chat[1]["content"] == "one"


def test_bare_wording_changes_nothing() -> None:
    chat: list[Message] = [{"role": "user", "content": "one {task} {0}"}]
    assert Wording(BARE)(chat) == chat


@given(st.text(), st.text(), st.sampled_from([p for kind in KINDS for p in phrasings(kind)]))
def test_any_input_stands_in_the_request_word_for_word(
    text: str, instruction: str, phrasing: Phrasing
) -> None:
    (message,) = Wording(phrasing, instruction)([{"role": "user", "content": text}])
    assert text in (message["content"] or "")
    assert phrasing is BARE or instruction in (message["content"] or "")


def test_phrasings_differ_in_name_and_text() -> None:
    for kind in KINDS:
        chosen = phrasings(kind)
        assert len({p.name for p in chosen}) == len({p.first for p in chosen}) == len(chosen) >= 3
