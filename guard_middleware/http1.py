"""The upstream's end of HTTP/1.1: kept-alive connections on asyncio, answers parsed by httptools (llhttp).

The request path waits on nothing as often as on this, once per piece of a streamed answer: on one shared core it costs
0.1 ms where httpx costs 0.5 ms (tests/bench/overhead.py). It does what one origin needs and no more: no redirects,
cookies, proxies, decoding or retries. Every failure is an ``UpstreamError``.

Refuses:
- to send a method, target or header that could forge a line (framing headers are set here, never passed);
- answers that llhttp refuses in its strict mode, a change of protocol, a head of more than 64 KiB, more bytes than
  the answer has; the connection is closed, and never used for another request;
- an answer that ends before its length or last chunk, or in silence longer than ``silence``.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Iterable
from typing import cast

import httptools

from guard_middleware.errors import UpstreamError, UpstreamErrorKind

RawHeaders = list[tuple[bytes, bytes]]

_NAME = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_TARGET = re.compile(rb"/[\x21-\x7e]*")
_FRAMING = frozenset((b"content-length", b"transfer-encoding"))
_MAX_HEAD = 64 * 1024
#: bytes of an answer that wait for their reader before the socket is no longer read
_MAX_WAITING = 1024 * 1024


class Pool:
    """Connections to one origin. ``tls`` None is plain HTTP; ``silence`` and ``connect`` are in seconds."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        silence: float = 120.0,
        connect: float = 10.0,
        max_idle: int = 100,
        idle_seconds: float = 20.0,
    ) -> None:
        self._host, self._port, self._tls = host, port, tls
        self._silence, self._connect = silence, connect
        self._max_idle, self._idle_seconds = max_idle, idle_seconds
        #: (since when, connection), the longest idle first
        self._idle: list[tuple[float, Connection]] = []

    async def acquire(self) -> Connection:
        """A connection for one exchange, to be given to ``release``; raises ``UpstreamError``."""
        loop = asyncio.get_running_loop()
        self._prune(loop.time())
        while self._idle:
            _, connection = self._idle.pop()
            if connection.reusable:
                return connection
        try:
            async with asyncio.timeout(self._connect):
                _, connection = await loop.create_connection(
                    lambda: Connection(self._silence),
                    self._host,
                    self._port,
                    ssl=self._tls,
                    server_hostname=self._host if self._tls else None,
                )
        except TimeoutError:
            raise UpstreamError(UpstreamErrorKind.TIMEOUT, "no connection in time") from None
        except OSError as error:
            raise UpstreamError(UpstreamErrorKind.UNREACHABLE, type(error).__name__) from None
        return connection

    def release(self, connection: Connection) -> None:
        """Keeps a connection whose exchange is complete, and closes any other."""
        if not connection.reusable:
            connection.abort()
            return
        now = asyncio.get_running_loop().time()
        self._idle.append((now, connection))
        self._prune(now)

    def close(self) -> None:
        """Closes the idle connections."""
        for _, connection in self._idle:
            connection.abort()
        self._idle.clear()

    def _prune(self, now: float) -> None:
        while self._idle and (len(self._idle) > self._max_idle or now - self._idle[0][0] > self._idle_seconds):
            self._idle.pop(0)[1].abort()


