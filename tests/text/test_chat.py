"""What chat templates do differently, and what is refused because a template would lose it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from metier.errors import DataError, ModelError
from metier.text.template import Renderer
from metier.text.tokenizer import Tokenizer
from tests.text.chat_families import FAMILIES, Family, write_tokenizer
from tests.text.chat_oracle import TOOLS

Load = Callable[[str], Renderer]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    @cache
    def one(name: str) -> Renderer:
        family = FAMILIES.get(name, Family(("<|im_start|>",), "<|im_end|>"))
        directory = write_tokenizer(name, family, tmp_path_factory.mktemp(name))
        return Renderer(Tokenizer.load(directory), "chat")

    return one


def say(role: str, content: str | None, **more: Any) -> Any:
    return {"role": role, "content": content, **more}


def call(arguments: Any, name: str = "look_up") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": "abcdefgh1", "type": "function", "function": function}


QUESTION = say("user", "Who comes?")
ANSWER = say("assistant", "The cat.")
CALL = say("assistant", None, tool_calls=[call('{"word":"cat"}')])
RESULT = say("tool", "a pet", tool_call_id="abcdefgh1")


def tail(renderer: Renderer, chat: list[Any], tools: Any = ()) -> str:
    """The end of an example as shown, from its last turn on."""
    shown = renderer.show(renderer.example(chat, tools))
    return shown[max(shown.rfind("assistant"), shown.rfind("Assistant｜>"), shown.rfind("model")) :]


# Every template asks for the answer itself, and trains its text and the stop token.
ASKED = {
    "deepseekv3": "Assistant｜>⟦The cat.<｜end▁of▁sentence｜>⟧",
    "glm4moe": "assistant|>\n<think></think>\n⟦The cat.<|endoftext|>⟧",
    "gptoss": "assistant<|channel|>final<|message|>⟦The cat.<|return|>⟧",
    "muse_glimmer": "assistant to=user<|message|>⟦The cat.<|eot|>⟧",
    "nemotron_3_nano": "assistant\n<think></think>⟦The cat.<|im_end|>⟧",
    "phi3": "assistant|>⟦The cat.<|end|>⟧",
    "qwen3": "assistant\n<think>\n\n</think>\n\n⟦The cat.<|im_end|>⟧",
    "qwen3_5_think": "assistant\n<think>\n\n</think>\n\n⟦The cat.<|im_end|>⟧",
}


@pytest.mark.parametrize("name", ASKED)
def test_a_model_is_asked_for_the_answer_itself(load: Load, name: str) -> None:
    renderer = load(name)
    assert tail(renderer, [QUESTION, ANSWER]) == ASKED[name]
    row = renderer.example([QUESTION, ANSWER])
    assert renderer.answer(row.ids[len(renderer.prompt([QUESTION])) :]) == "The cat."


CALLED = {
    "glm4moe": "⟦\n<think></think>\n<tool_call>look_up\n<arg_key>word</arg_key>\n"
    "<arg_value>cat</arg_value>\n</tool_call><|endoftext|>⟧",
    "gptoss": '⟦ to=functions.look_up<|channel|>commentary json<|message|>{"word": "cat"}<|call|>⟧',
    "lfm2_v2": "\n⟦<|tool_call_start|>[look_up(word='cat')]<|tool_call_end|><|im_end|>⟧",
    "llama3_1": '<|end_header_id|>\n\n⟦{"name": "look_up", "parameters": {"word": "cat"}}'
    "<|eot_id|>⟧",
    "nemotron_3_nano": "\n<think></think>⟦\n<tool_call>\n<function=look_up>\n<parameter=word>\ncat"
    "\n</parameter>\n</function>\n</tool_call>\n<|im_end|>⟧",
    "qwen2_5": '\n⟦<tool_call>\n{"name": "look_up", "arguments": {"word": "cat"}}\n</tool_call>'
    "<|im_end|>⟧",
}


@pytest.mark.parametrize("arguments", ['{"word":"cat"}', {"word": "cat"}])
@pytest.mark.parametrize("name", CALLED)
def test_calls_are_written_once_as_json(load: Load, name: str, arguments: Any) -> None:
    """OpenAI's arguments are JSON in a string; as such most templates would quote them again."""
    chat = [QUESTION, say("assistant", None, tool_calls=[call(arguments)])]
    shown = tail(load(name), chat, TOOLS)
    assert shown.removeprefix("assistant").removeprefix("|>") == CALLED[name]


