"""The nouns that every stage shares: Example, Completion, Score, and the Generator protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict


class Message(TypedDict, total=False):
    """One message of a chat, as in the OpenAI API.

    ``weight`` 0 keeps an assistant message out of the loss (OpenAI's convention).
    """

    role: str
    content: str | None
    name: str
    weight: int
    tool_calls: list[dict[str, Any]]
    tool_call_id: str


Chat = Sequence[Message]


@dataclass(frozen=True, slots=True)
class Example:
    """One input with its expected output.

    Attributes:
        id: stable name of the row: the user's own, else a hash of its content.
        messages: the chat; the last message is the assistant's, the expected output.
        group: rows of one group never stand in two parts of a split.
        source: where it was read, ``file:line``.
        time: ISO 8601 time of the row, or empty.
        tools: tool schemas offered to the model, OpenAI form.

    """

    id: str
    messages: tuple[Message, ...]
    group: str = ""
    source: str = ""
    time: str = ""
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the expected output."""
        return self.messages[:-1]

    @property
    def input(self) -> str:
        """The text of the last user message; `input_text` is that of all turns."""
        return last_user_text(self.prompt)

    @property
    def answer(self) -> str:
        """The expected output as text."""
        return self.messages[-1].get("content") or ""

    @property
    def place(self) -> str:
        """How messages name it: where it was read, or else its id."""
        return self.source or f"example {self.id}"


def last_user_text(chat: Chat) -> str:
    """Text of the last user message of a chat, or an empty string."""
    for message in reversed(chat):
        if message.get("role") == "user":
            return message.get("content") or ""
    return ""


def input_text(chat: Chat) -> str:
    """What an input says: all user, assistant and tool text, a message below the other.

    Classical models and retrieval read it, and duplicates are found by it, so that no arm is
    given less of a conversation than another. Of one message it is that message's text.
    """
    return "\n".join(message.get("content") or "" for message in _turns(chat))


def transcript(chat: Chat) -> str:
    """`input_text` for readers: with several messages, each after its role."""
    turns = _turns(chat)
    if len(turns) < 2:
        return input_text(turns)
    return "\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in turns)


def _turns(chat: Chat) -> list[Message]:
    """Instructions stand outside the conversation, and are the same for many inputs."""
    return [message for message in chat if message.get("role") not in ("system", "developer")]


@dataclass(frozen=True, slots=True)
class Completion:
    """What an arm answered to one prompt.

    Attributes:
        text: the answer.
        prompt_tokens: tokens read (0 for arms without a language model).
        completion_tokens: tokens written.
        finished: False when the answer was cut at the length limit, or the request refused.
        probability: the arm's own probability of its answer, where it has one.
        uncalibrated: the same before it was calibrated, where it was.
        probabilities: of every label, where an answer may name several.
        refused: the request is longer than the model's context: nothing was read or written.

    """

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finished: bool = True
    probability: float | None = None
    uncalibrated: float | None = None
    probabilities: dict[str, float] = field(default_factory=dict)
    refused: bool = False


class Generator(Protocol):
    """One way of answering a task: an arm.

    ``generate`` takes the chats of several requests, each ending with a user message and
    without the expected output, and answers them in the same order.
    """

    def generate(self, chats: Sequence[Chat]) -> list[Completion]:
        """Answer each chat."""
        ...


@dataclass(frozen=True, slots=True)
class Score:
    """The value of one answer under one grader.

    Attributes:
        value: between 0 (worst) and 1 (best).
        answer: the part of the output that was graded.
        explanation: why this value, in words a person can check.
        parts: named values beside it, such as precision and recall.

    """

    value: float
    answer: str
    explanation: str
    parts: dict[str, float] = field(default_factory=dict)
