"""The upstream as an ASGI application: it forwards what it is given, and judges nothing.

``GuardMiddleware(UpstreamApp(url))`` is the reverse proxy; the same middleware in front of a host's own
application is the in-process guard. The upstream's host comes from the operator and from nowhere else.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import TYPE_CHECKING

import httpx

from guard_middleware.errors import ConfigError
from guard_middleware.http1 import Pool

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send


class UpstreamApp:
    """Forwards requests to ``url``; raises ``UpstreamError`` when there is no whole answer.

    ``url`` is the API's origin with an optional prefix; a prefix of ``/v1`` may be given or left out, because
    SDKs' base URLs end in it. ``headers`` replace those of the client (for the operator's own credentials).
    ``silence`` is the longest wait for the next byte, in seconds.
    """

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None, silence: float = 120.0) -> None:
        try:
            base = httpx.URL(url)
        except httpx.InvalidURL:
            base = httpx.URL("")
        if base.scheme not in ("http", "https") or not base.host or base.query or base.fragment:
            raise ConfigError(
                f"the upstream {url!r} is not an http(s) URL", remedy="write it like https://api.example.com/v1"
            )
        self._prefix = base.raw_path.rstrip(b"/").removesuffix(b"/v1")
        set_here = {name.lower().encode("latin-1"): value.encode("latin-1") for name, value in (headers or {}).items()}
        # identity: a compressed answer could not be screened without an unbounded decoder
        self._headers = {b"host": base.netloc, b"accept-encoding": b"identity", **set_here}
        tls = base.scheme == "https"
        self._pool = Pool(
            base.raw_host.decode("ascii"),
            base.port or (443 if tls else 80),
            tls=ssl.create_default_context() if tls else None,
            silence=silence,
            connect=min(10.0, silence),
        )

    async def aclose(self) -> None:
        """Closes the idle connections."""
        self._pool.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        target = self._prefix + scope["raw_path"]
        if scope["query_string"]:
            target += b"?" + scope["query_string"]
        headers = [(name, value) for name, value in scope["headers"] if name not in self._headers]
        connection = await self._pool.acquire()
        try:
            await connection.send(scope["method"], target, [*self._headers.items(), *headers], bytes(body))
            status, answer_headers = await connection.head()
            await send({"type": "http.response.start", "status": status, "headers": answer_headers})
            while chunk := await connection.read():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._pool.release(connection)
