from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metier.errors import ModelError
from metier.evaluation.arms import (
    Composed,
    Likelihood,
    choose,
    ended,
    few_shot,
    prompt,
    rag,
    room_in,
    shots,
    snippets,
)
from metier.evaluation.wording import BARE, Phrasing, Wording
from metier.graders.load import load_grader
from metier.model.generate import Engine
from metier.model.load import load_base
from metier.records import Chat, Completion, Example, Message
from metier.retrieval.lexical import LexicalIndex
from metier.text.template import Renderer
from tests.evaluation.talks import talk

TASK = Wording(Phrasing("p", "{task}\n{input}", "{input}"), "Classify.", ("cards", "refunds"))


def _example(text: str, answer: str, group: str = "", name: str = "") -> Example:
    messages: tuple[Message, ...] = (
        {"role": "system", "content": "system of the example"},
        {"role": "user", "content": text},
        {"role": "assistant", "content": answer},
    )
    return Example(name or text, messages, group)


def _chat(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


TRAIN = (
    _example("my card is lost", "cards", "g1"),
    _example("My card  is LOST", "cards"),
    _example("is my card lost or stolen", "cards", "g1"),
    _example("where is my refund", "refunds"),
    _example("the card does not work", "cards"),
)


def _always(_: Chat) -> bool:
    return True


def _words(limit: int, chat: Chat) -> bool:
    return sum(len((message.get("content") or "").split()) for message in chat) <= limit


class Echo:
    """Answers with a fixed text and remembers what it was asked."""

    def __init__(self, text: str = "ok") -> None:
        self.text = text
        self.asked: list[Chat] = []

    def generate(self, chats: Sequence[Chat]) -> list[Completion]:
        self.asked.extend(chats)
        return [Completion(self.text, 7, 3) for _ in chats]


# Looking up


def test_an_input_never_finds_itself_its_copies_or_its_group() -> None:
    text = TRAIN[0].input
    index = LexicalIndex([example.input for example in TRAIN])
    assert {hit.position for hit in index.search(text, 3)} == {0, 1, 2}
    found = shots(TRAIN, LexicalIndex, 3)(text)
    assert {example.input for example in found} == {TRAIN[3].input, TRAIN[4].input}


def test_one_large_group_is_cheap_and_hides_itself_only() -> None:
    many = [_example(f"question {at} about cards", "cards", "all") for at in range(3000)]
    other = _example("question about refunds", "refunds", "other")
    look_up = shots([*many, other], LexicalIndex, 2)
    assert look_up(many[7].input) == [other]
    assert len(look_up("question about cards")) == 2


def test_a_new_input_finds_the_nearest_first() -> None:
    found = shots(TRAIN, LexicalIndex, 2)("my refund did not come, where is it")
    assert found[0] is TRAIN[3]
    assert len(found) == 2


def test_snippets_are_examples_with_answers_and_passages() -> None:
    passages = ["Refunds take five days.", "Cards take two."]
    look_up = snippets(TRAIN, passages, LexicalIndex, 2)
    assert set(look_up("refunds take my refund")) == {
        "Input: where is my refund\nOutput: refunds",
        "Refunds take five days.",
    }
    assert snippets((), passages, LexicalIndex, 1)("cards") == ["Cards take two."]


TALKS = tuple(talk(row.input, row.answer, row.group) for row in TRAIN)


def test_the_nearest_conversation_is_by_all_its_turns() -> None:
    new = talk("my refund did not come, where is it", "")
    asked: list[str] = []

    def look_up(text: str) -> list[Example]:
        asked.append(text)
        return shots(TALKS, LexicalIndex, 1)(text)

    composed = few_shot(Wording(BARE), _always, look_up)(new.prompt)
    assert asked == ["my refund did not come, where is it\nShall I look?\nyes"]
    turns = ["where is my refund", "Shall I look?", "yes", "refunds"]
    assert [message["content"] for message in composed[1:5]] == turns


def test_a_conversation_never_finds_itself_its_copies_or_its_group() -> None:
    seen: list[list[Example]] = []

    def look_up(text: str) -> list[Example]:
        seen.append(shots(TALKS, LexicalIndex, 3)(text))
        return seen[-1]

    few_shot(Wording(BARE), _always, look_up)(TALKS[0].prompt)
    assert {example.id for example in seen[0]} == {TALKS[3].id, TALKS[4].id}


def test_snippets_show_the_whole_conversation() -> None:
    look_up = snippets(TALKS, ["Cards take two days."], LexicalIndex, 1)
    chat = rag(Wording(BARE), _always, look_up)(talk("where is it, the refund", "").prompt)
    assert chat[-1]["content"] == (
        "Context:\nInput: user: where is my refund\nassistant: Shall I look?\nuser: yes\n"
        "Output: refunds\n\nyes"
    )


# Composing


def test_prompt_is_instruction_labels_and_input() -> None:
    assert prompt(TASK, _always)(_chat("where is it")) == _chat(
        "Classify.\nLabels: cards, refunds\nwhere is it"
    )


def test_few_shot_puts_the_nearest_turn_last_and_keeps_the_chats_own_system() -> None:
    chat: list[Message] = [{"role": "system", "content": "own"}, *_chat("where is my refund?")]
    look_up = shots(TRAIN, LexicalIndex, 2)
    near = look_up("where is my refund?")
    composed = few_shot(TASK, _always, look_up)(chat)
    assert [message["role"] for message in composed] == [
        "system", "user", "assistant", "user", "assistant", "user",
    ]  # fmt: skip
    assert composed[0]["content"] == "own"
    assert composed[1]["content"] == f"Classify.\nLabels: cards, refunds\n{near[1].input}"
    assert [m["content"] for m in composed[2:5]] == [near[1].answer, near[0].input, near[0].answer]
    assert composed[5]["content"] == "where is my refund?"


def test_rag_puts_the_nearest_snippet_next_to_the_input() -> None:
    composed = rag(Wording(BARE), _always, lambda _: ["near", "far"])(_chat("question"))
    assert composed == _chat("Context:\nfar\n\nnear\n\nquestion")
    assert rag(Wording(BARE), _always, lambda _: [])(_chat("question")) == _chat("question")


def test_the_least_near_are_left_out_first_and_counted() -> None:
    compose = rag(Wording(BARE), lambda chat: _words(5, chat), lambda _: ["aa bb", "cc", "dd"])
    assert compose(_chat("x")) == _chat("Context:\ncc\n\naa bb\n\nx")
    compose(_chat("x y z"))
    (note,) = compose.notes()
    assert "of 3.0 shots or passages per request, 2.0 were left out" in note


def test_the_label_list_goes_last_and_is_counted() -> None:
    compose = rag(TASK, lambda chat: _words(3, chat), lambda _: ["aa"])
    assert compose(_chat("x y")) == _chat("Classify.\nx y")
    assert any("1 of 1 requests do not name the labels" in note for note in compose.notes())
    assert rag(TASK, _always, lambda _: ["aa"]).notes() == ()


@given(
    st.lists(st.sampled_from(["a", "b c", "d e f"]), max_size=6),
    st.integers(1, 20),
    st.sampled_from(["one", "two words"]),
)
def test_composing_fits_whenever_the_bare_request_does(
    found: list[str], limit: int, text: str
) -> None:
    def fits(chat: Chat) -> bool:
        return _words(limit, chat)

    compose = rag(TASK, fits, lambda _: found)
    composed = compose(_chat(text))
    assert (composed[-1]["content"] or "").endswith(text)
    if fits(Wording(TASK.phrasing, TASK.instruction)(_chat(text))):
        assert fits(composed)


# Arms


def test_an_arm_answers_the_composed_chats() -> None:
    inner = Echo("billing.\nQuestion: next")
    arm = Composed(inner, prompt(TASK, _always))
    assert arm.generate([_chat("a"), _chat("b")]) == [Completion(inner.text, 7, 3)] * 2
    assert [chat[-1]["content"] for chat in inner.asked] == [
        "Classify.\nLabels: cards, refunds\na",
        "Classify.\nLabels: cards, refunds\nb",
    ]


@pytest.mark.parametrize(
    ("text", "finished"), [("billing", False), ("billing\nQuestion", True), ("billing # x", True)]
)
def test_only_an_answer_that_did_not_reach_its_end_was_cut(text: str, finished: bool) -> None:
    answer = ended(Completion(text, 7, 3, finished=False), ("#", "\n"))
    assert answer == Completion("billing", 7, 3, finished)


def test_choosing_takes_the_best_and_of_equal_ones_the_first() -> None:
    examples = [_example(str(at), "cards" if at % 4 else "refunds") for at in range(8)]
    grader = load_grader("exact", "classification", ["cards", "refunds"], Path())
    arms = {"r": Echo("refunds"), "c": Echo("cards"), "also c": Echo("cards")}
    choice = choose(arms, examples, grader, limit=100)
    assert choice.name == "c"
    assert choice.scores == {"r": 0.25, "c": 0.75, "also c": 0.75}


def test_choosing_looks_at_few_examples_from_all_over() -> None:
    examples = [_example(str(at), "cards") for at in range(10)]
    grader = load_grader("exact", "classification", ["cards"], Path())
    arm = Echo("cards")
    choose({"only": arm}, examples, grader, limit=3)
    assert [chat[-1]["content"] for chat in arm.asked] == ["0", "3", "6"]


# With a real model


@pytest.fixture(scope="module")
def engine(stories260k: Path) -> Engine:
    base = load_base(str(stories260k), torch.float32, "cpu")
    return Engine(base.model, Renderer(base.tokenizer, "question-answer"), max_new_tokens=12)


def test_what_fits_is_answered_and_one_token_more_is_refused(engine: Engine) -> None:
    fits = room_in(engine)
    longest = max(n for n in range(1, 600) if fits(_chat("a b " * n)))
    assert engine.context is not None
    used = len(engine.renderer.prompt(_chat("a b " * longest))) + engine.max_new_tokens
    assert engine.context - 8 <= used <= engine.context
    assert engine.generate([_chat("a b " * longest)])
    with pytest.raises(ModelError, match="reads at most"):
        engine.generate([_chat("a b " * (longest + 1))])


def test_few_shot_over_a_real_model_fills_the_context_and_no_more(engine: Engine) -> None:
    train = [_example(f"once upon a time {'there was a girl ' * n}", "cat") for n in range(1, 30)]
    compose = few_shot(TASK, room_in(engine), shots(train, LexicalIndex, 20))
    (answer,) = Composed(engine, compose).generate([_chat("once there was a girl")])
    assert engine.context is not None
    assert engine.context / 2 < answer.prompt_tokens <= engine.context - engine.max_new_tokens
    assert "left out on average" in compose.notes()[0]


def test_likelihood_is_the_softmax_of_each_labels_log_probability(engine: Engine) -> None:
    labels = ("happy", "sad", "a big dog", "Lily")
    chats = [_chat("Lily got a gift. She was"), _chat("The ball fell. Tom was very")]
    answers = Likelihood(engine, prompt(Wording(BARE), _always), labels).generate(chats)
    for chat, answer in zip(chats, answers, strict=True):
        values = torch.tensor([_log_probability(engine, chat, label) for label in labels])
        shares = values.softmax(0)
        assert answer.text == labels[int(shares.argmax())]
        assert answer.probability == pytest.approx(float(shares.max()), abs=1e-5)
        assert answer.prompt_tokens == len(engine.renderer.prompt(chat))
    assert Likelihood(engine, prompt(TASK, _always), labels).generate([]) == []


def _log_probability(engine: Engine, chat: Chat, label: str) -> float:
    """One plain forward pass over prompt and answer, with no cache and no batch."""
    answer: Message = {"role": "assistant", "content": label}
    rendered = engine.renderer.example([*chat, answer])
    ids = torch.tensor([rendered.ids])
    with torch.no_grad():
        table = engine.model(input_ids=ids).logits[0].log_softmax(-1)
    return sum(
        float(table[at - 1, token])
        for at, (token, trained) in enumerate(zip(rendered.ids, rendered.trained, strict=True))
        if trained
    )
