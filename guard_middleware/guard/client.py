"""The gateway's end of the guard: one persistent, multiplexed WebSocket to the worker.

``GuardClient.moderate`` is total. It returns a ``Verdict`` or a ``GuardError`` and raises neither for a worker that
is absent, slow, killed or talking nonsense, nor does it outlive the request's deadline. A dead worker
costs a dictionary look-up, not a connection attempt, until a short back-off is over.

Refuses: an answer that ``wire.decode_answer`` refuses, a text message, a ``retry_after`` that is no
duration (each ends the connection, and with it every question in flight); a verdict with a response label where no
answer was given to judge, or without one where it was, or of another mode than was asked for (an ``internal`` error
of that one question).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.types import Verdict
from guard_middleware.wire import ModerationRequest, WireError, decode_answer, encode_request

logger = logging.getLogger(__name__)

#: bytes of one answer; a longer one is refused
MAX_ANSWER = 8 * 1024 * 1024
#: what a verdict may take past its deadline before this side gives up: the worker's own timeout says more
_SLACK = 0.05
_BACKOFF_MIN, _BACKOFF_MAX = 0.05, 1.0
_CONNECT_SECONDS = 2.0


class GuardClient:
    """Asks the worker at ``address``: the path of its Unix socket, or ``http://127.0.0.1:PORT``.

    Connects at the first question and again whenever it has to. Use from one event loop. ``max_frame`` bounds one
    encoded question in bytes, images included; it must not exceed the worker's own bound.
    """

    def __init__(self, address: str | Path, *, max_frame: int = 128 * 1024 * 1024) -> None:
        self._address, self._max_frame = str(address), max_frame
        self._session: _Session | None = None
        self._connecting: asyncio.Task[_Session | GuardError] | None = None
        self._backoff = 0.0
        self._retry_at = 0.0
        self._count = 0
        self._closed = False
        #: answers to questions that nobody waits for (mostly late ones)
        self.unknown_answers = 0
        #: told whenever a connection has ended: another worker, with other weights, may be behind the next one
        self.on_lost: Callable[[], None] = lambda: None

    async def moderate(self, request: ModerationRequest) -> Verdict | GuardError:
        """The guard's verdict, or why there is none, at most ``request.deadline`` seconds (plus 50 ms) from now.

        Cancelling the caller cancels the question in the worker.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        if not 0.0 < request.deadline < math.inf:
            return GuardError(GuardErrorKind.TIMEOUT, "no time was left to ask the guard")
        try:
            async with asyncio.timeout_at(started + request.deadline + _SLACK):
                outcome = await self._ask(request, started + request.deadline)
        except TimeoutError:
            return GuardError(GuardErrorKind.TIMEOUT, "no verdict before the deadline")
        except GuardError as error:
            return error
        except WireError as error:
            return GuardError(GuardErrorKind.INTERNAL, str(error))
        if isinstance(outcome, Verdict) and (outcome.response is None) != (request.conversation.answer is None):
            return GuardError(GuardErrorKind.INTERNAL, "the verdict does not label what it was asked to judge")
        if isinstance(outcome, Verdict) and outcome.judging != request.judging:
            return GuardError(GuardErrorKind.INTERNAL, "the worker judged in another mode than it was asked to")
        return outcome

    async def _ask(self, request: ModerationRequest, end: float) -> Verdict | GuardError:
        """What the worker says; raises ``GuardError`` and ``WireError``, and ends by cancellation at the latest."""
        session = self._session
        if session is None or session.dead:
            session = await self._connect()
        return await session.ask(*self._framed(request, end))

    def _framed(self, request: ModerationRequest, end: float) -> tuple[str, bytes]:
        """The question under an id that no other has, and its frame with the time that is left until ``end``."""
        self._count += 1
        left = end - asyncio.get_running_loop().time()
        question = replace(request, id=f"{request.id}#{self._count}", deadline=max(left, 0.001))
        frame = encode_request(question)
        if len(frame) > self._max_frame:
            raise GuardError(GuardErrorKind.TOO_LONG, "the content exceeds what one question may hold")
        return question.id, frame

    async def ready(self) -> bool:
        """True if the worker says that it can moderate. Never raises; answers within two seconds."""
        return await self._get("/ready") is not None

    async def identity(self) -> tuple[str, str] | None:
        """Model and revision of the loaded weights; None if the worker does not say that it can moderate. Never
        raises; answers within two seconds."""
        response = await self._get("/ready")
        try:
            return None if response is None else (str(response.json()["model"]), str(response.json()["revision"]))
        except (ValueError, LookupError, TypeError, RecursionError):
            return None

    async def alive(self) -> bool:
        """True if the worker's process answers at all. Never raises; answers within two seconds."""
        return await self._get("/health") is not None

    async def _get(self, path: str) -> httpx.Response | None:
        """An answer of status 200."""
        host = None if self._address.startswith("http") else "http://worker"
        verify = self._address.startswith("https")  # else the CA certificates are read for nothing, on the event loop
        transport = httpx.AsyncHTTPTransport(uds=self._address if host else None, verify=verify)
        try:
            async with httpx.AsyncClient(transport=transport, base_url=host or self._address, timeout=2.0) as client:
                response = await client.get(path)
                return response if response.status_code == 200 else None
        except (httpx.HTTPError, httpx.InvalidURL):
            return None

    async def aclose(self) -> None:
        """Ends the connection; questions in flight, and later ones, are ``unavailable``."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        if self._session is not None:
            await self._session.aclose()

    async def _connect(self) -> _Session:
        """A living session; raises ``GuardError``. One attempt at a time, shared by all who wait."""
        if self._closed:
            raise GuardError(GuardErrorKind.UNAVAILABLE, "the guard client is closed")
        if self._connecting is None:
            wait = self._retry_at - asyncio.get_running_loop().time()
            if wait > 0:
                raise GuardError(GuardErrorKind.UNAVAILABLE, "the guard worker is not reachable", retry_after=1.0)
            self._connecting = asyncio.create_task(self._open(), name="guard-connect")
        connecting = self._connecting
        await asyncio.wait({connecting})  # whoever goes away leaves it to the others, and its end cancels nobody
        if connecting.cancelled():
            raise GuardError(GuardErrorKind.UNAVAILABLE, "the guard client is closed")
        outcome = connecting.result()
        if isinstance(outcome, GuardError):
            raise outcome
        return outcome

    async def _open(self) -> _Session | GuardError:
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                connection = await self._handshake()
        except (OSError, TimeoutError, WebSocketException, ValueError) as error:  # the last: where a redirect goes
            self._backoff = min(max(self._backoff * 2, _BACKOFF_MIN), _BACKOFF_MAX)
            self._retry_at = asyncio.get_running_loop().time() + self._backoff
            logger.warning("guard worker not reachable at %s: %s", self._address, type(error).__name__)
            return GuardError(GuardErrorKind.UNAVAILABLE, "the guard worker is not reachable", retry_after=1.0)
        else:
            self._backoff = 0.0
            self._session = _Session(connection, self)
            return self._session
        finally:
            self._connecting = None

    async def _handshake(self) -> ClientConnection:
        # One host: no compression, and no pings, because the kernel tells when the other process is gone.
        if self._address.startswith("http"):
            uri = f"ws://{urlsplit(self._address).netloc}/v1/session"
            return await connect(
                uri, proxy=None, compression=None, max_size=MAX_ANSWER, ping_interval=None, close_timeout=1.0
            )
        return await unix_connect(
            self._address,
            "ws://worker/v1/session",
            compression=None,
            max_size=MAX_ANSWER,
            ping_interval=None,
            close_timeout=1.0,
        )


class _Session:
    """One connection and the questions in flight on it."""

    def __init__(self, connection: ClientConnection, client: GuardClient) -> None:
        self._connection, self._client = connection, client
        self._pending: dict[str, asyncio.Future[Verdict | GuardError]] = {}
        self._chores: set[asyncio.Task[None]] = set()
        self._reader = asyncio.create_task(self._read(), name="guard-answers")
        self.dead = False

    async def ask(self, id: str, frame: bytes) -> Verdict | GuardError:
        future: asyncio.Future[Verdict | GuardError] = asyncio.get_running_loop().create_future()
        self._pending[id] = future
        try:
            await self._connection.send(frame)
            return await future
        except ConnectionClosed:
            return gone()
        except asyncio.CancelledError:  # the deadline, or the caller went away
            self._chore(self._cancel(id))
            raise
        finally:
            self._pending.pop(id, None)

    async def aclose(self) -> None:
        self.dead = True
        await self._connection.close()
        await asyncio.gather(self._reader, *self._chores, return_exceptions=True)

    def _chore(self, work: asyncio._CoroutineLike[None]) -> None:
        task = asyncio.create_task(work)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def _cancel(self, id: str) -> None:
        with contextlib.suppress(ConnectionClosed):
            await self._connection.send(json.dumps({"cancel": id}))

    async def _read(self) -> None:
        try:
            async for message in self._connection:
                id, outcome = decoded(message)
                future = self._pending.pop(id, None)
                if future is None or future.done():
                    self._client.unknown_answers += 1
                else:
                    future.set_result(outcome)
        except WireError as error:
            logger.error("the guard worker sent garbage (%s); dropping the connection", error)
            self._chore(self._connection.close(1002))
        except ConnectionClosed:
            pass
        finally:
            self.dead = True
            self._client.on_lost()
            for future in self._pending.values():
                if not future.done():
                    future.set_result(gone())


def gone() -> GuardError:
    """What becomes of a question whose worker is no more."""
    return GuardError(GuardErrorKind.UNAVAILABLE, "the guard worker went away", retry_after=1.0)


def decoded(message: str | bytes) -> tuple[str, Verdict | GuardError]:
    """A worker's answer; raises ``WireError``."""
    if isinstance(message, str):
        raise WireError("a text message")
    id, outcome = decode_answer(message)
    if isinstance(outcome, GuardError):
        after = outcome.retry_after
        if after is not None and not (type(after) in (int, float) and 0.0 <= after < math.inf):
            raise WireError("retry_after is not a duration")
    return id, outcome
