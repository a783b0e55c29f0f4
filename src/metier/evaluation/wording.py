"""How requests are put into words: instructions, label lists and phrasings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from metier.graders.asking import ask_for_keys
from metier.records import Chat, Message
from metier.task import Kind, Task


@dataclass(frozen=True, slots=True)
class Phrasing:
    """One way to word requests.

    Attributes:
        name: how choices are reported.
        first: the first user message; holds ``{task}`` and ``{input}``.
        later: every user message after it; holds ``{input}``.

    """

    name: str
    first: str
    later: str


BARE = Phrasing("bare", "{input}", "{input}")
_INSTRUCTED = (
    Phrasing("task first", "{task}\n\n{input}", "{input}"),
    Phrasing("input first", "{input}\n\n{task}", "{input}"),
    Phrasing("fields", "{task}\n\nInput: {input}\nOutput:", "Input: {input}\nOutput:"),
)


def phrasings(kind: Kind) -> tuple[Phrasing, ...]:
    """The phrasings to choose from; free text may also be asked for by the bare input."""
    return (*_INSTRUCTED, BARE) if kind == "expansion" else _INSTRUCTED


def default_instruction(task: Task, answers: Sequence[str]) -> str:
    """What prompted arms tell the model to do: the user's words, else words for the kind of task.

    Args:
        task: its `instruction` wins; else its kind, `good` and `bad` are put into words.
        answers: expected outputs of the training part; JSON objects among them name the fields.

    """
    if task.instruction:
        return task.instruction
    words = [_ask(task.kind, ask_for_keys(answers))]
    if task.good:
        words.append(f"A good answer: {task.good}")
    if task.bad:
        words.append(f"Avoid: {task.bad}")
    return "\n".join(words)


def _ask(kind: Kind, for_keys: str) -> str:
    if kind == "classification":
        return "Choose the label that fits the text. Answer with the label only."
    if kind == "multi-label":
        return (
            "Choose all labels that fit the text. Answer with a JSON list of labels only, such as "
            '["first","second"], or [] where none fits.'
        )
    if for_keys:
        return for_keys
    if kind == "extraction":
        return "Extract what is asked for from the text. Answer with nothing else."
    return "Write the answer to this input."


@dataclass(frozen=True, slots=True)
class Wording:
    """How a request is put into words.

    Attributes:
        phrasing: where instruction and input stand.
        instruction: what to do.
        labels: the closed label set to name, if any.

    """

    phrasing: Phrasing
    instruction: str = ""
    labels: tuple[str, ...] = ()

    def __call__(self, chat: Chat) -> list[Message]:
        """The chat with every user message in this wording."""
        task = self.instruction
        if self.labels:
            task = f"{task}\nLabels: {', '.join(self.labels)}"
        layout = self.phrasing.first
        worded: list[Message] = []
        for message in chat:
            if message.get("role") == "user":
                content = layout.format(task=task, input=message.get("content") or "")
                message = with_content(message, content)
                layout = self.phrasing.later
            worded.append(message)
        return worded


def with_content(message: Message, content: str) -> Message:
    """The message with another text."""
    return cast("Message", {**message, "content": content})
