"""The arms that ask a language model, made by composition.

An arm is a composer (how the request is worded, what is looked up for it) over any Generator:
the local engine or a remote endpoint. So prompt, few-shot, rag, tuned+rag and remote share one
class, and every arm is given the same chats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np

from metier.data.prepare import normalise
from metier.evaluation.wording import Wording, with_content
from metier.graders.base import Grader
from metier.records import (
    Chat,
    Completion,
    Example,
    Generator,
    Message,
    input_text,
    transcript,
)
from metier.retrieval.index import Index
from metier.text.pieces import before

if TYPE_CHECKING:
    import numpy.typing as npt

    from metier.model.generate import Engine
    from metier.text.template import Renderer

Fits = Callable[[Chat], bool]
"""Whether a composed chat and its answer fit the model's context."""

T = TypeVar("T")


class Neighbours(Generic[T]):
    """Looks up the items nearest to a text, never the text itself.

    An item whose key is the text is left out, and so is every item of its group: a training
    example is then answered as a test example is, with no duplicate at hand.

    Args:
        index: built from the keys.
        keys: what is compared with the text, one for each item.
        items: what is returned.
        groups: group of each item; empty for none.
        k: how many items are returned at most.

    """

    def __init__(
        self, index: Index, keys: Sequence[str], items: Sequence[T], groups: Sequence[str], k: int
    ) -> None:
        self._index = index
        self._items = items
        self._k = k
        # Where each key stands, in which groups, and where each group stands.
        self._same: dict[str, set[int]] = {}
        self._groups: dict[str, set[str]] = {}
        self._members: dict[str, set[int]] = {}
        for position, (key, group) in enumerate(zip(keys, groups, strict=True)):
            self._same.setdefault(normalise(key), set()).add(position)
            if group:
                self._groups.setdefault(normalise(key), set()).add(group)
                self._members.setdefault(group, set()).add(position)

    def __call__(self, text: str) -> list[T]:
        """At most `k` items, nearest first."""
        hidden = self._kin(normalise(text))
        hits = self._index.search(text, self._k + len(hidden))
        shown = [hit.position for hit in hits if hit.position not in hidden]
        return [self._items[position] for position in shown[: self._k]]

    def _kin(self, key: str) -> set[int]:
        """Positions of a key and of the groups it stands in."""
        groups = self._groups.get(key, set())
        return self._same.get(key, set()).union(*(self._members[group] for group in groups))


def shots(
    examples: Sequence[Example], make: Callable[[list[str]], Index], k: int
) -> Neighbours[Example]:
    """The training examples nearest to an input, for the few-shot arm."""
    keys = [input_text(example.prompt) for example in examples]
    return Neighbours(make(keys), keys, examples, [example.group for example in examples], k)


def snippets(
    examples: Sequence[Example],
    passages: Sequence[str],
    make: Callable[[list[str]], Index],
    k: int,
) -> Neighbours[str]:
    """The training examples and passages nearest to an input, as text, for the rag arms."""
    keys = [*(input_text(example.prompt) for example in examples), *passages]
    shown = [
        f"Input: {transcript(example.prompt)}\nOutput: {example.answer}" for example in examples
    ]
    groups = [*(example.group for example in examples), *("" for _ in passages)]
    return Neighbours(make(keys), keys, [*shown, *passages], groups, k)


class Composer(Generic[T]):
    """Composes the requests of one arm and makes them fit.

    What was looked up goes first, the least near before the nearer, until the request fits; then
    the label list goes. What even then does not fit is left for the model to refuse.

    Args:
        wording: how the request is put into words.
        fits: whether a composed chat fits.
        look_up: what to show beside an input, by its `input_text`, nearest first.
        place: puts that into the chat.

    """

    def __init__(
        self,
        wording: Wording,
        fits: Fits,
        look_up: Callable[[str], Sequence[T]],
        place: Callable[[Chat, Sequence[T]], Chat],
    ) -> None:
        self._wording = wording
        self._fits = fits
        self._look_up = look_up
        self._place = place
        self._requests = self._found = self._left_out = self._unlabelled = 0

    def __call__(self, chat: Chat) -> Chat:
        """The request for one chat."""
        found = self._look_up(input_text(chat))
        self._requests += 1
        self._found += len(found)
        for kept in range(len(found), -1, -1):
            composed = self._wording(self._place(chat, found[:kept]))
            if self._fits(composed):
                self._left_out += len(found) - kept
                return composed
        self._left_out += len(found)
        self._unlabelled += bool(self._wording.labels)
        return replace(self._wording, labels=())(chat)

    def notes(self) -> tuple[str, ...]:
        """What was left out so far for want of room, in words."""
        notes = []
        if self._left_out:
            mean, of = self._left_out / self._requests, self._found / self._requests
            notes.append(
                f"of {of:.1f} shots or passages per request, {mean:.1f} were left out on average: "
                "there is no room for them"
            )
        if self._unlabelled:
            notes.append(
                f"{self._unlabelled} of {self._requests} requests do not name the labels: "
                "there is no room for them"
            )
        return tuple(notes)


def prompt(wording: Wording, fits: Fits) -> Composer[None]:
    """Zero-shot: instruction, labels and input."""
    return Composer(wording, fits, lambda _: (), lambda chat, _: chat)


def few_shot(
    wording: Wording, fits: Fits, look_up: Callable[[str], Sequence[Example]]
) -> Composer[Example]:
    """Near training examples as earlier turns, the nearest last (Liu et al. 2022, DeeLIO)."""
    return Composer(wording, fits, look_up, _as_turns)


