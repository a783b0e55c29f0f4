"""The shapes of OpenAI's chat completions API: what a request may say, what is answered.

A field that would change the answer and that a specialist cannot honour is refused, never ignored:
a client must not believe that its `tools` or its `n=3` took effect. Fields that change nothing here
(`user`, `metadata`, `store`, ...) are accepted and dropped. Anything unknown is refused.

Source: the `CreateChatCompletionRequest` and `CreateChatCompletionResponse` schemas of OpenAI's
published API description.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from metier.records import Completion, Message

MAX_MESSAGES = 512
MAX_CHARACTERS = 500_000

_IGNORED = frozenset(
    {
        "metadata",
        "moderation",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Fields that cannot change the answer here."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields accepted only with the value that changes nothing."""


class Refusal(Exception):  # noqa: N818 - it is the answer to a request, not a fault of ours
    """An answer in OpenAI's error shape.

    Args:
        status: HTTP status code.
        message: what is wrong and what to do about it.
        param: the field of the request it concerns.
        code: OpenAI's short name of the error.

    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = {429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        if self.status >= 500:
            kind = "server_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def _joined(content: object) -> object:
    """The text of a content given in parts."""
    if not isinstance(content, list):
        return content
    texts = [part["text"] for part in content if _is_text(part)]
    if len(texts) < len(content):
        raise ValueError("only parts of type text are supported")
    return "".join(texts)


def _is_text(part: object) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


class _WireMessage(BaseModel):
    """One message; null fields and annotations of earlier answers may come back with it."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_joined)] = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    refusal: None = None

    @model_validator(mode="after")
    def _has_content(self) -> _WireMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing")
        if len(self.content or "") > MAX_CHARACTERS:
            raise ValueError(f"content is longer than {MAX_CHARACTERS:,} characters")
        return self

    def record(self) -> Message:
        """As the rest of metier knows it; `developer` is the newer name of `system`."""
        role = "system" if self.role == "developer" else self.role
        values: dict[str, Any] = {"role": role, "content": self.content}
        values |= self.model_dump(include={"name", "tool_calls", "tool_call_id"}, exclude_none=True)
        return cast(Message, values)


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(BaseModel):
    """A request that a specialist can honour in full."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: Annotated[list[_WireMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    stream: bool = False
    stream_options: _StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """OpenAI's default is 1. Ours is 0: a verdict is measured on greedy answers, and what is
    served by default must be what was measured."""
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    stop: Annotated[list[str], BeforeValidator(lambda s: [s] if isinstance(s, str) else s)] = []
    """Texts that end the answer and are not part of it."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        if len(self.stop) > 4 or "" in self.stop:
            raise ValueError("stop takes one to four texts that are not empty")
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise ValueError("max_tokens and max_completion_tokens disagree; give one of them")
        return self

    @property
    def chat(self) -> tuple[Message, ...]:
        """The messages as records."""
        return tuple(message.record() for message in self.messages)

    @property
    def limit(self) -> int | None:
        """Longest answer in tokens; None: the task's own limit."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


def parse(body: bytes) -> ChatRequest:
    """Read the body of a request.

    Raises:
        Refusal: 400, naming the field.

    """
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(400, f"The body is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise Refusal(400, "The body is not a JSON object.")
    try:
        return ChatRequest.model_validate(_supported(values), strict=True)
    except ValidationError as error:
        raise _explain(error) from None


def _supported(values: dict[str, Any]) -> dict[str, Any]:
    """Drop what changes nothing; refuse what would change the answer but cannot be honoured."""
    kept = {}
    for name, value in values.items():
        if value is None or name in _IGNORED:
            continue
        if name not in _ONLY:
            kept[name] = value
        elif value not in _ONLY[name]:
            only = " or ".join(repr(neutral) for neutral in _ONLY[name]) or "nothing"
            raise Refusal(
                400,
                f"'{name}' would change the answer in a way this server does not support; "
                f"it accepts {only} there. Leave it out.",
                name,
                "unsupported_parameter",
            )
    return kept


def _explain(error: ValidationError) -> Refusal:
    first = error.errors(include_url=False, include_input=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        return Refusal(400, f"Unrecognized request argument: {param}", param, "unknown_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return Refusal(400, f"{param}: {message}" if param else message, param, "invalid_value")


@dataclass(frozen=True)
class Reply:
    """Builds the JSON of one answer, whole or in chunks; every chunk has the same id and time."""

    model: str
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, completion: Completion) -> dict[str, Any]:
        """A `chat.completion` object."""
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": _finish_reason(completion),
        }
        return self._head("chat.completion") | {"choices": [choice], "usage": _usage(completion)}

    def opening(self) -> dict[str, Any]:
        """The first chunk: it names the role."""
        return self._chunk({"role": "assistant", "content": "", "refusal": None})

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk with some text."""
        return self._chunk({"content": text})

    def closing(self, completion: Completion) -> dict[str, Any]:
        """The chunk that says why the answer ended."""
        return self._chunk({}, _finish_reason(completion))

    def usage(self, completion: Completion) -> dict[str, Any]:
        """The chunk after it that counts tokens: it has no choices."""
        return self._head("chat.completion.chunk") | {"choices": [], "usage": _usage(completion)}

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if self.include_usage else {}
        return self._head("chat.completion.chunk") | {"choices": [choice]} | usage

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def _finish_reason(completion: Completion) -> str:
    return "stop" if completion.finished else "length"


def _usage(completion: Completion) -> dict[str, int]:
    return {
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "total_tokens": completion.prompt_tokens + completion.completion_tokens,
    }
