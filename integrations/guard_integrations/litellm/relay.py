"""One guarded exchange whose upstream is read by somebody else's thread or loop, a piece at a time.

LiteLLM's stream belongs to the caller, the guard to its own loop. So the two take turns: ``advance`` hands over what
was read and returns what is released, or ``MORE`` where the guard wants to read on. Every method runs on the guard's
loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
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
        self._said: asyncio.Queue[bytes | Turn | Exception] = asyncio.Queue()
        self._streaming: asyncio.Task[None] | None = None

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

    async def streams(self) -> None:
        """The upstream answers with a stream, which ``advance`` feeds."""
        self._streaming = asyncio.create_task(self._stream())

    async def advance(self, given: bytes | UpstreamError | Turn) -> bytes | Turn:
        """The next released piece, ``MORE`` where the upstream is to be read on, ``END`` after the last piece.

        ``given`` is what was read since ``MORE`` was said, and ``MORE`` for nothing. Raises ``Whole`` where the guard
        answers with something else than a stream, and ``UpstreamError`` where the answer breaks off.
        """
        if given is not Turn.MORE:
            self._given.put_nowait(given)
        said = await self._said.get()
        if isinstance(said, Exception):
            raise said
        return said

    async def close(self) -> None:
        """Ends the exchange, which makes its record."""
        if self._streaming is not None:
            self._streaming.cancel()
        await self._exchange.aclose()

    async def _stream(self) -> None:
        try:
            answer = await self._exchange.answer(200, EVENTS, self._chunks())
            if not dict(answer.headers).get(b"content-type", b"").startswith(b"text/event-stream"):
                raise await _read(answer)
            async for piece in answer.chunks:
                self._said.put_nowait(piece)
        except Exception as error:
            self._said.put_nowait(error)
        self._said.put_nowait(Turn.END)

    async def _chunks(self) -> AsyncIterator[bytes]:
        while True:
            if self._given.empty():
                self._said.put_nowait(Turn.MORE)
            match await self._given.get():
                case UpstreamError() as error:
                    raise error
                case Turn():
                    return
                case piece:
                    yield piece


async def _read(answer: Answer) -> Whole:
    return Whole(answer.status, answer.headers, await answer.read())
