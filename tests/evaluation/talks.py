"""Conversations whose last turn says nothing."""

from __future__ import annotations

from metier.records import Example, Message


def talk(text: str, answer: str, group: str = "") -> Example:
    """A conversation that begins with a text and ends with 'yes'."""
    messages: tuple[Message, ...] = (
        {"role": "system", "content": "system of the example"},
        {"role": "user", "content": text},
        {"role": "assistant", "content": "Shall I look?"},
        {"role": "user", "content": "yes"},
        {"role": "assistant", "content": answer},
    )
    return Example(text, messages, group)
