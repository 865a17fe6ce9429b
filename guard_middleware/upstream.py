"""The upstream as an ASGI application: it forwards what it is given with httpx, and judges nothing.

``GuardMiddleware(UpstreamApp(url))`` is the reverse proxy; the same middleware in front of a host's own
application is the in-process guard. The upstream's host comes from the operator and from nowhere else.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx

from guard_middleware.errors import ConfigError, UpstreamError, UpstreamErrorKind

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send


class UpstreamApp:
    """Forwards requests to ``url``; raises ``UpstreamError`` when there is no whole answer.

    ``url`` is the API's origin with an optional prefix; a prefix of ``/v1`` may be given or left out, because
    SDKs' base URLs end in it. ``headers`` replace those of the client (for the operator's own credentials).
    ``silence`` is the longest wait for the next byte, in seconds.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        silence: float = 120.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(
                f"the upstream {url!r} is not an http(s) URL", remedy="write it like https://api.example.com/v1"
            )
        self._base = httpx.URL(url.rstrip("/").removesuffix("/v1"))
        self._headers = {
            name.lower().encode("latin-1"): value.encode("latin-1") for name, value in (headers or {}).items()
        }
        self._timeout = httpx.Timeout(silence, connect=min(10.0, silence)).as_dict()
        # A transport instead of a Client: no redirects, cookies, proxies or decoding that we would have to switch off.
        self._transport = transport or httpx.AsyncHTTPTransport(
            verify=ssl.create_default_context() if parts.scheme == "https" else False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=20.0),
            trust_env=False,
        )

    async def aclose(self) -> None:
        """Closes the idle connections."""
        await self._transport.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        request = httpx.Request(
            scope["method"],
            self._url(scope),
            headers=self._request_headers(scope),
            content=bytes(body) if body else None,
            extensions={"timeout": self._timeout},
        )
        try:
            response = await self._transport.handle_async_request(request)
            try:
                await send(
                    {"type": "http.response.start", "status": response.status_code, "headers": response.headers.raw}
                )
                async for chunk in response.aiter_raw():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                await response.aclose()
        except httpx.TimeoutException:
            raise UpstreamError(UpstreamErrorKind.TIMEOUT) from None
        except (httpx.ConnectError, httpx.UnsupportedProtocol) as error:
            raise UpstreamError(UpstreamErrorKind.UNREACHABLE, type(error).__name__) from None
        except httpx.TransportError as error:
            raise UpstreamError(UpstreamErrorKind.RESET, type(error).__name__) from None

    def _url(self, scope: Scope) -> httpx.URL:
        target = scope["raw_path"]
        if scope["query_string"]:
            target += b"?" + scope["query_string"]
        return self._base.copy_with(raw_path=self._base.raw_path.rstrip(b"/") + target)

    def _request_headers(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        kept = [(name, value) for name, value in scope["headers"] if name != b"host" and name not in self._headers]
        # identity: a compressed answer could not be screened without an unbounded decoder
        return [*kept, *self._headers.items(), (b"accept-encoding", b"identity")]
