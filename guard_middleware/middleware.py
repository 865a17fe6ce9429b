"""The guard as ASGI middleware: it wraps any application that serves a VLM API, and is the reverse proxy's core.

    app = GuardMiddleware(app, config="guard.yaml")          # Starlette: app.add_middleware(GuardMiddleware, ...)

Every request is read whole, parsed strictly, judged, and only then handed to the wrapped application as the
re-encoded value that was judged; the answer is held until its own verdict. This module does the I/O and
obeys a ``Transaction``; what is allowed is decided there.

Refuses, before any verdict: unknown routes and methods (404, 405), WebSockets (403), bodies with a content coding or
another type than JSON (415), bodies beyond the limits (413) or slower than them (408).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard_middleware import config as configuration
from guard_middleware import dialects, enforce
from guard_middleware.commands import Ask, Begin, Call, Command, End, Forward, Judged, Respond, Rest, Send, Stop
from guard_middleware.dialects.base import Headers, Options, Reply
from guard_middleware.errors import (
    ConfigError,
    GuardMiddlewareError,
    RejectKind,
    RequestRejected,
    UpstreamError,
    UpstreamErrorKind,
)
from guard_middleware.reading import ClientGone, path_of, query_of, read_body, with_media
from guard_middleware.runtime import Runtime
from guard_middleware.strictjson import StrictJSONError, loads
from guard_middleware.telemetry import HOLD_BACK
from guard_middleware.transaction import Transaction
from guard_middleware.wire import ModerationRequest

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope
    from starlette.types import Send as ASGISend

logger = logging.getLogger(__name__)

_ForClient = Respond | Begin | Send | Rest | End
#: bytes of released answer that a client has not taken yet; past it the upstream waits
_BACKLOG = 256 * 1024


class GuardMiddleware:
    """Wraps ``app``. ``config`` is a ``Config`` or the path of its file; ``runtime`` replaces what it would build.

    ``unguarded`` names exact paths of ``app`` that carry no content, such as ``/health``: their GET and HEAD go to it
    UNREAD. Paths are those below where the host has mounted the middleware (``root_path``). Raises ``ConfigError`` for
    a configuration that must not start. The worker is started in the ASGI lifespan, or at the first request where the
    host runs none.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        config: configuration.Config | str | Path | None = None,
        runtime: Runtime | None = None,
        unguarded: Collection[str] = (),
    ) -> None:
        for path in unguarded:
            if not path.startswith("/"):
                raise ConfigError(f"unguarded: {path!r} is no path", remedy='write it like unguarded=["/health"]')
        self._unguarded = frozenset(path.encode() for path in unguarded)
        if runtime is None:
            if isinstance(config, str | Path):
                config = configuration.load(str(config))
            runtime = Runtime(config or configuration.Config())
        self.app, self.runtime = app, runtime

    async def __call__(self, scope: Scope, receive: Receive, send: ASGISend) -> None:
        if scope["type"] == "http":
            if scope["method"] in ("GET", "HEAD") and path_of(scope) in self._unguarded:
                return await self.app(scope, receive, send)
            await self.runtime.start()
            await _Exchange(self.app, self.runtime, scope, receive, send).run()
        elif scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        else:  # a WebSocket would carry content past the guard
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    async def _lifespan(self, scope: Scope, receive: Receive, send: ASGISend) -> None:
        pending = [await receive()]
        try:
            await self.runtime.start(wait=True)
        except GuardMiddlewareError as error:
            await self.runtime.aclose()
            # Said, not raised: a server takes an exception here for an application without lifespan, and serves on.
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return

        async def starting() -> Message:
            return pending.pop() if pending else await receive()

        async def stopping(message: Message) -> None:
            if message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed", "lifespan.startup.failed"):
                await self.runtime.aclose()
            await send(message)

        await self.app(scope, starting, stopping)