class Connection(asyncio.Protocol):
    """One connection: ``send``, ``head``, then ``read`` until it returns nothing."""

    def __init__(self, silence: float) -> None:
        self._silence = silence
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._writing_paused = self._reading_paused = False
        self._transport: asyncio.Transport
        self._parser: httptools.HttpResponseParser | None = None
        self._error: UpstreamError | None = None
        self._reset()
        #: whether another request may be sent: connected, and the last answer was read to its end
        self.reusable = False

    def _reset(self) -> None:
        self._headers: RawHeaders = []
        self._chunks: list[bytes] = []
        self._status = self._head_bytes = self._waiting = 0
        self._has_head = self._framed = self._complete = self._keep_alive = False

    async def send(self, method: str, target: bytes, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """Starts an exchange. ``content-length`` is added here."""
        head = _encode(method, target, headers, len(body))
        self._reset()
        self.reusable = False
        self._parser = httptools.HttpResponseParser(self)
        self._transport.writelines((head, body) if body else (head,))
        while self._writing_paused and not self._has_head and self._error is None:
            await self._wait()

    async def head(self) -> tuple[int, RawHeaders]:
        """Status and headers of the answer, names in lower case; interim answers (1xx) are skipped."""
        while not self._has_head:
            if self._error is not None:
                raise self._error
            await self._wait()
        return self._status, self._headers

    async def read(self) -> bytes:
        """What has come of the body since the last call; empty at its end."""
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._complete:
                self.reusable = self._keep_alive and not self._transport.is_closing()
                return b""
            await self._wait()
        data = b"".join(self._chunks)
        self._chunks.clear()
        self._waiting = 0
        if self._reading_paused:
            self._reading_paused = False
            self._transport.resume_reading()
        return data

    def abort(self) -> None:
        """Drops the connection and what it holds."""
        self.reusable = False
        self._transport.abort()

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            async with asyncio.timeout(self._silence):
                await self._waiter
        except TimeoutError:
            raise UpstreamError(UpstreamErrorKind.TIMEOUT, "silence") from None
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, kind: UpstreamErrorKind, why: str) -> None:
        if self._error is None:
            self._error = UpstreamError(kind, why)
        self.abort()
        self._wake()

    # -- asyncio.Protocol --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by name
        self.reusable = True

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._complete:  # nothing was asked
            self.abort()
            return
        if not self._has_head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(UpstreamErrorKind.UNSUPPORTED, "the upstream changed the protocol")
        except httptools.HttpParserError:
            self._fail(UpstreamErrorKind.MALFORMED, "not an HTTP/1.1 answer")
        if not self._has_head and self._head_bytes > _MAX_HEAD:
            self._fail(UpstreamErrorKind.MALFORMED, "the head of the answer is too large")
        if self._waiting > _MAX_WAITING and not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        if self._parser is None or self._complete:
            return
        if error is None and self._has_head and not self._framed:
            self._complete = True  # an answer without a length ends with its connection
            self._wake()
        else:
            self._fail(UpstreamErrorKind.RESET, "the upstream closed the connection")

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._wake()

    # -- what the parser calls --

    def on_message_begin(self) -> None:
        if self._complete:
            self._fail(UpstreamErrorKind.MALFORMED, "more than one answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_head:  # afterwards come trailers
            name = name.lower()
            self._framed = self._framed or name in _FRAMING
            self._headers.append((name, value.strip()))

    def on_headers_complete(self) -> None:
        if self._complete:
            return
        assert self._parser is not None
        self._status = self._parser.get_status_code()
        self._has_head = self._status >= 200

    def on_body(self, data: bytes) -> None:
        self._chunks.append(data)
        self._waiting += len(data)

    def on_message_complete(self) -> None:
        if not self._has_head:
            self._headers, self._framed = [], False
            return
        assert self._parser is not None
        self._complete = True
        self._keep_alive = self._parser.should_keep_alive()


def _encode(method: str, target: bytes, headers: Iterable[tuple[bytes, bytes]], length: int) -> bytes:
    kept = [(name, value) for name, value in headers if name.lower() not in _FRAMING]
    if length or method != "GET":
        kept.append((b"content-length", b"%d" % length))
    verb = method.encode("latin-1", "replace")
    if not (_NAME.fullmatch(verb) and _TARGET.fullmatch(target)):
        raise UpstreamError(UpstreamErrorKind.UNSUPPORTED, "a request line that cannot be sent")
    for name, value in kept:
        if not (_NAME.fullmatch(name) and _VALUE.fullmatch(value)):
            raise UpstreamError(UpstreamErrorKind.UNSUPPORTED, "a header that cannot be sent")
    lines = b"".join([b"%b: %b\r\n" % pair for pair in kept])
    return b"%b %b HTTP/1.1\r\n%b\r\n" % (verb, target, lines)
