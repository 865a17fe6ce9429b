"""The guard for a host that speaks no ASGI where it calls us: a client's transport, another gateway's hooks.

    async with GuardedExchange(guard, "/v1/chat/completions", body) as exchange:
        sent = await exchange.request()                   # judged: the bytes to send, or the answer that refuses
        answer = sent if isinstance(sent, Answer) else await exchange.answer(status, headers, chunks)

It is ``GuardMiddleware`` driven from outside, so that there is one implementation of what is screened, held and
recorded. The host gives the upstream's answer as bytes of the API's own JSON or server-sent events, and gets the
same back. What it does not take waits; what it drops is recorded as dropped.

A host that can leave the call to us gives ``upstream``, an ASGI application that makes it, and takes ``released()``:
then a verdict that needs no answer any more ends the call at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from guard_middleware.dialects.base import Headers
from guard_middleware.errors import UpstreamError, UpstreamErrorKind
from guard_middleware.middleware import GuardMiddleware
from guard_middleware.runtime import Runtime

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: released pieces that the host has not taken yet; past it the stream waits
_WAITING = 16


@dataclass(frozen=True, slots=True)
class Answer:
    """What the client is to get; ``chunks`` can be read once."""

    status: int
    headers: Headers
    chunks: AsyncIterator[bytes]

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([chunk async for chunk in self.chunks])


class GuardedExchange:
    """One request and its answer. ``path`` and ``headers`` are those of the API; header names in lower case.

    ``tenant`` is who asks as the host says it, which is believed where ``tenants.trusted_proxies`` has ``unix``.
    """

    def __init__(
        self,
        runtime: Runtime,
        path: str,
        body: bytes,
        *,
        headers: Headers = (),
        method: str = "POST",
        query: bytes = b"",
        tenant: str | None = None,
        upstream: ASGIApp | None = None,
    ) -> None:
        self._guard = GuardMiddleware(upstream or self._upstream, runtime=runtime)
        raw, _, _ = path.encode("ascii").partition(b"?")
        header = runtime.config.tenants.header
        if tenant is not None and header is not None:
            headers = (*headers, (header.encode("latin-1"), tenant.encode()))
        self._scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": raw,
            "query_string": query,
            "root_path": "",
            "headers": list(headers),
            "client": None,
            "server": None if tenant is None else ("", None),  # as over a Unix socket: the host is this process
        }
        self._body = body

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._sent: asyncio.Future[bytes] = loop.create_future()
        self._answered: asyncio.Future[tuple[int, Headers, AsyncIterator[bytes]]] = loop.create_future()
        self._head: asyncio.Future[tuple[int, Headers]] = loop.create_future()
        self._gone = asyncio.Event()
        self._pieces: asyncio.Queue[bytes | UpstreamError | None] = asyncio.Queue(_WAITING)
        self._complete = False
        self._unread = [self._body]
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the exchange; to the guard the client has gone if it had not everything."""
        self._gone.set()
        while not self._task.done():
            while not self._pieces.empty():
                self._pieces.get_nowait()
            await asyncio.wait({self._task}, timeout=0.05)
        for future in (self._sent, self._answered, self._head):
            future.cancel()

    async def request(self) -> bytes | Answer:
        """The body for the upstream, or the refusal. Where a policy races, the body comes before the verdict."""
        await self._first(self._sent, self._head)
        if self._sent.done():
            return self._sent.result()
        return await self.released()

    async def answer(self, status: int, headers: Headers, chunks: AsyncIterator[bytes]) -> Answer:
        """What may be released of the upstream's answer; an ``UpstreamError`` out of ``chunks`` is the upstream's."""
        if not self._answered.done():
            self._answered.set_result((status, headers, chunks))
        elif isinstance(chunks, AsyncGenerator):  # a race that the input's verdict has ended
            await chunks.aclose()
        return await self.released()

    async def failed(self, error: UpstreamError) -> Answer:
        """What the client is to get where the upstream gave no answer."""
        if not self._answered.done():
            self._answered.set_exception(error)
        return await self.released()

    async def released(self) -> Answer:
        """What the client is to get, as soon as its head may leave."""
        await self._first(self._head)
        if not self._head.done():
            self._task.result()
            raise asyncio.CancelledError
        return Answer(*self._head.result(), self._chunks())

    async def _first(self, *waited: asyncio.Future[Any]) -> None:
        """Until one of them, or the guard's own end without any."""
        await asyncio.wait({*waited, self._task}, return_when=asyncio.FIRST_COMPLETED)

    async def _chunks(self) -> AsyncIterator[bytes]:
        while (piece := await self._pieces.get()) is not None:
            if isinstance(piece, UpstreamError):
                raise piece
            yield piece

    async def _run(self) -> None:
        try:
            await self._guard(self._scope, self._receive, self._send)
        finally:
            if not self._complete:  # so that what broke off is never taken for a whole answer
                await self._pieces.put(UpstreamError(UpstreamErrorKind.RESET, "the answer broke off"))

    # -- the ASGI that the guard sees --

    async def _receive(self) -> Message:
        if self._unread:
            return {"type": "http.request", "body": self._unread.pop(), "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._head.set_result((message["status"], tuple(message.get("headers", ()))))
            return
        if message.get("body"):
            await self._pieces.put(message["body"])
        if not message.get("more_body", False):
            self._complete = True
            await self._pieces.put(None)

    async def _upstream(self, scope: Any, receive: Receive, send: Send) -> None:
        self._sent.set_result((await receive()).get("body", b""))
        status, headers, chunks = await self._answered
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        try:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        finally:
            if isinstance(chunks, AsyncGenerator):
                await chunks.aclose()  # a cut or a client that went: the host's own call ends with it
        await send({"type": "http.response.body", "body": b"", "more_body": False})
