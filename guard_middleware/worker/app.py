"""The worker's ASGI app: questions in (``wire`` frames), answers out (``wire`` JSON), and what operators ask it.

    POST /v1/moderate     one frame, one answer; the status says what the body says
    WebSocket /v1/session frames multiplexed, answered as they are done; ``{"cancel": id}`` as a text message
    GET  /health          the process is alive and its engine is not stuck
    GET  /ready           the model is loaded and has produced an output; 503 before
    GET  /metrics         Prometheus text format

The model is loaded behind the open socket, so that ``/health`` and ``/ready`` answer from the first moment.
A question ends when its deadline is over, when its caller goes away or when it is cancelled, whichever is first.

Refuses: a frame beyond ``max_frame`` (413, or close 1009), one that ``wire`` refuses or whose deadline is no
duration (400, or close 1007), another media type (415), a browser's WebSocket (403: it carries an Origin), an id that
is already in flight on its session (close 1008).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Protocol

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from guard_middleware.errors import GuardError, GuardErrorKind, GuardMiddlewareError
from guard_middleware.types import Verdict
from guard_middleware.wire import CONTENT_TYPE, ModerationRequest, WireError, decode_request, encode_answer
from guard_middleware.worker.metrics import CONTENT_TYPE as METRICS_TYPE
from guard_middleware.worker.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_FRAME = 128 * 1024 * 1024
_WATCH_SECONDS = 1.0
_SLACK = 0.02
_STATUS = {
    GuardErrorKind.TIMEOUT: 504,
    GuardErrorKind.OVERLOADED: 503,
    GuardErrorKind.UNAVAILABLE: 503,
    GuardErrorKind.INTERNAL: 500,
}


_NOBODY = Response(status_code=499)  # for a caller that has gone


class Guard(Protocol):
    """A loaded guard, as the app sees it."""

    @property
    def model(self) -> str: ...

    @property
    def revision(self) -> str: ...

    async def moderate(self, request: ModerationRequest, deadline: float) -> Verdict:
        """The verdict before ``deadline`` (loop time), or ``GuardError``. Cancelling it stops the work."""
        ...

    def gauges(self) -> Mapping[str, float]:
        """Name -> value, as of now."""
        ...

    def stalled(self) -> float:
        """Seconds for which the engine has been busy with work that nobody waits for; 0 in health, infinite if dead."""
        ...

    async def aclose(self) -> None: ...


class Worker:
    """The app and its state. ``load`` makes the guard, warm-up included; it may take minutes and may raise.

    ``max_in_flight`` bounds the questions of one connection: more than the guard takes, so that it says itself when to
    come back. ``on_ready`` is told once. ``on_failed`` is told when the guard cannot be loaded, or its engine is stuck
    for ``stall_seconds``: the process is then of no use and should end with a message.
    """

    def __init__(
        self,
        load: Callable[[Metrics], Awaitable[Guard]],
        *,
        max_frame: int = MAX_FRAME,
        max_in_flight: int = 1024,
        stall_seconds: float = 60.0,
        on_ready: Callable[[Guard], None] = lambda guard: None,
        on_failed: Callable[[str], None] = lambda why: None,
    ) -> None:
        self._load, self._max_frame, self._max_in_flight = load, max_frame, max_in_flight
        self._stall_seconds, self._on_ready, self._on_failed = stall_seconds, on_ready, on_failed
        self._guard: Guard | None = None
        self._failure: str | None = None
        self._in_flight = 0
        self.metrics = Metrics()
        self.asgi = Starlette(
            routes=[
                Route("/v1/moderate", self._moderate, methods=["POST"]),
                WebSocketRoute("/v1/session", self._session),
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/metrics", self._metrics),
            ],
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(self._live(), name="guard-load")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if self._guard is not None:
                await self._guard.aclose()

    async def _live(self) -> None:
        try:
            self._guard = await self._load(self.metrics)
        except Exception as error:
            defect = not isinstance(error, GuardMiddlewareError)
            logger.error("the guard cannot be loaded: %s: %s", type(error).__name__, error, exc_info=defect)
            self._fail(f"the guard cannot be loaded: {error}")
            return
        self._on_ready(self._guard)
        while self._guard.stalled() < self._stall_seconds:  # noqa: ASYNC110 - a thread that hangs sets no event
            await asyncio.sleep(_WATCH_SECONDS)
        stuck = math.isfinite(self._guard.stalled())
        self._fail(f"the engine has been stuck for {self._stall_seconds:g} s" if stuck else "the engine has died")

    def _fail(self, why: str) -> None:
        self._failure = why
        self._on_failed(why)

    async def _answer(self, request: ModerationRequest) -> Verdict | GuardError:
        """Total, but for cancellation."""
        guard, loop = self._guard, asyncio.get_running_loop()
        outcome: Verdict | GuardError
        if guard is None or self._failure is not None:
            why = self._failure or "the guard is being loaded"
            outcome = GuardError(GuardErrorKind.UNAVAILABLE, why, retry_after=1.0)
            self.metrics.outcome(outcome, 0.0)
            return outcome
        started = loop.time()
        deadline = started + request.deadline
        self._in_flight += 1
        try:
            async with asyncio.timeout_at(deadline + _SLACK):  # the guard's own timeout says where the time went
                outcome = await guard.moderate(request, deadline)
            if (outcome.response is None) != (request.conversation.answer is None):
                outcome = GuardError(GuardErrorKind.INTERNAL, "the verdict does not label what it was asked to judge")
        except TimeoutError:
            outcome = GuardError(GuardErrorKind.TIMEOUT, "no verdict before the deadline")
        except GuardError as error:
            outcome = error
        except asyncio.CancelledError:
            self.metrics.cancelled()
            _log(request, "cancelled", loop.time() - started)
            raise
        except Exception as error:
            logger.exception("a defect in the worker")
            outcome = GuardError(GuardErrorKind.INTERNAL, f"a defect in the worker ({type(error).__name__})")
        finally:
            self._in_flight -= 1
        seconds = loop.time() - started
        self.metrics.outcome(outcome, seconds)
        _log(request, outcome, seconds)
        return outcome

    # -- one question per request

    async def _moderate(self, request: Request) -> Response:
        if request.headers.get("content-type") != CONTENT_TYPE:
            return _http("", GuardError(GuardErrorKind.INTERNAL, f"the body must be {CONTENT_TYPE}"), 415)
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > self._max_frame:
                    return _http("", GuardError(GuardErrorKind.TOO_LONG, "the frame is too large"), 413)
            question = _question(bytes(body))
        except WireError as error:
            return _http("", GuardError(GuardErrorKind.INTERNAL, str(error)), 400)
        except ClientDisconnect:
            return _NOBODY
        answer = asyncio.create_task(self._answer(question))
        gone = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                return _NOBODY
            outcome = answer.result()
        finally:
            answer.cancel()
            gone.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)
        return _http(question.id, outcome)

    # -- many questions on one connection

    async def _session(self, socket: WebSocket) -> None:
        if "origin" in socket.headers:
            await socket.close()
            return
        await socket.accept()
        tasks: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                message = await socket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                code = self._take(socket, tasks, message.get("text"), message.get("bytes"))
                if code is not None:
                    await socket.close(code)
                    return
        except WebSocketDisconnect:
            return
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    def _take(
        self, socket: WebSocket, tasks: dict[str, asyncio.Task[None]], text: str | None, frame: bytes | None
    ) -> int | None:
        """One message of a session; the close code where it must end it. Never waits: the peer's close comes next."""
        try:
            if text is not None:
                task = tasks.get(_cancelled_id(text))
                if task is not None:
                    task.cancel()
                return None
            question = _question(frame or b"")
        except WireError as error:
            logger.error("closing a session: %s", error)
            return 1007
        if question.id in tasks:
            return 1008
        if len(tasks) >= self._max_in_flight:
            full = GuardError(GuardErrorKind.OVERLOADED, "too many questions on one connection", retry_after=1.0)
            self.metrics.outcome(full, 0.0)
            tasks[question.id] = asyncio.create_task(_send(socket, question.id, full))
        else:
            tasks[question.id] = asyncio.create_task(self._ask(socket, question))
        tasks[question.id].add_done_callback(lambda task: tasks.pop(question.id, None))
        return None

    async def _ask(self, socket: WebSocket, question: ModerationRequest) -> None:
        await _send(socket, question.id, await self._answer(question))

    # -- operators

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"failure": self._failure}, 503 if self._failure else 200)

    async def _ready(self, request: Request) -> Response:
        if self._guard is None or self._failure is not None:
            return JSONResponse({"ready": False, "why": self._failure or "loading"}, 503)
        return JSONResponse({"ready": True, "model": self._guard.model, "revision": self._guard.revision})

    async def _metrics(self, request: Request) -> Response:
        ready = self._guard is not None and self._failure is None
        gauges = {"ready": float(ready), "in_flight": float(self._in_flight)}
        if self._guard is not None:
            gauges.update(self._guard.gauges())
        return PlainTextResponse(self.metrics.exposition(gauges), media_type=METRICS_TYPE)


