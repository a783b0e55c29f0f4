"""The gateway as clients meet it: the unmodified openai client and raw bytes over loopback."""

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import jsonschema
import openai
import pytest
import uvicorn

from metier.errors import ConfigError, DataError, RemoteError, RequestError
from metier.records import Completion, last_user_text
from metier.serving import gateway
from metier.serving.chat_completions import _IGNORED, _ONLY, ChatRequest

KEY = "test-key"
USER = {"role": "user", "content": "one two three"}
CHAT = {"model": "echo", "messages": [USER]}


class Echo:
    """Answers with the words of the question backwards; some questions make it misbehave."""

    name = "echo"

    def __init__(self):
        self.asked = []
        self.streamed = []
        self.pieces = 0
        self.closed = threading.Event()
        self.running = 0
        self.overlapped = False

    def stream(self, chat, **options):
        self.asked.append(last_user_text(chat))
        self.streamed.append(options)
        try:
            with self._alone():
                text, read, _, _ = self._answer(chat)
            limit = options["max_new_tokens"]
            words = text.split(" ")[:limit]
            for i, word in enumerate(words):
                self.pieces += 1
                yield word if i == 0 else f" {word}"
                yield ""  # as when a token ends inside a character
                if word == "BREAK":
                    raise DataError("the prompt", "broke half way", "mend it")
                while word == "ENDLESS":
                    self.pieces += 1
                    time.sleep(0.001)
                    yield "."
            finished = limit is None or len(text.split(" ")) <= limit
            return Completion(" ".join(words), read, len(words), finished)
        finally:
            self.closed.set()

    @contextlib.contextmanager
    def _alone(self):
        self.running += 1
        self.overlapped |= self.running > 1
        try:
            yield
        finally:
            self.running -= 1

    def _answer(self, chat):
        words = last_user_text(chat).split()
        match words[0]:
            case "DATA":
                raise DataError("the prompt", "has a tool", "leave it out")
            case "LONG":
                raise RequestError("messages", "are too long", "shorten them", "too_long")
            case "REMOTE":
                raise RemoteError("http://elsewhere", "answered 500", "try later")
            case "CRASH":
                raise RuntimeError("secret detail")
            case "SLOW":
                time.sleep(0.4)
        return " ".join(reversed(words)), len(words), len(words), True


@contextlib.contextmanager
def served(specialists, key=KEY):
    """The application on a real port, in a thread; yields its base URL."""
    config = uvicorn.Config(gateway.create_app(specialists, key), log_level="error")
    server = uvicorn.Server(config)
    with gateway._listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join(10)
    assert not thread.is_alive()


def test_listening_ends_with_its_context():
    with gateway.listening({"echo": Echo()}, KEY) as port:
        answer = httpx.get(f"http://127.0.0.1:{port}/health")
        assert answer.json() == {"status": "ok"}
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")


@pytest.fixture(scope="module")
def echo():
    return Echo()


@pytest.fixture(scope="module")
def url(echo):
    with served({"echo": echo}) as base:
        yield base


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=20) as made:
        yield made


@pytest.fixture(scope="module")
def raw(url):
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=20) as made:
        yield made


# --- answers


def test_the_default_answer_is_the_evaluated_one(client, echo):
    answer = client.chat.completions.create(**CHAT)
    assert answer.choices[0].message.content == "three two one"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == 6
    assert echo.streamed[-1] == {
        "max_new_tokens": None,
        "temperature": 0,
        "top_p": 1,
        "seed": None,
        "stop": [],
    }


def test_sampling_options_reach_the_specialist(client, echo):
    answer = client.chat.completions.create(
        **CHAT, temperature=0.7, top_p=0.9, seed=5, stop="x", max_completion_tokens=2
    )
    assert answer.choices[0].message.content == "three two"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 2
    assert echo.streamed[-1] == {
        "max_new_tokens": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 5,
        "stop": ["x"],
    }


def test_a_stream_adds_up_to_the_whole_answer(client):
    chunks = list(client.chat.completions.create(**CHAT, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "three two one"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices[0].finish_reason == "stop"


def events(raw, **fields):
    answer = raw.post("/chat/completions", json={**CHAT, "stream": True, **fields})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    parts = answer.text.split("\n\n")
    assert parts.pop() == "", "every event ends with an empty line"
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [part.removeprefix("data: ") for part in parts]


def test_the_events_of_a_stream_are_exact(raw):
    *chunks, done = events(raw)
    assert done == "[DONE]"
    chunks = [json.loads(chunk) for chunk in chunks]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "three"},
        {"content": " two"},
        {"content": " one"},
        {},
    ]
    finishes = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert finishes == [None, None, None, None, "stop"]
    assert not any("usage" in chunk for chunk in chunks)


