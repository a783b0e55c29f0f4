"""OpenAI-compatible HTTP over specialists: /v1/chat/completions, /v1/models, /health.

The answer a client gets by default is the one the evaluation measured: the same engine, the same
renderer, greedy. Defences are on by default: loopback only, a key, a list of host names (against
DNS rebinding), limits on body, messages and waiting requests, no cross-origin access, no URL
fetched for a request.

Each specialist has one thread of its own in which its model runs, one request at a time; the event
loop only waits. Who asks first is answered first. A client that goes away ends its generation at
the next piece of text, streamed or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
    Sequence,
)
from collections.abc import Generator as PyGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from metier.errors import ConfigError, MetierError, RemoteError, RequestError
from metier.records import Chat, Completion
from metier.serving.chat_completions import ChatRequest, Refusal, Reply, parse

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_BODY = 4 * 2**20
MAX_WAITING = 64
DRAIN_SECONDS = 30

_GONE = 499  # nobody is there to read it
_STREAM = {"Cache-Control": "no-store"}
_log = logging.getLogger("metier.serving")
_T = TypeVar("_T")


class Specialist(Protocol):
    """What the gateway needs of a specialist."""

    @property
    def name(self) -> str:
        """The model's name in the API."""
        ...

    def stream(
        self,
        chat: Chat,
        *,
        max_new_tokens: int | None,
        temperature: float,
        top_p: float,
        seed: int | None,
        stop: Sequence[str],
    ) -> PyGenerator[str, None, Completion]:
        """Yield the answer piece by piece and return the whole with its counts.

        Without options it is the answer that the evaluation measured.

        Args:
            chat: the conversation, ending with a user message.
            max_new_tokens: longest answer in tokens; None: the task's own limit.
            temperature: 0 is greedy.
            top_p: share of the probability mass that is sampled from.
            seed: seed of the sampling; None: any.
            stop: texts that end the answer; they are not part of it.

        Raises:
            RequestError: the request cannot be answered as asked.

        """
        ...


def create_app(
    specialists: Mapping[str, Specialist],
    api_key: str | None,
    allowed_hosts: Collection[str] = LOOPBACK,
) -> FastAPI:
    """The web application over loaded specialists.

    Args:
        specialists: by the name that clients give as `model`.
        api_key: what clients must send as bearer token; None: nothing is asked for.
        allowed_hosts: host names a request may be addressed to.

    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    engines = {name: _Engine(specialist) for name, specialist in specialists.items()}
    started = int(time.time())

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name, started) for name in engines]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _find(engines, name)
        return _model(name, started)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        try:
            request = parse(await _body(http))
        except ClientDisconnect:
            return Response(status_code=_GONE)
        return await _answer(_find(engines, request.model), request, http)

    _add_error_handlers(app)
    app.add_middleware(
        _Guard, api_key=api_key, allowed_hosts=frozenset(map(str.lower, allowed_hosts))
    )
    return app


def serve(
    specialists: Mapping[str, Specialist],
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    allowed_hosts: Collection[str] = (),
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until interrupted.

    Args:
        specialists: by the name that clients give as `model`.
        host: address to listen on.
        port: port to listen on; 0: any free one.
        api_key: what clients must send; None is accepted on loopback only.
        allowed_hosts: further host names a request may be addressed to.
        ready: called with the base URL once the port is open.

    Raises:
        ConfigError: the port is taken, or the server would stand open to the network.

    """
    if api_key is None and host not in LOOPBACK:
        raise ConfigError(
            f"host {host}",
            "without a key anyone who reaches this address could use the model",
            "set METIER_API_KEY, or serve on 127.0.0.1",
        )
    app = create_app(specialists, api_key, {*LOOPBACK, host, *allowed_hosts})
    with _listen(host, port) as listener:
        address = f"[{host}]" if ":" in host else host
        server = _server(app)
        if ready:
            ready(f"http://{address}:{listener.getsockname()[1]}/v1")
        with contextlib.suppress(KeyboardInterrupt):  # the usual way to end it
            server.run(sockets=[listener])


@contextlib.contextmanager
def listening(specialists: Mapping[str, Specialist], api_key: str) -> Iterator[int]:
    """Serve on a free port of this machine, from a thread, while the context lasts.

    Yields:
        the port, on 127.0.0.1.

    """
    app = create_app(specialists, api_key)
    with _listen("127.0.0.1", 0) as listener:
        server = _server(app)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(DRAIN_SECONDS)


