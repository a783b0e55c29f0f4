"""The remote arm: any OpenAI-compatible endpoint.

The key comes from the environment variable that the task names; it is sent to that endpoint
only (redirects are not followed) and never written or shown.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from metier.errors import RemoteError
from metier.records import Chat, Completion
from metier.task import Remote
from metier.text.pieces import before

if TYPE_CHECKING:
    import httpx2
    from openai import APIError, APIStatusError, BadRequestError, OpenAI
    from openai.types.chat import ChatCompletion

_AT_ONCE = 4
_SECONDS = 120.0
_RETRIES = 4
_SHOWN = 200
_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")
_HEADERS = {
    "accept", "accept-encoding", "connection", "content-length", "content-type", "host",
    "user-agent",
}  # fmt: skip
_TOO_LONG = (
    "some requests are longer than the endpoint's context: they were answered with nothing and "
    "count as wrong"
)
_LATER = "try again later; what is finished is kept"


class RemoteGenerator:
    """Asks an endpoint for greedy answers, a few requests at a time.

    What may pass (rate limits, server errors, lost connections, timeouts) is retried by the client
    with growing pauses, or after the pause that the endpoint asks for, of two minutes at most.

    Args:
        remote: the endpoint.
        max_new_tokens: longest answer in tokens.
        stop: strings that end an answer and are not part of it; whatever the endpoint writes.

    Raises:
        RemoteError: the address is none, or the key is not in the environment.

    """

    def __init__(self, remote: Remote, max_new_tokens: int, stop: Sequence[str] = ()) -> None:
        self._remote, self._stop = remote, stop
        self._key = _key(remote)
        self._client = _client(remote, self._key)
        weakref.finalize(self, self._client.close)
        self._sampling: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": 0}
        self._notes: dict[str, None] = {}

    def generate(self, chats: Sequence[Chat]) -> list[Completion]:
        """Answer each chat; one that does not fit the endpoint's context gets an empty answer.

        Raises:
            RemoteError: the endpoint refused, failed for good, or answered nonsense.

        """
        pool = ThreadPoolExecutor(_AT_ONCE)
        try:
            return list(pool.map(self._answer, chats))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def notes(self) -> tuple[str, ...]:
        """What a reader of the results must know about this endpoint."""
        return tuple(self._notes)

    def _answer(self, chat: Chat) -> Completion:
        from openai import APIError, BadRequestError

        sampling = dict(self._sampling)
        while True:
            try:
                return self._completion(self._ask(chat, sampling))
            except BadRequestError as error:
                if _is_too_long(error):
                    self._notes[_TOO_LONG] = None
                    return Completion("", finished=False, refused=True)
                if error.param not in sampling:
                    raise self._explain(error) from None
                self._adapt(sampling, error.param)
            except (APIError, ValueError) as error:
                raise self._explain(error) from None

    def _ask(self, chat: Chat, sampling: dict[str, Any]) -> ChatCompletion:
        messages = [{key: m[key] for key in _FIELDS if key in m} for m in map(dict, chat)]
        create: Any = self._client.chat.completions.create
        reply: ChatCompletion = create(model=self._remote.model, messages=messages, **sampling)
        return reply

    def _adapt(self, sampling: dict[str, Any], refused: str) -> None:
        """Do without a setting that newer models refuse: it stands under another name or not."""
        value = sampling.pop(refused)
        if refused == "max_tokens":
            sampling["max_completion_tokens"] = value
        else:
            self._notes[f"the endpoint does not accept {refused} {value}: it used its own"] = None
        self._sampling = dict(sampling)

    def _completion(self, reply: ChatCompletion) -> Completion:
        # The client checks no types: whatever JSON came back is in here.
        try:
            choice = reply.choices[0]
            text = choice.message.content or ""
        except (AttributeError, LookupError, TypeError):
            raise ValueError("the reply holds no message") from None
        if not isinstance(text, str):
            raise ValueError("the reply's content is not text")
        read = getattr(reply.usage, "prompt_tokens", None)
        written = getattr(reply.usage, "completion_tokens", None)
        if not isinstance(read, int) or not isinstance(written, int):
            self._notes["the endpoint does not report tokens: their number and cost miss"] = None
            read = written = 0
        answer, stopped = before(text, self._stop)
        return Completion(answer, read, written, stopped or choice.finish_reason != "length")

    def _explain(self, error: APIError | ValueError) -> RemoteError:
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        place = f"remote {self._remote.base_url}"
        if isinstance(error, APITimeoutError):
            return RemoteError(place, f"gave no answer within {_SECONDS:.0f} seconds", _LATER)
        if isinstance(error, APIConnectionError):
            reason = self._clean(error.__cause__ or error)
            return RemoteError(
                place, f"cannot be reached ({reason})", "check remote.base_url and that it is up"
            )
        if isinstance(error, APIStatusError):
            return RemoteError(place, *self._explain_status(error))
        return RemoteError(
            place,
            f"answered nonsense ({self._clean(error)})",
            "check that remote.base_url is an OpenAI-compatible API (it often ends in /v1)",
        )

    def _explain_status(self, error: APIStatusError) -> tuple[str, str]:
        """Cause and remedy; the body of a refused login is not shown, as it may quote the key."""
        status, variable = error.status_code, self._remote.api_key_env
        said = f"answered {status}"
        if status in (401, 403):
            return f"{said}: the key was not accepted", f"check the key in {variable}"
        if 300 <= status < 400:
            return f"{said}, a redirect", "give the final address as remote.base_url"
        body = error.body if isinstance(error.body, dict) else {}
        said = f"{said} ({self._clean(body.get('message') or error)})"
        if status == 404:
            return said, f"check remote.base_url and remote.model '{self._remote.model}'"
        if status in (408, 409, 429) or status >= 500:
            return f"{said}, which is tried again up to {_RETRIES} times", _LATER
        return said, "check that the model takes such requests and that they fit its context"

    def _clean(self, words: object) -> str:
        """What an error says, on one line, without the key."""
        text = " ".join(str(words).replace(self._key, "***").split())
        return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _is_too_long(error: BadRequestError) -> bool:
    """OpenAI's code for it, or the words in which most other servers say it."""
    return error.code == "context_length_exceeded" or "maximum context length" in error.message