def test_usage_comes_in_a_last_chunk_when_asked_for(raw):
    *chunks, last, done = events(raw, stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert all(json.loads(chunk)["usage"] is None for chunk in chunks)
    last = json.loads(last)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


def test_a_streamed_answer_cut_at_the_limit_says_so(raw):
    *_, closing, _ = events(raw, max_tokens=1)
    assert json.loads(closing)["choices"][0]["finish_reason"] == "length"


def test_models(client, raw):
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").owned_by == "metier"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other/model")
    assert caught.value.code == "model_not_found"


@pytest.fixture(scope="module")
def schemas(data_dir: Path):
    file = data_dir.parent / "spec" / "openai-subset.json"
    if not file.is_file():
        pytest.skip(f"no API description at {file}")
    return json.loads(file.read_text(), object_hook=_with_null)


def _with_null(schema):
    """Write OpenAPI's older `nullable: true` as JSON Schema has it."""
    return {"anyOf": [schema, {"type": "null"}]} if schema.get("nullable") is True else schema


def test_answers_fit_the_published_schemas(raw, schemas):
    def validate(value, name):
        schema = {"$ref": f"#/components/schemas/{name}", "components": schemas["components"]}
        jsonschema.Draft202012Validator(schema).validate(value)

    whole = raw.post("/chat/completions", json=CHAT).json()
    validate(whole, "CreateChatCompletionResponse")
    with pytest.raises(jsonschema.ValidationError):
        validate({**whole, "object": "other"}, "CreateChatCompletionResponse")
    for event in events(raw, stream_options={"include_usage": True})[:-1]:
        validate(json.loads(event), "CreateChatCompletionStreamResponse")
    validate(raw.get("/models").json(), "ListModelsResponse")
    validate(raw.get("/models/echo").json(), "Model")
    validate(raw.get("/models/other").json(), "ErrorResponse")


def test_every_field_of_the_api_is_honoured_ignored_or_refused_by_name(schemas):
    known = ChatRequest.model_fields.keys() | _IGNORED | _ONLY.keys()
    assert known == properties(schemas["components"]["schemas"], "CreateChatCompletionRequest")


def properties(schemas, name):
    """The fields of a schema and of those it is composed of."""
    parts = [schemas[name], *schemas[name].get("allOf", [])]
    references = [part["$ref"].rpartition("/")[2] for part in parts if "$ref" in part]
    own = {field for part in parts for field in part.get("properties", {})}
    return own.union(*(properties(schemas, reference) for reference in references))


# --- errors


def test_errors_of_the_client(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**CHAT, n=2)
    assert caught.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=[USER])
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("word", "status", "words"),
    [
        ("DATA", 400, "has a tool. leave it out"),
        ("LONG", 400, "messages: are too long; shorten them."),
        ("REMOTE", 502, "answered 500"),
        ("CRASH", 500, "its log says why"),
    ],
)
def test_errors_of_the_specialist(raw, caplog, stream, word, status, words):
    body = {**CHAT, "messages": [{"role": "user", "content": word}], "stream": stream}
    answer = raw.post("/chat/completions", json=body)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]
    assert "secret" not in answer.text
    assert ("secret detail" in caplog.text) == (status == 500)


def test_an_error_half_way_ends_the_stream_and_reaches_the_client(client):
    message = {"role": "user", "content": "never BREAK first"}
    stream = client.chat.completions.create(model="echo", messages=[message], stream=True)
    seen = [next(stream).choices[0].delta.content for _ in range(3)]
    assert seen == ["", "first", " BREAK"]
    with pytest.raises(openai.APIError, match="broke half way"):
        next(stream)


IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/cat.png"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 3}, "n"),
        ({"logprobs": True, "top_logprobs": 2}, "logprobs"),
        ({"tools": [TOOL]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"extra_body": {"top_k": 3}}, "top_k"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_would_change_the_answer_is_never_ignored(client, echo, fields, param, stream):
    before = len(echo.asked)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**CHAT, **fields, "stream": stream})
    assert caught.value.param == param
    assert len(echo.asked) == before, "no model was asked"