class _Exchange:
    """One HTTP request: reads, asks, forwards and sends as its transaction commands.

    Questions and the upstream call are tasks that feed the transaction, and go on with what it commands next; what it
    commands for the client waits in ``_outbox`` for the one loop that sends.
    """

    def __init__(self, app: ASGIApp, runtime: Runtime, scope: Scope, receive: Receive, send: ASGISend) -> None:
        self._app, self._runtime, self._scope, self._receive, self._send = app, runtime, scope, receive, send
        self._path = path_of(scope)
        self._headers: Headers = tuple(scope["headers"])
        self._tx = Transaction(
            f"gd_{secrets.token_hex(12)}",
            scope["method"],
            self._path.decode("latin-1"),
            limits=runtime.config.limits,
            created=int(time.time()),
        )
        self._span = runtime.telemetry.request(
            scope["method"], scope["path"], list(self._headers), scope.get("scheme", "http")
        )
        self._outbox: asyncio.Queue[_ForClient | BaseException] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._upstream: asyncio.Task[None] | None = None
        self._after: asyncio.Task[Any] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._may_read = asyncio.Event()
        self._begun = self._gone = False
        self._waiting_bytes = 0
        self._first_byte: float | None = None
        self._held_for = 0.0
        self._who = ""

    async def run(self) -> None:
        tx = self._tx
        try:
            try:
                self._do(await self._open())
            except RequestRejected as error:
                self._do(tx.fail(error))
            await self._serve()
        except ClientGone:
            tx.abort("client_disconnected")
        except asyncio.CancelledError:
            tx.abort("client_disconnected" if self._gone else "cancelled")
            if not self._gone:
                raise
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
        except Exception as error:
            # A defect here must become neither a pass nor an answer without a record.
            logger.exception("request %s failed inside the guard", tx.id)
            tx.abort(f"internal_{type(error).__name__}")
            if not self._begun:  # else the connection breaks off, which no client takes for an end
                with contextlib.suppress(Exception):
                    await self._reply(enforce.internal_error(tx.id))
        finally:
            for task in self._tasks:
                task.cancel()
            try:
                if self._tasks:
                    await asyncio.gather(*self._tasks, return_exceptions=True)
            finally:  # a second cancellation, as anyio sends it on every turn of the loop, must not cost the record
                record = tx.record(() if self._first_byte is None else ((HOLD_BACK, self._held_for),))
                self._runtime.audit.write(record, trace_id=self._span.trace_id)
                self._span.finish(record)
                self._runtime.caches.settled(record)
        if self._after is not None:  # it lives as long as without us: the server waits for it, and may cancel it
            await self._after

    def _do(self, commands: Sequence[Command]) -> None:
        for command in commands:
            match command:
                case Ask() | Forward():
                    task = self._start(self._work, command)
                    if isinstance(command, Forward):
                        self._upstream = task
                case Stop():
                    if self._upstream is not None and self._upstream is not asyncio.current_task():
                        self._upstream.cancel()
                case _:
                    self._waiting_bytes += len(command.data) if isinstance(command, Send) else 0
                    self._outbox.put_nowait(command)
        self._gate()

    def _gate(self) -> None:
        """Lets the upstream go on, or holds it: for a slow client, and where the guard has to catch up."""
        if self._tx.paused or self._waiting_bytes > _BACKLOG:
            self._may_read.clear()
        else:
            self._may_read.set()

    def _start(self, work: Callable[..., Coroutine[Any, Any, None]], *given: Any) -> asyncio.Task[None]:
        task = asyncio.create_task(self._guarded(work, *given))
        self._tasks.add(task)
        return task

    async def _guarded(self, work: Callable[..., Coroutine[Any, Any, None]], *given: Any) -> None:
        """Feeds whatever breaks in ``work`` to the transaction, and a defect to ``run``."""
        task = asyncio.current_task()
        assert task is not None
        try:
            try:
                await work(*given)
            except UpstreamError as error:
                self._do(self._tx.fail(error))
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            self._outbox.put_nowait(RuntimeError("what the request waited for was cancelled"))
        except Exception as error:
            self._outbox.put_nowait(error)
        finally:
            self._tasks.discard(task)

    async def _work(self, command: Ask | Forward) -> None:
        """A question or the upstream call; where what comes of it is one more of them, that is done in this task."""
        while True:
            if isinstance(command, Forward):
                self._upstream = asyncio.current_task()
                commands = await self._forward(command.body)
            else:
                commands = await self._ask(command.call)
            if not commands or not isinstance(commands[-1], Ask | Forward):
                return self._do(commands)
            self._do(commands[:-1])
            command = commands[-1]

    async def _serve(self) -> None:
        """Sends what the transaction commands, until it is closed."""
        while True:
            try:
                async with asyncio.timeout(self._tx.keep_alive):
                    command = await self._outbox.get()
            except TimeoutError:
                self._do(self._tx.silent())
                continue
            await self._remember()
            match command:
                case BaseException():
                    raise command
                case Respond(reply):
                    self._held(time.perf_counter())
                    self._watcher_off()
                    return await self._reply(reply)
                case Begin(status, headers):
                    self._begun = True
                    await self._send({"type": "http.response.start", "status": status, "headers": list(headers)})
                case Send(data, says):
                    if says:
                        self._held(time.perf_counter())
                    await self._send({"type": "http.response.body", "body": data, "more_body": True})
                    self._waiting_bytes -= len(data)
                    self._gate()
                case Rest(pieces):
                    self._held(time.perf_counter())
                    for data in pieces:
                        await self._send({"type": "http.response.body", "body": data, "more_body": True})
                    return await self._end()
                case End():
                    self._held(time.perf_counter())
                    return await self._end()

    async def _end(self) -> None:
        self._watcher_off()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _held(self, now: float) -> None:
        """The time from the upstream's first byte to the first text that left, or to the end without any."""
        if self._first_byte is not None and not self._held_for:
            self._held_for = now - self._first_byte

    # -- the request --

    async def _open(self) -> list[Command]:
        runtime = self._runtime
        route = dialects.route(self._scope["method"], self._path)
        who = runtime.policies.identify(
            self._headers, client=self._scope.get("client"), server=self._scope.get("server")
        )
        policy = runtime.policies.resolve(
            path=self._path.decode("latin-1"), tenant=who.tenant, api_key=who.api_key, peer_trusted=who.peer_trusted
        )
        options = runtime.options.get(route.dialect.name, Options()) if route.dialect else Options()
        self._tx.routed(route.dialect, options, policy)
        if route.dialect is None:
            self._watch()
            return self._tx.pass_through()
        limits = runtime.config.limits
        body = await read_body(self._headers, self._receive, limits)
        self._watch()
        try:
            value = loads(body, max_depth=limits.json_depth)
        except StrictJSONError as error:
            raise RequestRejected(RejectKind.INVALID_JSON, str(error)) from None
        parsed = route.dialect.parse_request(value, limits, options)
        if parsed.sites:
            parsed = await with_media(parsed, runtime.image, limits)
        self._who = runtime.caches.scopes.of(who.tenant, self._headers)
        if parsed.continues is not None:
            parsed = parsed.with_history(await runtime.caches.history.find(self._who, parsed.continues))
        return self._tx.request(parsed)

    async def _remember(self) -> None:
        """Keeps what a later request may continue, before the client has the whole answer and can do so."""
        history, self._tx.history = self._tx.history, None
        if history is not None:
            await self._runtime.caches.history.remember(self._who, *history)

    # -- the guard --

    async def _ask(self, call: Call) -> list[Command]:
        span = self._span.guard_call(call.source, call.choice)
        started = time.perf_counter()
        rules = call.rules
        question = ModerationRequest(
            call.id, call.conversation, call.source, rules.deadline, rules.reader, span.traceparent, rules.judging
        )
        outcome = await self._runtime.guard(rules).moderate(question)
        judged = Judged(call, outcome, time.perf_counter() - started)
        try:
            return self._tx.judged(judged)  # raises where an answer that came before it cannot be screened
        finally:
            span.end(outcome, self._tx.calls[-1].decision)

    # -- the upstream --

    async def _forward(self, body: bytes) -> list[Command]:
        headers = enforce.strip_request_headers(self._runtime.public_headers(self._headers))
        if body:
            headers = (*headers, (b"content-type", b"application/json"), _length(body))
        self._span.upstream_started(self._tx.model, remote=self._runtime.remote)
        scope = {**self._scope, "headers": list(self._span.inject(headers)), "query_string": query_of(self._scope)}
        return await _UpstreamCall(self, body).run(scope)

    # -- the client --

    def _watch(self) -> None:
        """From here on a disconnect cancels whatever this request waits for. Only legal once the body is read."""
        task = asyncio.current_task()
        assert task is not None

        async def watch() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            self._gone = True
            task.cancel()

        self._watcher = self._start(watch)

    def _watcher_off(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()

    async def _reply(self, reply: Reply) -> None:
        headers = [*reply.headers, _length(reply.body)]
        if reply.status == 408 and self._scope.get("http_version", "1.1") < "2":
            headers.append((b"connection", b"close"))  # the rest of that body must not keep it open
        await self._send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": reply.body})


class _UpstreamCall:
    """One call to the wrapped application, in the task that makes it: what it reads, what it says, how that ended."""

    def __init__(self, exchange: _Exchange, body: bytes) -> None:
        self._exchange, self._tx, self._span = exchange, exchange._tx, exchange._span
        self._pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        self._complete = False
        self._broken: UpstreamError | None = None
        self._task = asyncio.current_task()
        self._leaving: asyncio.Handle | None = None

    async def run(self, scope: Scope) -> list[Command]:
        """What the transaction commands at the answer's end; raises ``UpstreamError``."""
        try:
            await self._exchange._app(scope, self._receive, self._send)
            if self._broken is None and not self._complete:
                self._broken = UpstreamError(UpstreamErrorKind.RESET, "the answer ended early")
        except UpstreamError as error:
            self._broken = self._broken or error
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and _is_cancelled():
                raise
            if self._broken is None:
                logger.exception("request %s: the wrapped application failed", self._tx.id)
                self._broken = UpstreamError(UpstreamErrorKind.RESET, "the application failed")
        finally:
            if self._leaving is not None:
                self._leaving.cancel()
            if self._exchange._after is None:
                self._span.upstream_ended(None if self._broken is None else self._broken.kind.value)
        if self._exchange._after is not None:
            return []
        if self._broken is not None:
            raise self._broken
        return self._tx.upstream_end()

    async def _receive(self) -> Message:
        if self._pending:
            return self._pending.pop()
        await asyncio.get_running_loop().create_future()  # no disconnect but our own cancellation
        raise AssertionError

    async def _send(self, message: Message) -> None:
        exchange = self._exchange
        if self._broken is not None or exchange._after is not None:
            return  # a host's error handler that still wants to answer
        try:
            if message["type"] == "http.response.start":
                self._tx.upstream_head(message["status"], tuple(message.get("headers", ())))
            elif message["type"] == "http.response.body":
                exchange._first_byte = exchange._first_byte or time.perf_counter()
                exchange._do(self._tx.upstream_data(message.get("body", b"")))
                self._complete = not message.get("more_body", False)
                if self._complete:
                    self._leaving = asyncio.get_running_loop().call_soon(self._leave)
                await exchange._may_read.wait()
        except UpstreamError as error:
            self._broken = error
            raise

    def _leave(self) -> None:
        """The application has answered and goes on, with background tasks: the answer does not wait for them."""
        assert self._task is not None
        self._exchange._tasks.discard(self._task)
        self._exchange._after = self._task
        self._span.upstream_ended(None)
        self._exchange._start(self._answered)

    async def _answered(self) -> None:
        self._exchange._do(self._tx.upstream_end())


def _is_cancelled() -> bool:
    """Whether a ``CancelledError`` is meant for this task: else it awaited what somebody else cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _length(body: bytes) -> tuple[bytes, bytes]:
    return b"content-length", str(len(body)).encode("ascii")