def _key(remote: Remote) -> str:
    key = os.environ.get(remote.api_key_env, "").strip()
    if not key:
        raise RemoteError(
            f"environment variable {remote.api_key_env}",
            "is not set",
            "put the key of the endpoint into it; any word will do where none is asked for",
        )
    if not (key.isascii() and key.isprintable()):
        raise RemoteError(
            f"environment variable {remote.api_key_env}",
            "holds characters that no key has",
            "copy the key again",
        )
    return key


def _client(remote: Remote, key: str) -> OpenAI:
    from openai import DefaultHttpxClient, OpenAI

    _check_address(remote)
    return OpenAI(
        base_url=remote.base_url,
        api_key=key,
        timeout=_SECONDS,
        max_retries=_RETRIES,
        http_client=DefaultHttpxClient(
            follow_redirects=False, event_hooks={"request": [lambda request: _only(request, key)]}
        ),
    )


def _only(request: httpx2.Request, key: str) -> None:
    """Send our key and what HTTP needs, nothing that the client found in the environment."""
    for name in set(request.headers) - _HEADERS:
        del request.headers[name]
    request.headers["authorization"] = f"Bearer {key}"


def _check_address(remote: Remote) -> None:
    try:
        address = urlsplit(remote.base_url)
        whole = address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:
        whole = False
    if not whole:
        raise RemoteError(
            "remote.base_url",
            "is not the address of an API",
            "write it like https://api.example.com/v1",
        )
    if address.username or address.query:
        raise RemoteError(
            "remote.base_url",
            "holds a user name or a query, which reports would show",
            f"give the bare address, and the key in {remote.api_key_env}",
        )
