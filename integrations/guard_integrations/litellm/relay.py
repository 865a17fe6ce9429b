"""One guarded exchange whose upstream is read by somebody else's thread or loop, a piece at a time.

LiteLLM's stream belongs to the caller, the guard to its own loop. So the two take turns: ``advance`` hands over what
was read and returns what is released, or ``MORE`` where the guard wants to read on. Every method runs on the guard's
loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from enum import Enum
from typing import Final

from guard_middleware.dialects.base import Headers
from guard_middleware.errors import UpstreamError
from guard_middleware.exchange import Answer, GuardedExchange
from guard_middleware.runtime import Runtime

JSON: Final[Headers] = ((b"content-type", b"application/json"),)
EVENTS: Final[Headers] = ((b"content-type", b"text/event-stream"),)


class Turn(Enum):
    """What ``advance`` takes and returns beside bytes and errors."""

    MORE = "more"
    #: no piece comes after this: of the upstream, or of what is released
    END = "end"


class Whole(Exception):
    """An answer in one piece. Raised in place of a stream, because whoever reads a stream waits for pieces."""

    def __init__(self, status: int, headers: Headers, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body
        super().__init__(f"answered with {status}")


class Relay:
    """``begin`` first, then ``whole``, ``failed`` or ``streams`` and ``advance``; ``close`` last."""

    def __init__(self, runtime: Runtime, path: str, body: bytes, tenant: str | None = None) -> None:
        self._exchange = GuardedExchange(runtime, path, body, headers=JSON, tenant=tenant)
        self._given: asyncio.Queue[bytes | UpstreamError | Turn] = asyncio.Queue()
        self._wanted = asyncio.Event()
        self._released: AsyncIterator[bytes] | None = None
        self._piece: asyncio.Task[bytes | Turn] | None = None
        #: what the guard says of a stream, once its first piece is out
        self.headers: Headers = ()

    async def begin(self) -> bytes | Whole:
        """The body for the upstream, or the guard's own answer."""
        await self._exchange.__aenter__()
        sent = await self._exchange.request()
        return sent if isinstance(sent, bytes) else await _read(sent)

    async def whole(self, status: int, body: bytes) -> Whole:
        """What of the upstream's answer is released; raises ``UpstreamError`` where it breaks off."""

        async def once() -> AsyncIterator[bytes]:
            yield body

        return await _read(await self._exchange.answer(status, JSON, once()))

    async def failed(self, error: UpstreamError) -> Whole:
        """What the client is to get where the upstream gave no answer."""
        return await _read(await self._exchange.failed(error))

    def streams(self) -> None:
        """The upstream answers with a stream, which ``advance`` feeds."""
        self._released = self._pieces(self._exchange.answer(200, EVENTS, self._chunks()))

    async def advance(self, given: bytes | UpstreamError | Turn) -> bytes | Turn:
        """The next released piece, ``MORE`` where the upstream is to be read on, ``END`` after the last piece.

        ``given`` is what was read since the last time, ``MORE`` for nothing. Raises ``Whole`` where the guard answers
        with something else than a stream, and ``UpstreamError`` where the answer breaks off.
        """
        assert self._released is not None
        if given is not Turn.MORE:
            self._wanted.clear()
            self._given.put_nowait(given)
        if self._piece is None:
            self._piece = asyncio.ensure_future(anext(self._released, Turn.END))
        wanted = asyncio.ensure_future(self._wanted.wait())
        try:
            await asyncio.wait({self._piece, wanted}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            wanted.cancel()
        if not self._piece.done():
            return Turn.MORE
        piece, self._piece = self._piece, None
        return piece.result()

    async def close(self) -> None:
        """Ends the exchange, which makes its record."""
        if self._piece is not None:
            self._piece.cancel()
        await self._exchange.aclose()

    async def _pieces(self, answering: Awaitable[Answer]) -> AsyncIterator[bytes]:
        answer = await answering
        self.headers = answer.headers
        if not dict(answer.headers).get(b"content-type", b"").startswith(b"text/event-stream"):
            raise await _read(answer)
        async for piece in answer.chunks:
            yield piece

    async def _chunks(self) -> AsyncIterator[bytes]:
        while True:
            if self._given.empty():
                self._wanted.set()
            match await self._given.get():
                case UpstreamError() as error:
                    raise error
                case Turn():
                    return
                case piece:
                    yield piece


async def _read(answer: Answer) -> Whole:
    return Whole(answer.status, answer.headers, await answer.read())