def test_a_refused_parameter_is_named(client):
    message = {"role": "user", "content": "LONG"}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="echo", messages=[message])
    assert (caught.value.param, caught.value.code) == ("messages", "too_long")


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (json.dumps(CHAT).encode(), "text/plain", 415),
        (b" " * (gateway.MAX_BODY + 1), "application/json", 413),
        (b" " * gateway.MAX_BODY, "application/json", 400),
    ],
)
def test_bodies_that_are_refused(raw, content, kind, status):
    answer = raw.post("/chat/completions", content=content, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("method", "path"), [("GET", "/chat/completions"), ("GET", "/nowhere")])
def test_unknown_routes_answer_in_the_same_shape(raw, method, path):
    answer = raw.request(method, path)
    assert answer.status_code in {404, 405}
    assert answer.json()["error"]["code"] is None
    assert answer.headers.get("allow") == ("POST" if answer.status_code == 405 else None)


# --- defences


def raw_request(url, method, path, headers):
    """Send the path as it is: httpx would tidy it."""
    with contextlib.closing(http.client.HTTPConnection(url.split("/")[2])) as connection:
        connection.putrequest(method, path)
        for name, value in headers:
            connection.putheader(name, value)
        connection.endheaders()
        return connection.getresponse()


METHODS = ("GET", "POST", "DELETE", "OPTIONS", "HEAD")
PATHS = (
    "/v1/models",
    "/v1/models/echo",
    "/v1/chat/completions",
    "/nowhere",
    "/health/",
    "//health",
    "/v1/../health",
)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "Bearer wrong")],
        [("Authorization", "Bearer")],
        [("Authorization", KEY)],
        [("Authorization", f"Basic {KEY}")],
        [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")],
        [("Authorization", "Bearer ключ".encode())],
    ],
)
def test_nothing_but_health_answers_without_the_key(url, headers):
    answers = [raw_request(url, method, path, headers) for method in METHODS for path in PATHS]
    assert {answer.status for answer in answers} == {401}
    assert {answer.headers["www-authenticate"] for answer in answers} == {"Bearer"}


def test_health_needs_no_key(url):
    assert httpx.get(url.removesuffix("/v1") + "/health").json() == {"status": "ok"}


def test_without_a_key_set_none_is_asked_for():
    with served({"echo": Echo()}, key=None) as url:
        assert httpx.get(f"{url}/models").status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil", "", "[", "127.0.0.2", "é"]
)
def test_requests_addressed_to_another_host_are_refused(raw, host):
    answer = raw.get("/models", headers={"Host": host.encode()})
    assert answer.status_code == 421
    assert answer.json()["error"]["code"] == "wrong_host"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:9", "[::1]:8000"])
def test_loopback_names_are_answered(raw, host):
    assert raw.get("/models", headers={"Host": host}).status_code == 200


def test_no_page_of_another_origin_may_read_an_answer(raw):
    answer = raw.get("/models", headers={"Origin": "http://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_serving_the_network_without_a_key_is_refused():
    with pytest.raises(ConfigError, match="without a key"):
        gateway.serve({}, host="0.0.0.0")


def test_a_port_that_is_taken_is_said_plainly(url):
    port = int(url.split(":")[2].removesuffix("/v1"))
    with pytest.raises(ConfigError, match="cannot be listened on"):
        gateway.serve({}, port=port)


# --- many clients


def test_small_answers_do_not_wait_for_acknowledgements(raw):
    seconds = [raw.get("/models").elapsed.total_seconds() for _ in range(10)]
    assert min(seconds) < 0.03, "a delayed acknowledgement alone takes 40 ms"


def test_one_request_at_a_time_and_the_server_stays_responsive(raw, echo, url):
    slow = {**CHAT, "messages": [{"role": "user", "content": "SLOW"}]}
    with ThreadPoolExecutor(3) as pool:
        answers = [
            pool.submit(raw.post, "/chat/completions", json={**slow, "stream": stream})
            for stream in (False, True, False)
        ]
        time.sleep(0.1)
        began = time.perf_counter()
        assert httpx.get(url.removesuffix("/v1") + "/health").status_code == 200
        waited = time.perf_counter() - began
        assert [answer.result().status_code for answer in answers] == [200, 200, 200]
    assert waited < 0.3, "the slow answers took 0.4 s each"
    assert not echo.overlapped


def test_too_many_waiting_requests_are_told_to_come_back(monkeypatch):
    monkeypatch.setattr(gateway, "MAX_WAITING", 2)
    slow = {**CHAT, "messages": [{"role": "user", "content": "SLOW"}]}
    with (
        served({"echo": Echo()}, key=None) as url,
        ThreadPoolExecutor(4) as pool,
    ):
        posts = [pool.submit(httpx.post, f"{url}/chat/completions", json=slow) for _ in range(4)]
        answers = [post.result() for post in posts]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 2
    assert all(answer.headers["retry-after"] == "1" for answer in refused)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_generation(stream):
    echo = Echo()
    body = {**CHAT, "messages": [{"role": "user", "content": "ENDLESS"}]}
    body |= {"stream": stream}
    with served({"echo": echo}, key=None) as url:
        # One leaves after some pieces, the other when it has waited long enough.
        leaving = httpx.Client(timeout=30 if stream else 2)
        with (
            contextlib.suppress(httpx.TimeoutException),
            leaving.stream("POST", f"{url}/chat/completions", json=body) as answer,
        ):
            for _ in zip(range(20), answer.iter_lines(), strict=False):
                pass
            assert not echo.closed.is_set(), "while the client listens, it goes on"
        leaving.close()
        assert echo.closed.wait(5), "it stops soon"
        assert echo.pieces > 5
        assert httpx.post(f"{url}/chat/completions", json=CHAT).status_code == 200


def test_a_client_that_leaves_while_it_sends_is_no_fault(capsys):
    with served({"echo": Echo()}, key=None) as url:
        host, port = url.split("/")[2].split(":")
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
            "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
        )
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode())
            time.sleep(0.1)  # until its body is waited for
        assert httpx.post(f"{url}/chat/completions", json=CHAT).status_code == 200
    assert capsys.readouterr().err == ""