def _server(app: FastAPI) -> uvicorn.Server:
    logging.getLogger("uvicorn.error").addFilter(_is_fault)
    return uvicorn.Server(
        uvicorn.Config(
            app,
            # Its own configuration would close the handlers of all who log in this process.
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
    )


def _is_fault(record: logging.LogRecord) -> bool:
    """Whether a log record tells more than that the end of the server cut off an answer."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay off only where the protocol is named: without it every answer
    # waits 40 ms for an acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        cause = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"{host}:{port}", f"cannot be listened on ({cause})", "choose another --port or --host"
        ) from None
    return listener


class _Engine:
    """One specialist, the one thread its model runs in, and the queue before it.

    A thread of its own, not one of a pool: torch keeps a team of helpers per calling thread.
    """

    def __init__(self, specialist: Specialist) -> None:
        self._specialist = specialist
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="metier-engine")
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def run(
        self, request: ChatRequest, gone: Callable[[], Awaitable[bool]]
    ) -> AsyncGenerator[str | Completion, None]:
        """Yield pieces of text, then the whole; nothing more once the client is gone."""
        async with self._queue():
            if await gone():
                return
            stream = await self._in_thread(lambda: self._start(request))
            try:
                while isinstance(piece := await self._in_thread(lambda: _next(stream)), str):
                    yield piece
                    if await gone():
                        return
                yield piece
            finally:
                # Not awaited: we may be here because the request was cancelled. The thread does
                # this after the step that is still running and before the next request.
                self._thread.submit(stream.close)

    @contextlib.asynccontextmanager
    async def _queue(self) -> AsyncIterator[None]:
        if self._waiting >= MAX_WAITING:
            raise Refusal(429, "Too many requests are waiting; try again.", code="overloaded")
        self._waiting += 1
        try:
            async with self._turn:
                yield
        finally:
            self._waiting -= 1

    def _start(self, request: ChatRequest) -> PyGenerator[str, None, Completion]:
        return self._specialist.stream(
            request.chat,
            max_new_tokens=request.limit,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            stop=request.stop,
        )

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _next(stream: PyGenerator[str, None, Completion]) -> str | Completion:
    """The next piece, or the value the stream returned (a future cannot carry StopIteration)."""
    try:
        return next(stream)
    except StopIteration as end:
        completion: Completion = end.value
        return completion


async def _answer(engine: _Engine, request: ChatRequest, http: Request) -> Response:
    pieces = engine.run(request, http.is_disconnected)
    reply = Reply(request.model, request.include_usage)
    try:
        # The first piece is made before the status is sent, so that what is wrong with the
        # request can still be said with a proper one.
        piece = await anext(pieces)
        if request.stream:
            events = _events(reply, piece, pieces)
            return _EventStream(events, headers=_STREAM, media_type="text/event-stream")
        while isinstance(piece, str):
            piece = await anext(pieces)
    except StopAsyncIteration:
        return Response(status_code=_GONE)
    except Exception as error:
        return _error_response(_refusal(error))
    return JSONResponse(reply.whole(piece))


class _EventStream(StreamingResponse):
    """A streamed answer whose generation ends with it, however it ends."""

    body_iterator: AsyncGenerator[str, None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)


async def _events(
    reply: Reply, piece: str | Completion, pieces: AsyncGenerator[str | Completion, None]
) -> AsyncGenerator[str, None]:
    """Server-sent events of one answer, whose first piece is already made."""
    async with contextlib.aclosing(pieces):
        yield _event(reply.opening())
        try:
            while isinstance(piece, str):
                if piece:
                    yield _event(reply.piece(piece))
                piece = await anext(pieces)
        except StopAsyncIteration:
            return
        except Exception as error:
            yield _event(_refusal(error).body())
            return
        yield _event(reply.closing(piece))
        if reply.include_usage:
            yield _event(reply.usage(piece))
        yield "data: [DONE]\n\n"


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _body(http: Request) -> bytes:
    """The body of a request, refused before it is held in memory when it is too long.

    Only JSON is read: a web page cannot send that to another origin without asking first.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "Send the request as Content-Type: application/json.")
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise Refusal(413, f"The body is longer than {MAX_BODY:,} bytes.")
    return bytes(body)


def _find(engines: Mapping[str, _Engine], name: str) -> _Engine:
    if name not in engines:
        known = ", ".join(engines)
        message = f"The model '{name[:200]}' does not exist here; there is: {known}."
        raise Refusal(404, message, "model", "model_not_found")
    return engines[name]


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "metier"}


def _add_error_handlers(app: FastAPI) -> None:
    async def handle(_: Request, error: Exception) -> Response:
        response = _error_response(_refusal(error))
        response.headers.update(getattr(error, "headers", None) or {})  # `Allow` of a 405
        return response

    app.add_exception_handler(Refusal, handle)
    app.add_exception_handler(HTTPException, handle)


def _refusal(error: Exception) -> Refusal:
    """What the client is told of an error: its own mistakes in full, ours without details."""
    match error:
        case Refusal():
            return error
        case RequestError():
            message = f"{error.place}: {error.cause}; {error.remedy}."
            return Refusal(400, message, error.place, error.code)
        case RemoteError():
            return Refusal(502, f"{error.place}: {error.cause}", code="upstream_error")
        case MetierError():
            return Refusal(400, f"{error.place}: {error.cause}. {error.remedy}")
        case HTTPException():
            return Refusal(error.status_code, f"{error.detail}.")
    _log.error("a request failed", exc_info=error)
    return Refusal(500, "The server failed to answer; its log says why.")


def _error_response(refusal: Refusal) -> Response:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
    return JSONResponse(
        refusal.body(), status_code=refusal.status, headers=headers.get(refusal.status)
    )


class _Guard:
    """Refuses requests addressed to another host, and those without the key, before any route.

    The path is taken from the request line alone: a name built from the Host header would let a
    client choose which rule applies to it.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, allowed_hosts: frozenset[str]) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._hosts = allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._check(scope) if scope["type"] != "lifespan" else None
        app = _error_response(refusal) if refusal else self._app
        await app(scope, receive, send)

    def _check(self, scope: Scope) -> Refusal | None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1 or _host_name(hosts[0]) not in self._hosts:
            return Refusal(421, "This server does not answer for that host.", code="wrong_host")
        if self._key is None or scope["path"] == "/health":
            return None
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if scheme.lower() == b"bearer" and secrets.compare_digest(key.strip(), self._key):
            return None
        return Refusal(
            401,
            "The API key is missing or wrong: 'Authorization: Bearer KEY'.",
            None,
            "invalid_api_key",
        )


def _host_name(header: bytes) -> str | None:
    try:
        return urlsplit(f"//{header.decode('ascii')}").hostname
    except ValueError:
        return None
