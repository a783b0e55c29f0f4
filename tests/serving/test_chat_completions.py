"""What a request may say, without a server."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.records import Completion
from metier.serving.chat_completions import (
    MAX_CHARACTERS,
    MAX_MESSAGES,
    ChatRequest,
    Refusal,
    Reply,
    parse,
)

USER = {"role": "user", "content": "hello"}


def request(**fields):
    return parse(json.dumps({"model": "m", "messages": [USER], **fields}).encode())


def refusal(**fields):
    with pytest.raises(Refusal) as caught:
        request(**fields)
    assert caught.value.status == 400
    return caught.value


def test_defaults_give_the_evaluated_answer():
    plain = request()
    assert plain.temperature == 0
    assert plain.limit is None
    assert plain.top_p == 1
    assert plain.stop == []
    assert plain.chat == ({"role": "user", "content": "hello"},)


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto"},
        {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False},
        {"tools": [], "tool_choice": "auto", "logit_bias": {}, "modalities": ["text"]},
        {"response_format": {"type": "text"}, "stop": None, "seed": None, "temperature": None},
    ],
)
def test_fields_that_change_nothing_are_accepted(fields):
    assert request(**fields) == request()


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"frequency_penalty": 0.1}, "frequency_penalty", "unsupported_parameter"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
        ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
        ({"top_k": 5}, "top_k", "unknown_parameter"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": "0.5"}, "temperature", "invalid_value"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages.0", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{**USER, "weight": 0}]}, "messages.0.weight", "unknown_parameter"),
        ({"model": 3}, "model", "invalid_value"),
    ],
)
def test_refusals_name_the_field(fields, param, code):
    error = refusal(**fields)
    assert (error.param, error.code) == (param, code)
    assert set(error.body()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": [USER, {"role": "assistant", "content": "a"}]}, "last message"),
        ({"stream_options": {"include_usage": True}}, "stream: true"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "one to four"),
        ({"stop": ["a", ""]}, "not empty"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "disagree"),
        ({"messages": [{"role": "user", "content": "x" * (MAX_CHARACTERS + 1)}]}, "characters"),
        ({"messages": [USER] * (MAX_MESSAGES + 1)}, "at most"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type text"),
        ({"messages": [{"role": "user", "content": [{"type": "x", "text": "a"}]}]}, "type text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "type text"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "type text"),
    ],
)
def test_refusals_say_what_is_wrong(fields, words):
    assert words in refusal(**fields).message


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"seed": NaN}', b'"\\ud800"']
)
def test_bodies_that_are_not_a_json_object(body):
    with pytest.raises(Refusal) as caught:
        parse(body)
    assert caught.value.status == 400


def test_parts_roles_and_returned_answers_become_records():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call],
            "refusal": None,
            "annotations": [],
            "audio": None,
        },
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    assert request(messages=messages).chat == (
        {"role": "system", "content": "be brief"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "user", "content": "ab"},
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
names = st.sampled_from([*ChatRequest.model_fields, "n", "tools", "user", "other"])


def status(body):
    try:
        parse(body)
    except Refusal as error:
        return error.status
    return 200


@settings(max_examples=300)
@given(st.dictionaries(names, json_values, max_size=4))
def test_any_json_is_read_or_refused(fields):
    base = {"model": "m", "messages": [USER]}
    assert status(json.dumps(base | fields).encode()) in {200, 400}
    assert status(json.dumps(fields).encode()) == 400, "without messages or model"


def test_a_reply_says_why_it_ended_and_counts_tokens():
    reply = Reply("m")
    cut = reply.whole(Completion("abc", 5, 2, finished=False))
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    assert reply.whole(Completion("abc"))["choices"][0]["finish_reason"] == "stop"
    assert Reply("m").id != reply.id