def test_who_asks_first_is_answered_first():
    echo = Echo()
    words = ["SLOW", "b", "c", "d", "e", "f"]
    with served({"echo": echo}, key=None) as url, contextlib.ExitStack() as open_connections:
        asked = []
        for at, word in enumerate(words):
            connection = http.client.HTTPConnection(url.split("/")[2], timeout=20)
            open_connections.enter_context(contextlib.closing(connection))
            message = {"role": "user", "content": word}
            body = json.dumps({**CHAT, "messages": [message], "stream": at % 2 == 0})
            path, kind = "/v1/chat/completions", {"Content-Type": "application/json"}
            connection.request("POST", path, body, kind)
            asked.append(connection)
            time.sleep(0.02)
        assert [connection.getresponse().status for connection in asked] == [200] * 6
    assert echo.asked == words


SLOW_SERVER = """
import signal, time
from metier.records import Completion
from metier.serving import gateway
signal.signal(signal.SIGINT, signal.default_int_handler)
class Slow:
    name = "slow"
    def stream(self, chat, **options):
        for at in range(int(chat[-1]["content"])):
            yield f"{at} "
            time.sleep(0.1)
        return Completion("all", 1, 1)
gateway.serve({"slow": Slow()}, port=0, ready=lambda url: print(url, flush=True))
"""


@contextlib.contextmanager
def slow_stream(pieces):
    """A server of its own in the middle of an answer; yields process, address, open answer."""
    command = [sys.executable, "-c", SLOW_SERVER]
    body = {"model": "slow", "stream": True, "messages": [{"role": "user", "content": pieces}]}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            url = process.stdout.readline().decode().strip()
            with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=20) as answer:
                yield process, url, answer
        finally:
            process.kill()


def test_an_answer_that_is_being_streamed_is_finished_when_the_server_is_told_to_end():
    with slow_stream("12") as (process, url, answer):
        lines = answer.iter_lines()
        assert "assistant" in next(lines)
        process.send_signal(signal.SIGINT)
        rest = [line for line in lines if line]
        assert "11 " in rest[-3]
        assert rest[-1] == "data: [DONE]"
        assert process.wait(10) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/models")
        assert process.stderr.read() == b""


def test_told_twice_the_server_ends_at_once():
    with slow_stream("1000") as (process, _, answer):
        lines = answer.iter_lines()
        assert "assistant" in next(lines)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert process.wait(5) == 0
        assert b"Traceback" not in process.stderr.read()


def test_a_client_that_left_the_queue_costs_nothing():
    echo = Echo()
    slow = {**CHAT, "messages": [{"role": "user", "content": "SLOW"}]}
    with served({"echo": echo}, key=None) as url, ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx.post, f"{url}/chat/completions", json=slow)
        time.sleep(0.1)
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{url}/chat/completions", json=CHAT, timeout=0.1)
        assert first.result().status_code == 200
    assert echo.asked == ["SLOW"]