def test_a_template_that_wants_arguments_as_a_string_gets_them(load: Load) -> None:
    """DeepSeek's joins strings. It offers no tools, so none are offered."""
    for arguments in ('{"word": "cat"}', {"word": "cat"}):
        chat = [QUESTION, say("assistant", None, tool_calls=[call(arguments)]), RESULT, ANSWER]
        shown = load("deepseekv3").show(load("deepseekv3").example(chat))
        assert '<｜tool▁sep｜>look_up\n```json\n{"word": "cat"}\n```<｜tool▁call▁end｜>' in shown
        assert shown.endswith("<｜tool▁outputs▁end｜>⟦The cat.<｜end▁of▁sentence｜>⟧")


def test_where_tools_are_offered_the_prompt_leaves_the_choice(load: Load) -> None:
    renderer = load("gptoss")
    prompts = {
        tuple(renderer.example([QUESTION, answer], TOOLS).ids[:length])
        for answer in (ANSWER, CALL)
        for length in [len(renderer.prompt([QUESTION], TOOLS))]
    }
    assert prompts == {tuple(renderer.prompt([QUESTION], TOOLS))}


SEEN = "Let me see."
TWO_CALLS = say("assistant", None, tool_calls=[call("{}"), call("{}")])
NO_CALL = say("assistant", None, tool_calls=[{"id": "1"}])
NO_OBJECT = say("assistant", None, tool_calls=[call("[1]")])
DEVELOPER, SYSTEM = say("developer", "Be brief."), say("system", "Be brief.")
LEFT_OUT = "is left out by the chat template"

