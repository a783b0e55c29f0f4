"""The remote arm against a real server on the loopback address."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from metier.errors import RemoteError
from metier.evaluation import remote as module
from metier.evaluation.remote import RemoteGenerator
from metier.records import Completion, Message
from metier.task import Remote

KEY = "sk-canary-0123456789"
Reply = tuple[int, dict[str, str], bytes]


class Stub:
    """An endpoint whose behaviour is a function from a request to a reply."""

    def __init__(self, respond: Callable[[dict[str, Any]], Reply]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    stub.requests.append(body)
                    stub.headers.append({k.lower(): v for k, v in self.headers.items()})
                    stub.at_once += 1
                    stub.most_at_once = max(stub.most_at_once, stub.at_once)
                status, headers, content = respond(body)
                with lock:
                    stub.at_once -= 1
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Stub]]:
    monkeypatch.setenv("METIER_TEST_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    stubs: list[Stub] = []

    def start(respond: Callable[[dict[str, Any]], Reply]) -> Stub:
        stubs.append(Stub(respond))
        return stubs[-1]

    yield start
    for stub in stubs:
        stub.server.shutdown()
        stub.server.server_close()


def _completion(text: Any, finish: str = "stop", **more: Any) -> Reply:
    usage = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    value = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
    return 200, {}, json.dumps({**value, "choices": [choice], "usage": usage, **more}).encode()


def _error(status: int, message: str, **more: Any) -> Reply:
    # The header lets the client try again at once.
    body = {"error": {"message": message, "type": "t", "code": None, "param": None, **more}}
    return status, {"retry-after-ms": "1"}, json.dumps(body).encode()


def _remote(stub: Stub) -> Remote:
    return Remote(base_url=stub.url, model="m", api_key_env="METIER_TEST_KEY")


def _chats(count: int) -> list[list[Message]]:
    return [[{"role": "user", "content": str(at), "weight": 0}] for at in range(count)]


def test_answers_come_in_order_a_few_at_a_time(serve: Callable[..., Stub]) -> None:
    def respond(body: dict[str, Any]) -> Reply:
        time.sleep(0.03)
        return _completion(f"re {body['messages'][0]['content']}")

    stub = serve(respond)
    answers = RemoteGenerator(_remote(stub), 16).generate(_chats(12))
    assert answers == [Completion(f"re {at}", 11, 3) for at in range(12)]
    assert 2 <= stub.most_at_once <= 4


def test_the_request_is_greedy_and_bounded(serve: Callable[..., Stub]) -> None:
    stub = serve(lambda _: _completion("x"))
    RemoteGenerator(_remote(stub), 16).generate(_chats(1))
    (request,) = stub.requests
    assert request == {
        "model": "m",
        "messages": [{"role": "user", "content": "0"}],
        "max_tokens": 16,
        "temperature": 0,
    }
    assert stub.headers[0]["authorization"] == f"Bearer {KEY}"


def test_no_other_secret_of_the_environment_is_sent(
    serve: Callable[..., Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "WEBHOOK_SECRET"):
        monkeypatch.setenv(f"OPENAI_{name}", f"canary-{name}")
    monkeypatch.setenv(
        "OPENAI_CUSTOM_HEADERS", "X-Canary: canary-header\nAuthorization: canary-auth"
    )
    stub = serve(lambda _: _completion("x"))
    RemoteGenerator(_remote(stub), 16).generate(_chats(1))
    assert "canary-" not in str(stub.headers).replace(KEY, "")
    assert stub.headers[0]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "said",
    [
        {"message": "too many tokens", "code": "context_length_exceeded", "param": "messages"},
        {"message": "This model's maximum context length is 4096 tokens.", "code": 400},
    ],
)
def test_a_request_that_does_not_fit_costs_only_its_own_answer(
    serve: Callable[..., Stub], said: dict[str, Any]
) -> None:
    def respond(body: dict[str, Any]) -> Reply:
        return _error(400, **said) if body["messages"][0]["content"] == "1" else _completion("x")

    arm = RemoteGenerator(_remote(serve(respond)), 16)
    first, refused, last = arm.generate(_chats(3))
    assert refused == Completion("", finished=False, refused=True)
    assert (first.text, last.text) == ("x", "x")
    assert "longer than the endpoint's context" in arm.notes()[0]


@pytest.mark.parametrize(
    ("text", "line"),
    [("billing.\nQuestion: next", "billing."), ("\n billing \n\nx", "billing"), ("", "")],
)
def test_a_label_is_the_first_line(serve: Callable[..., Stub], text: str, line: str) -> None:
    stub = serve(lambda _: _completion(text))
    (answer,) = RemoteGenerator(_remote(stub), 16, ("\n",)).generate(_chats(1))
    assert answer == Completion(line, 11, 3)


def test_an_answer_cut_at_the_limit_is_marked(serve: Callable[..., Stub]) -> None:
    stub = serve(lambda _: _completion("x", finish="length"))
    assert RemoteGenerator(_remote(stub), 1).generate(_chats(1))[0].finished is False


def test_no_content_is_an_empty_answer(serve: Callable[..., Stub]) -> None:
    stub = serve(lambda _: _completion(None))
    assert RemoteGenerator(_remote(stub), 1).generate(_chats(1))[0].text == ""


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": "many"}])
def test_missing_usage_is_noted(serve: Callable[..., Stub], usage: Any) -> None:
    stub = serve(lambda _: _completion("x", usage=usage))
    arm = RemoteGenerator(_remote(stub), 1)
    assert arm.generate(_chats(2)) == [Completion("x"), Completion("x")]
    assert arm.notes() == ("the endpoint does not report tokens: their number and cost miss",)


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_pass_is_tried_again(serve: Callable[..., Stub], status: int) -> None:
    stub = serve(lambda _: _error(status, "busy") if len(stub.requests) < 3 else _completion("x"))
    assert RemoteGenerator(_remote(stub), 1).generate(_chats(1))[0].text == "x"
    assert len(stub.requests) == 3


@pytest.mark.parametrize(
    ("status", "tries", "cause", "remedy"),
    [
        (400, 1, "answered 400 .too long", "fit its context"),
        (401, 1, "the key was not accepted", "METIER_TEST_KEY"),
        (403, 1, "the key was not accepted", "METIER_TEST_KEY"),
        (404, 1, "answered 404", "remote.model 'm'"),
        (408, 5, "answered 408 .* up to 4 times", "try again later"),
        (429, 5, "answered 429 .* up to 4 times", "try again later"),
        (500, 5, "answered 500 .* up to 4 times", "try again later"),
    ],
)
def test_what_does_not_pass_is_explained_without_the_key(
    serve: Callable[..., Stub],
    caplog: pytest.LogCaptureFixture,
    status: int,
    tries: int,
    cause: str,
    remedy: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    stub = serve(lambda _: _error(status, f"too long, key {KEY}, " + "x" * 9000))
    with pytest.raises(RemoteError, match=cause) as caught:
        RemoteGenerator(_remote(stub), 1).generate(_chats(1))
    assert remedy in caught.value.remedy
    assert caught.value.place == f"remote {stub.url}"
    assert KEY not in str(caught.value)
    assert "chat/completions" in caplog.text, "the client writes a log"
    assert KEY not in caplog.text
    assert len(str(caught.value)) < 600
    assert caught.value.__suppress_context__
    assert len(stub.requests) == tries


def test_the_endpoint_says_how_long_to_wait(serve: Callable[..., Stub]) -> None:
    asked: list[float] = []

    def respond(_: dict[str, Any]) -> Reply:
        asked.append(time.monotonic())
        return _completion("x") if len(asked) > 1 else (429, {"Retry-After": "1"}, b"{}")

    RemoteGenerator(_remote(serve(respond)), 1).generate(_chats(1))
    assert asked[1] - asked[0] >= 1, "without being told it waits half a second at most"


def test_an_endpoint_that_asks_for_hours_is_not_waited_for(serve: Callable[..., Stub]) -> None:
    stub = serve(lambda _: (429, {"Retry-After": "7200"}, b"{}"))
    with pytest.raises(RemoteError, match="answered 429"):
        RemoteGenerator(_remote(stub), 1).generate(_chats(1))
    assert len(stub.requests) == 1


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"<html>hello</html>", "text/html"),
        (b"{not json", "application/json"),
        (b"[]", "application/json"),
        (b'"text"', "application/json"),
        (b"null", "application/json"),
        (b"{}", "application/json"),
        (b'{"choices": []}', "application/json"),
        (b'{"choices": [null]}', "application/json"),
        (b'{"choices": [{"message": null}]}', "application/json"),
        (b'{"choices": [{"message": {"content": 3}}]}', "application/json"),
        (b'{"choices": {"message": "x"}}', "application/json"),
        (b"", "application/json"),
    ],
)
def test_nonsense_is_called_so(serve: Callable[..., Stub], content: bytes, kind: str) -> None:
    stub = serve(lambda _: (200, {"Content-Type": kind}, content))
    with pytest.raises(RemoteError, match="answered nonsense"):
        RemoteGenerator(_remote(stub), 1).generate(_chats(1))


def test_redirects_are_not_followed(serve: Callable[..., Stub]) -> None:
    other = serve(lambda _: _completion("stolen"))
    location = {"Location": f"{other.url}/chat/completions"}
    stub = serve(lambda _: (307, location, b""))
    with pytest.raises(RemoteError, match="a redirect"):
        RemoteGenerator(_remote(stub), 1).generate(_chats(1))
    assert other.requests == []


def test_a_slow_endpoint_times_out(
    serve: Callable[..., Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SECONDS", 0.1)
    monkeypatch.setattr(module, "_RETRIES", 0)
    stop = threading.Event()

    def respond(_: dict[str, Any]) -> Reply:
        stop.wait(5)
        return _completion("late")

    stub = serve(respond)
    with pytest.raises(RemoteError, match="no answer within"):
        RemoteGenerator(_remote(stub), 1).generate(_chats(1))
    stop.set()


def test_nobody_listening_is_explained(
    serve: Callable[..., Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RETRIES", 0)
    stub = serve(lambda _: _completion("x"))
    stub.server.shutdown()
    stub.server.server_close()
    with pytest.raises(RemoteError, match="cannot be reached"):
        RemoteGenerator(_remote(stub), 1).generate(_chats(1))


def test_connections_are_closed_with_the_arm(serve: Callable[..., Stub]) -> None:
    arm = RemoteGenerator(_remote(serve(lambda _: _completion("x"))), 1)
    arm.generate(_chats(1))
    client = arm._client
    assert not client.is_closed()
    del arm
    assert client.is_closed()


def test_a_refused_request_ends_the_work(serve: Callable[..., Stub]) -> None:
    def respond(body: dict[str, Any]) -> Reply:
        time.sleep(0.02)
        return _error(400, "no") if body["messages"][0]["content"] == "0" else _completion("x")

    stub = serve(respond)
    with pytest.raises(RemoteError):
        RemoteGenerator(_remote(stub), 1).generate(_chats(200))
    assert len(stub.requests) < 50


def test_models_with_other_settings_are_served_and_noted(serve: Callable[..., Stub]) -> None:
    def respond(body: dict[str, Any]) -> Reply:
        for name in ("max_tokens", "temperature"):
            if name in body:
                return _error(400, f"unsupported: {name}", param=name)
        return _completion("x")

    stub = serve(respond)
    arm = RemoteGenerator(_remote(stub), 5)
    assert [answer.text for answer in arm.generate(_chats(6))] == ["x"] * 6
    assert stub.requests[-1]["max_completion_tokens"] == 5
    assert arm.notes() == ("the endpoint does not accept temperature 0: it used its own",)
    arm.generate(_chats(1))
    assert len([r for r in stub.requests if "temperature" in r]) < len(stub.requests) - 6


@pytest.mark.parametrize("key", [None, "", "  ", "clé", "a\nb", "a\x7fb"])
def test_a_missing_or_broken_key_is_refused(
    monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    monkeypatch.delenv("METIER_TEST_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("METIER_TEST_KEY", key)
    remote = Remote(base_url="http://127.0.0.1:1/v1", model="m", api_key_env="METIER_TEST_KEY")
    with pytest.raises(RemoteError, match="METIER_TEST_KEY"):
        RemoteGenerator(remote, 1)


@pytest.mark.parametrize(
    "address",
    ["", "api.example.com/v1", "ftp://a/v1", "http://", "http://a:99999/v1", "http://[::1/v1"],
)
def test_what_is_no_address_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("METIER_TEST_KEY", KEY)
    remote = Remote(base_url=address, model="m", api_key_env="METIER_TEST_KEY")
    with pytest.raises(RemoteError, match="not the address"):
        RemoteGenerator(remote, 1)


@pytest.mark.parametrize("address", ["http://user:secret@a/v1", "http://a/v1?key=secret"])
def test_a_secret_in_the_address_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("METIER_TEST_KEY", KEY)
    remote = Remote(base_url=address, model="m", api_key_env="METIER_TEST_KEY")
    with pytest.raises(RemoteError, match="bare address") as caught:
        RemoteGenerator(remote, 1)
    assert "secret" not in str(caught.value)
