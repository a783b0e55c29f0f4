from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.records import Message, input_text, last_user_text, transcript

CONVERSATION: list[Message] = [
    {"role": "developer", "content": "same for all"},
    {"role": "user", "content": "my card is lost"},
    {"role": "assistant", "content": None},
    {"role": "tool", "content": "card 4711"},
    {"role": "user", "content": "yes"},
]


def test_an_input_is_the_text_of_all_turns_but_the_instruction() -> None:
    assert input_text(CONVERSATION) == "my card is lost\n\ncard 4711\nyes"
    assert input_text([]) == ""


def test_readers_are_told_who_said_what() -> None:
    shown = "user: my card is lost\nassistant: \ntool: card 4711\nuser: yes"
    assert transcript(CONVERSATION) == shown


@pytest.mark.parametrize("role", ["", "system", "developer"])
@given(text=st.text())
def test_one_message_is_its_text_whatever_the_instruction(role: str, text: str) -> None:
    instruction: list[Message] = [{"role": role, "content": "same for all"}] if role else []
    chat: list[Message] = [*instruction, {"role": "user", "content": text}]
    assert input_text(chat) == transcript(chat) == last_user_text(chat) == text