def rag(wording: Wording, fits: Fits, look_up: Callable[[str], Sequence[str]]) -> Composer[str]:
    """Near snippets above the input in the last user message, the nearest last."""
    return Composer(wording, fits, look_up, _as_context)


def _as_turns(chat: Chat, examples: Sequence[Example]) -> Chat:
    system = [message for message in chat if _is_system(message)]
    turns = [message for message in chat if not _is_system(message)]
    shown = [
        message
        for example in reversed(examples)
        for message in example.messages
        if not _is_system(message)
    ]
    return [*system, *shown, *turns]


def _is_system(message: Message) -> bool:
    return message.get("role") in ("system", "developer")


def _as_context(chat: Chat, texts: Sequence[str]) -> Chat:
    if not texts:
        return chat
    last = max(at for at, message in enumerate(chat) if message.get("role") == "user")
    context = "\n\n".join(reversed(texts))
    content = f"Context:\n{context}\n\n{chat[last].get('content') or ''}"
    return [*chat[:last], with_content(chat[last], content), *chat[last + 1 :]]


class Reader(Protocol):
    """What of an engine decides how chats become ids and which fit."""

    @property
    def renderer(self) -> Renderer:
        """Chat to ids."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """Longest answer in tokens."""
        ...

    @property
    def context(self) -> int | None:
        """Longest sequence in tokens, if there is a limit."""
        ...


def room_in(engine: Reader) -> Fits:
    """Whether a chat leaves room for an answer in an engine's context."""

    def fits(chat: Chat) -> bool:
        used = len(engine.renderer.prompt(chat)) + engine.max_new_tokens
        return engine.context is None or used <= engine.context

    return fits


class Composed:
    """An arm: requests composed, then answered by a Generator.

    Args:
        inner: answers the composed chats.
        compose: makes the request of a chat.

    Attributes:
        compose: makes the request of a chat.

    """

    def __init__(self, inner: Generator, compose: Callable[[Chat], Chat]) -> None:
        self._inner = inner
        self.compose = compose

    def generate(self, chats: Sequence[Chat]) -> list[Completion]:
        """Answer each chat."""
        return self._inner.generate([self.compose(chat) for chat in chats])


def ended(answer: Completion, stop: Sequence[str]) -> Completion:
    """An answer up to the first of some texts; one that has reached it is finished."""
    text, stopped = before(answer.text, stop)
    return replace(answer, text=text, finished=answer.finished or stopped)


class Likelihood:
    """An arm for closed label sets: the label to which the model gives the highest probability.

    A label's score is the log-probability of its text and stop token after the prompt; the
    softmax over all labels is the probability of the answer. Nothing is generated.

    Args:
        engine: scores continuations; a prompt shared by all labels is read once.
        compose: makes the request of a chat.
        labels: the closed label set; the first of equally likely labels wins.

    """

    def __init__(
        self, engine: Engine, compose: Callable[[Chat], Chat], labels: Sequence[str]
    ) -> None:
        self._engine = engine
        self._compose = compose
        self._labels = labels

    def generate(self, chats: Sequence[Chat]) -> list[Completion]:
        """The likeliest label of each chat, with its probability."""
        composed = [self._compose(chat) for chat in chats]
        prompts = [self._engine.renderer.prompt(chat) for chat in composed]
        endings = self._endings(composed[0], len(prompts[0])) if chats else []
        scores = self._engine.logprobs([(p, ending) for p in prompts for ending in endings])
        rows = np.reshape(scores, (len(prompts), len(self._labels)))
        return [self._answer(row, len(p)) for row, p in zip(rows, prompts, strict=True)]

    def _endings(self, chat: Chat, start: int) -> list[tuple[int, ...]]:
        """Ids of every label with its stop token; they do not depend on the prompt."""
        answers = (Message(role="assistant", content=label) for label in self._labels)
        return [self._engine.renderer.example([*chat, answer]).ids[start:] for answer in answers]

    def _answer(self, row: npt.NDArray[np.float64], prompt_tokens: int) -> Completion:
        shares = np.exp(row - row.max())
        best = int(row.argmax())
        return Completion(
            self._labels[best], prompt_tokens, probability=float(shares[best] / shares.sum())
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """What `choose` found.

    Attributes:
        name: the best candidate.
        scores: mean score of every candidate on the examples that were used.

    """

    name: str
    scores: dict[str, float]


def choose(
    candidates: Mapping[str, Generator], examples: Sequence[Example], grader: Grader, limit: int
) -> Choice:
    """Pick the candidate with the best mean score; the first of equal ones wins.

    Args:
        candidates: arms by name.
        examples: validation examples, never test examples.
        grader: scores the answers.
        limit: use at most this many examples, spread evenly over the whole part.

    """
    count = min(limit, len(examples))
    used = [examples[at * len(examples) // count] for at in range(count)]
    scores = {name: _mean_score(arm, used, grader) for name, arm in candidates.items()}
    return Choice(max(scores, key=lambda name: scores[name]), scores)


def _mean_score(arm: Generator, examples: Sequence[Example], grader: Grader) -> float:
    answers = arm.generate([example.prompt for example in examples])
    pairs = zip(answers, examples, strict=True)
    return float(np.mean([grader.grade(answer.text, example).value for answer, example in pairs]))