def _question(frame: bytes) -> ModerationRequest:
    question = decode_request(frame)
    if not 0.0 <= question.deadline < math.inf:
        raise WireError("the deadline is not a duration")
    return question


def _cancelled_id(text: str) -> str:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        raise WireError("a text message that is not JSON") from None
    match body:
        case {"cancel": str(id)} if len(body) == 1:
            return id
        case _:
            raise WireError("an unknown text message")


async def _send(socket: WebSocket, id: str, outcome: Verdict | GuardError) -> None:
    with suppress(WebSocketDisconnect, RuntimeError):  # the peer has gone; its session ends by itself
        await socket.send_bytes(encode_answer(id, outcome))


def _http(id: str, outcome: Verdict | GuardError, status: int | None = None) -> Response:
    headers = {}
    if isinstance(outcome, GuardError):
        status = status or _STATUS.get(outcome.kind, 422)
        if outcome.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(outcome.retry_after)))
    return Response(encode_answer(id, outcome), status or 200, headers, media_type="application/json")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _log(request: ModerationRequest, outcome: Verdict | GuardError | str, seconds: float) -> None:
    if not logger.isEnabledFor(logging.INFO):
        return
    fields: dict[str, object] = {"id": request.id[:200], "source": request.source, "seconds": round(seconds, 4)}
    if isinstance(request.traceparent, str):
        fields["traceparent"] = request.traceparent
    match outcome:
        case Verdict():
            fields |= {"request": outcome.request, "response": outcome.response}
            fields |= {"prompt_tokens": outcome.usage.prompt, "completion_tokens": outcome.usage.completion}
        case GuardError():
            fields["error"] = outcome.kind.value
        case _:
            fields["error"] = outcome
    logger.info("moderated", extra={"fields": fields})