# Template, the chat in front of or with its last message, tools; then place and cause.
LOST: dict[str, tuple[str, list[Any], Any, str, str]] = {
    "developer": ("qwen3", [DEVELOPER, QUESTION, ANSWER], (), "messages[0] (role dev", LEFT_OUT),
    "one of two systems": (
        *("deepseek_r1_distill", [SYSTEM, SYSTEM, QUESTION, ANSWER], ()),
        *("messages[0] (role system)", LEFT_OUT),
    ),
    "tool result": (
        *("phi3", [QUESTION, ANSWER, RESULT, ANSWER], (), "messages[2] (role tool)", LEFT_OUT),
    ),
    "tools": ("llama3", [QUESTION, ANSWER], TOOLS, "tools[0]", LEFT_OUT),
    "second call": ("gptoss", [QUESTION, TWO_CALLS], TOOLS, "messages[1].tool_calls[1]", LEFT_OUT),
    "call": ("gemma3", [QUESTION, CALL], (), "messages[1].tool_calls", "cannot be written"),
    "call beside text": (
        *("lfm2", [QUESTION, {**CALL, "content": SEEN}], ()),
        *("messages[1].tool_calls", "cannot be written"),
    ),
    "text beside a call": (
        *("llama3_1", [QUESTION, {**CALL, "content": SEEN}], TOOLS),
        *("messages[1].content", "is not written whole"),
    ),
    "system": ("gemma", [SYSTEM, QUESTION, ANSWER], (), "chat template", "System role not"),
    "call without its tool": ("gptoss", [QUESTION, CALL], (), "messages[1]", "in another way"),
    "no call": ("qwen2_5", [QUESTION, NO_CALL], TOOLS, "messages[1].tool_calls[0]", "is not a"),
    "no object": ("qwen2_5", [QUESTION, NO_OBJECT], TOOLS, "messages[1].tool_calls[0]", "is not a"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_a_template_would_lose_is_refused(load: Load, name: str) -> None:
    template, chat, tools, place, cause = LOST[name]
    with pytest.raises(DataError, match=cause) as caught:
        load(template).example(chat, tools)
    assert caught.value.place.startswith(place)


@pytest.mark.parametrize("name", sorted({template for template, *_ in LOST.values()}))
def test_the_same_templates_write_the_rest(load: Load, name: str) -> None:
    """Control of the test above: without what is lost, the chat is written."""
    assert load(name).example([QUESTION, ANSWER, QUESTION, ANSWER])


def test_what_is_left_out_is_refused_when_serving_too(load: Load) -> None:
    with pytest.raises(DataError, match="left out"):
        load("qwen3").prompt([say("developer", "Be brief."), QUESTION])


@pytest.mark.parametrize("name", ["gemma4_v5", "gptoss"])
def test_a_call_may_end_with_a_stop_of_its_own(load: Load, tmp_path: Path, name: str) -> None:
    """Named by generation_config.json; where it is not named, nothing would end the answer."""
    row = load(name).example([QUESTION, CALL], TOOLS)
    assert row.ids[-1] in load(name).stop_ids
    family = FAMILIES[name]
    directory = write_tokenizer(name, Family(family.control, family.stop, family.bos), tmp_path)
    with pytest.raises(ModelError, match="does not end this answer with a stop token"):
        Renderer(Tokenizer.load(directory), "chat").example([QUESTION, CALL], TOOLS)


def test_an_ordinary_stop_token_does_not_cut_an_answer(tmp_path: Path) -> None:
    """Where generation_config.json names a line break, answers may have lines all the same."""
    directory = write_tokenizer("llama3", FAMILIES["llama3"], tmp_path)
    (line_break,) = Tokenizer.load(directory).encode("\n", "text")
    stops = {"eos_token_id": [line_break]}
    (directory / "generation_config.json").write_text(json.dumps(stops), encoding="utf-8")
    renderer = Renderer(Tokenizer.load(directory), "chat")
    assert line_break in renderer.stop_ids
    shown = tail(renderer, [QUESTION, say("assistant", "The cat.\nAnd a dog.")])
    assert shown.endswith("⟦The cat.\nAnd a dog.<|eot_id|>⟧")


@pytest.mark.parametrize("name", ["smolvlm", "idefics3", "llava_next"])
def test_a_template_for_pictures_is_refused_at_once(load: Load, name: str) -> None:
    """They drop texts that are no list of parts; every answer would be empty."""
    with pytest.raises(ModelError, match="plain question and answer"):
        load(name)


def test_typed_reasoning_that_a_template_would_drop_is_refused(tmp_path: Path) -> None:
    """Where <think> is no control token, DeepSeek's template cuts it out of the answer."""
    family = FAMILIES["deepseek_r1_distill"]
    control = tuple(token for token in family.control if "think" not in token)
    written = Family(control, family.stop, family.bos)
    directory = write_tokenizer("deepseek_r1_distill", written, tmp_path)
    renderer = Renderer(Tokenizer.load(directory), "chat")
    with pytest.raises(DataError, match="not written whole") as caught:
        renderer.example([QUESTION, say("assistant", "<think>hm</think>The cat.")])
    assert caught.value.place == "messages[1].content"
    assert renderer.example([QUESTION, ANSWER])


@pytest.mark.parametrize("name", ["gptoss", "llama3_2", "muse_glimmer"])
def test_a_served_prompt_is_the_same_on_another_day(load: Load, name: str) -> None:
    """These templates ask for the date; a prompt of today is none that was trained."""
    shown = load(name).tokenizer.decode(load(name).prompt([QUESTION]))
    assert ("2024-07-26" in shown) or ("26 Jul 2024" in shown)


def test_a_refused_system_message_is_told_where_to_go(load: Load) -> None:
    with pytest.raises(DataError) as caught:
        load("gemma").prompt([SYSTEM, QUESTION])
    assert "let the instruction open the first user message" in caught.value.remedy
