"""What a guarded transport does, for httpx and for httpx2: the two have the same classes and share none of them.

Each request is one ``GuardedExchange``: what is screened, held, cut and recorded is decided there. The call to the
provider is made by an inner transport, on the loop of the guard, so that a verdict that needs no answer, and a client
that goes, end it at once.

Refuses: every path that the reverse proxy refuses. Passes on of the request's extensions only the time-outs, and sets
the target by the URL alone. What breaks between us and the provider is raised as the inner transport raised it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from guard_integrations.portal import Portal, PortalClosed
from guard_middleware import config as configuration
from guard_middleware.errors import ConfigError, GuardError, UpstreamError, UpstreamErrorKind
from guard_middleware.exchange import Answer, GuardedExchange
from guard_middleware.runtime import Runtime

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)


class Guarded:
    """The exchanges of one transport. ``library`` is the module httpx or httpx2; all of it runs in one event loop."""

    def __init__(
        self,
        library: Any,
        inner: Any,
        *,
        config: configuration.Config | str | Path | None,
        runtime: Runtime | None,
        base_path: str,
        tenant: str | None,
    ) -> None:
        if inner is not None and not isinstance(inner, library.AsyncBaseTransport):
            raise TypeError(
                f"{type(inner).__name__} is not asynchronous: the call to the provider runs on the guard's own loop; "
                f"give {library.__name__}.AsyncHTTPTransport(...), which takes the same arguments"
            )
        if not base_path.startswith("/") or base_path.endswith("/"):
            raise ConfigError(f"base_path {base_path!r} is no path", remedy="write it like /v1 or /openai/v1")
        if runtime is None:
            if isinstance(config, str | Path):
                config = configuration.load(str(config))
            runtime = Runtime(config or configuration.Config(), remote=True)
        self._library, self._inner, self._runtime, self._tenant = library, inner, runtime, tenant
        self._base = base_path.encode("ascii")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waited = False
        self._open: set[GuardedExchange] = set()

    async def open(self, request: Any, body: bytes) -> tuple[GuardedExchange, Answer]:
        """Judges and sends; the answer's head may leave, its body comes as it is released."""
        await self._start()
        call = _Call(self._library, self._inner, request)
        exchange = GuardedExchange(
            self._runtime,
            self._path(request.url.raw_path.partition(b"?")[0]).decode("ascii"),
            body,
            headers=tuple((name.lower(), value) for name, value in request.headers.raw),
            method=request.method,
            query=request.url.query,
            tenant=self._tenant,
            upstream=call,
        )
        await exchange.__aenter__()
        self._open.add(exchange)
        try:
            answer = await exchange.released()
            if call.error is not None and answer.status in (502, 504):  # not where the guard had more to say
                raise call.error
        except BaseException:
            await self.done(exchange)
            raise
        return exchange, answer

    async def done(self, exchange: GuardedExchange) -> None:
        """Ends an exchange, whether its answer was read or not, also where the caller is being cancelled."""
        self._open.discard(exchange)
        with anyio.CancelScope(shield=True):
            await exchange.aclose()

    async def aclose(self) -> None:
        """Ends what is under way, the worker and the connections."""
        for exchange in list(self._open):
            await self.done(exchange)
        await self._runtime.aclose()
        if self._inner is not None:
            await self._inner.aclose()

    def _path(self, path: bytes) -> bytes:
        return b"/v1" + path.removeprefix(self._base) if path.startswith(self._base + b"/") else path

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            self._inner = self._inner or self._library.AsyncHTTPTransport()
        if self._loop is not loop:
            raise RuntimeError("a guarded transport belongs to the event loop that used it first; make one for each")
        if self._runtime.worker is None or self._waited:
            return
        try:
            await self._runtime.start(wait=True)  # no lifespan has waited until our own worker has loaded its model
        except GuardError as error:
            logger.error("%s", error)  # and the request is answered with guard_unavailable
        self._waited = True


