"""A real model behind the gateway: clients get what the engine answers when it is evaluated."""

import openai
import pytest

from metier.evaluation.arms import Composed
from metier.model.generate import Engine
from metier.model.load import load_base
from metier.recipes.answering import Specialist
from metier.text.template import Renderer

from .test_gateway import KEY, served

STORY = [{"role": "user", "content": "Once upon a time"}]


@pytest.fixture(scope="module")
def engine(stories260k):
    base = load_base(str(stories260k), device="cpu")
    return Engine(base.model, Renderer(base.tokenizer, "plain"), max_new_tokens=24)


@pytest.fixture(scope="module")
def ask(engine):
    with (
        served({"stories": Specialist("stories", None, engine, engine, "")}) as url,
        openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60) as client,
    ):
        yield lambda **fields: client.chat.completions.create(
            model="stories", messages=STORY, **fields
        )


def test_the_default_answer_is_the_engine_s_own(ask, engine):
    (expected,) = engine.generate([STORY])
    answer = ask()
    assert answer.choices[0].message.content == expected.text
    assert len(expected.text) > 20
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == expected.completion_tokens == 24
    assert answer.choices[0].finish_reason == "length"


def test_a_streamed_answer_is_the_same(ask, engine):
    chunks = list(ask(stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.strip() == engine.generate([STORY])[0].text
    assert len(chunks) > 10, "it comes in pieces"


def test_a_limit_and_a_stop_text_cut_the_same_answer(ask):
    whole = ask().choices[0].message.content
    short = ask(max_tokens=8)
    assert whole.startswith(short.choices[0].message.content)
    assert short.usage.completion_tokens == 8
    word = whole.split()[3]
    stopped = ask(stop=word).choices[0]
    assert stopped.message.content == whole.partition(word)[0].strip()
    assert stopped.finish_reason == "stop"


def test_a_composed_arm_ends_where_the_evaluated_one_ends(engine, monkeypatch):
    word = engine.generate([STORY])[0].text.split()[3]
    monkeypatch.setattr(engine, "stop", (word,))
    arm = Composed(engine, lambda chat: chat)
    pieces = Specialist("stories", None, arm, engine, "").stream(STORY)
    text = ""
    while True:
        try:
            text += next(pieces)
        except StopIteration as end:
            whole = end.value
            break
    (expected,) = arm.generate([STORY])
    assert text == whole.text == expected.text
    assert whole.finished
    assert expected.finished


def test_a_seed_makes_a_drawn_answer_repeatable(ask):
    texts = [ask(temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_limit_above_the_task_s_own_changes_nothing(ask):
    assert ask(max_tokens=4096).choices == ask().choices


def test_a_prompt_that_does_not_fit_is_refused_plainly(ask):
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        ask(extra_body={"messages": [{"role": "user", "content": "once " * 2000}]})
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")
