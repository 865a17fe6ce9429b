"""The reverse proxy: the guard in front of an upstream elsewhere, with its own health checks.

``GET /guard/health`` says that the process lives, ``GET /guard/ready`` (200 or 503) that it can moderate; every
other path goes to the guard, which refuses what it does not know.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from guard_middleware.config import Config
from guard_middleware.errors import ConfigError
from guard_middleware.middleware import GuardMiddleware
from guard_middleware.runtime import Runtime
from guard_middleware.upstream import UpstreamApp

if TYPE_CHECKING:
    from starlette.requests import Request


def create_app(config: Config, *, runtime: Runtime | None = None) -> Starlette:
    """The proxy as an ASGI application. Raises ``ConfigError``; its lifespan raises where the worker cannot start."""
    if config.upstream.url is None:
        raise ConfigError("no upstream", remedy="give --upstream URL, or upstream: {url: ...} in the configuration")
    headers = {}
    for name, variable in config.upstream.headers_from_env.items():
        if variable not in os.environ:
            raise ConfigError(f"the environment variable {variable} is not set", remedy=f"it is to hold {name}")
        headers[name] = os.environ[variable]
    upstream = UpstreamApp(config.upstream.url, headers=headers, silence=config.limits.upstream_seconds)
    runtime = runtime or Runtime(config, remote=True)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            await runtime.start(wait=True)
            yield
        finally:
            await upstream.aclose()
            await runtime.aclose()

    async def health(_: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def ready(_: Request) -> JSONResponse:
        ok = await runtime.ready()
        return JSONResponse({"status": "ready" if ok else "not ready"}, status_code=200 if ok else 503)

    app = Starlette(
        lifespan=lifespan,
        routes=[
            Route("/guard/health", health),
            Route("/guard/ready", ready),
            Mount("", app=GuardMiddleware(upstream, runtime=runtime)),
        ],
    )
    app.state.runtime = runtime
    return app


def server(app: Starlette, host: str, port: int, *, on_ready: Callable[[str], None]) -> uvicorn.Server:
    """A uvicorn server for an app of ``create_app``; binds at once, and raises ``ConfigError`` where it cannot.

    ``on_ready`` gets its base URL once it can moderate and accepts requests (port 0: any free). ``run`` and ``serve``
    raise ``GuardError`` where there is no worker.
    """
    listener = _bind(host, port)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=_Protocol,
        ws="none",
        lifespan="on",
        proxy_headers=False,  # the peer decides whose tenant header is believed, not X-Forwarded-For
        access_log=False,  # the decision log says more, and never holds a query string
        server_header=False,
        log_config=None,
        timeout_graceful_shutdown=30,
    )
    return _Server(config, listener, app.state.runtime, on_ready)


def _bind(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet, so that clients are refused rather than kept waiting."""
    if not 0 <= port <= 65535:  # the resolver would take it modulo 65536
        raise ConfigError(f"there is no port {port}", remedy="give a --port from 1 to 65535, or 0 for any free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port} ({error})", remedy="give another --host") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port} ({error})", remedy="give another --port, or 0 for any free one"
        ) from None
    return listener


class _Protocol(HttpToolsProtocol):
    """Drops trailers, which uvicorn adds to the headers where both come in one segment.

    An auth layer in front checks headers, and a trailer behind it could then name a tenant.
    """

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self.headers = []


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, listener: socket.socket, runtime: Runtime, on_ready: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._listener, self._runtime, self._on_ready = listener, runtime, on_ready

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().serve([self._listener])
        finally:
            self._listener.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # Here and not in the lifespan, which turns an error into a traceback and is deaf to signals.
        starting = asyncio.create_task(self._runtime.start(wait=True))
        try:
            while not (starting.done() or self.should_exit):
                await asyncio.wait({starting}, timeout=0.1)
            if starting.done():
                starting.result()
        except BaseException:
            await self._runtime.aclose()
            raise
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await self._runtime.aclose()
            return
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