class _Call:
    """One call to the provider, as an ASGI application; ``error`` is what broke it."""

    def __init__(self, library: Any, inner: Any, request: Any) -> None:
        self._library, self._inner, self._request = library, inner, request
        self.error: Exception | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive()).get("body", b"")
        request = self._library.Request(
            self._request.method,
            self._request.url.copy_with(query=scope["query_string"] or None),
            # identity: a compressed answer could not be screened without an unbounded decoder
            headers=[*scope["headers"], (b"accept-encoding", b"identity")],
            content=body or None,
            extensions={name: value for name, value in self._request.extensions.items() if name == "timeout"},
        )
        try:
            response = await self._inner.handle_async_request(request)
            try:
                await send(
                    {"type": "http.response.start", "status": response.status_code, "headers": response.headers.raw}
                )
                async for chunk in response.stream:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            finally:
                await response.aclose()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except UpstreamError:
            raise
        except Exception as error:
            self.error = error
            raise UpstreamError(self._kind(error), type(error).__name__) from None

    def _kind(self, error: Exception) -> UpstreamErrorKind:
        library = self._library
        if isinstance(error, library.TimeoutException):
            return UpstreamErrorKind.TIMEOUT
        if isinstance(error, library.ConnectError | library.UnsupportedProtocol | library.ProxyError):
            return UpstreamErrorKind.UNREACHABLE
        return UpstreamErrorKind.RESET


class _Transport:
    """What the transports of both kinds and both libraries share."""

    _library: Any
    _stream: Any

    def __init__(
        self,
        transport: Any = None,
        *,
        config: configuration.Config | str | Path | None = None,
        runtime: Runtime | None = None,
        base_path: str = "/v1",
        tenant: str | None = None,
    ) -> None:
        self._guarded = Guarded(
            self._library, transport, config=config, runtime=runtime, base_path=base_path, tenant=tenant
        )

    def _response(self, answer: Answer, stream: Any) -> Any:
        return self._library.Response(answer.status, headers=list(answer.headers), stream=stream)


class AsyncTransport(_Transport):
    """The methods of ``AsyncBaseTransport``."""

    async def handle_async_request(self, request: Any) -> Any:
        exchange, answer = await self._guarded.open(request, await request.aread())
        return self._response(answer, self._stream(self._library, self._guarded, exchange, answer))

    async def aclose(self) -> None:
        await self._guarded.aclose()


class SyncTransport(_Transport):
    """The methods of ``BaseTransport``, over one loop in a thread that starts with the first request."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._portal = Portal(self._guarded.aclose)
        weakref.finalize(self, self._portal.stop).atexit = False  # at the exit the portal ends itself

    def handle_request(self, request: Any) -> Any:
        exchange, answer = self._portal.call(self._guarded.open(request, request.read()))
        return self._response(answer, self._stream(self._library, self._guarded, exchange, answer, self._portal))

    def close(self) -> None:
        self._portal.close()


class AsyncStream:
    """The released pieces of one answer; closing it ends the call to the provider."""

    def __init__(self, library: Any, guarded: Guarded, exchange: GuardedExchange, answer: Answer) -> None:
        self._library, self._guarded, self._exchange, self._answer = library, guarded, exchange, answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._answer.chunks:
                yield chunk
        except UpstreamError as error:
            raise self._library.RemoteProtocolError(error.message) from None

    async def aclose(self) -> None:
        await self._guarded.done(self._exchange)


class SyncStream:
    """As ``AsyncStream``, each piece fetched when it is asked for."""

    def __init__(
        self, library: Any, guarded: Guarded, exchange: GuardedExchange, answer: Answer, portal: Portal
    ) -> None:
        self._library, self._guarded, self._exchange, self._answer = library, guarded, exchange, answer
        self._portal = portal

    def __iter__(self) -> Iterator[bytes]:
        chunks = aiter(self._answer.chunks)
        try:
            while (chunk := self._portal.call(_next(chunks))) is not None:
                yield chunk
        except UpstreamError as error:
            raise self._library.RemoteProtocolError(error.message) from None

    def close(self) -> None:
        with contextlib.suppress(PortalClosed):  # which has ended every exchange
            self._portal.call(self._guarded.done(self._exchange))


async def _next(chunks: AsyncIterator[bytes]) -> bytes | None:
    return await anext(chunks, None)
