"""The upstream as an ASGI application: it forwards what it is given, and judges nothing.

``GuardMiddleware(UpstreamApp(url))`` is the reverse proxy; the same middleware in front of a host's own
application is the in-process guard. The upstream's host comes from the operator and from nowhere else.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import aiohttp
from yarl import URL

from guard_middleware.errors import ConfigError, UpstreamError, UpstreamErrorKind

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

_NOT_ADDED = frozenset(("Accept", "Accept-Encoding", "Content-Type", "User-Agent"))


class UpstreamApp:
    """Forwards requests to ``url``; raises ``UpstreamError`` when there is no whole answer.

    ``url`` is the API's origin with an optional prefix; a prefix of ``/v1`` may be given or left out, because
    SDKs' base URLs end in it. ``headers`` replace those of the client (for the operator's own credentials).
    ``silence`` is the longest wait for the next byte, in seconds.
    """

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None, silence: float = 120.0) -> None:
        try:
            base = URL(url)
        except ValueError:
            base = URL("")
        if base.scheme not in ("http", "https") or not base.host or base.query or base.fragment:
            raise ConfigError(
                f"the upstream {url!r} is not an http(s) URL", remedy="write it like https://api.example.com/v1"
            )
        self._base = str(base).rstrip("/").removesuffix("/v1")
        # identity: a compressed answer could not be screened without an unbounded decoder
        self._headers = {"accept-encoding": "identity"}
        self._headers |= {name.lower(): value for name, value in (headers or {}).items()}
        self._timeout = aiohttp.ClientTimeout(sock_connect=min(10.0, silence), sock_read=silence)
        #: connecting, sending the body, and then the silence before the first byte
        self._head_seconds = min(10.0, silence) + 2 * silence
        self._client: aiohttp.ClientSession | None = None

    async def aclose(self) -> None:
        """Closes the idle connections."""
        if self._client is not None:
            await self._client.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._client is None:  # it binds itself to the running loop
            self._client = aiohttp.ClientSession(
                # Before the other side hangs up on us: uvicorn's and node's servers wait for 5 s.
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=_NOT_ADDED,
                timeout=self._timeout,
                requote_redirect_url=False,
            )
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        target = self._base + scope["raw_path"].decode("ascii")
        if scope["query_string"]:
            target += "?" + scope["query_string"].decode("ascii")
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        headers = [
            *self._headers.items(),
            *(pair for pair in headers if pair[0] not in self._headers and pair[0] != "host"),
        ]
        try:
            # aiohttp bounds the silence while it reads only: a server that does not read would never end
            async with asyncio.timeout(self._head_seconds):
                response = await self._client.request(
                    scope["method"],
                    URL(target, encoded=True),
                    headers=headers,
                    # aiohttp copies bytes at once, and warns of it, where they are more than this
                    data=(bytes(body) or None) if len(body) <= 2**20 else io.BytesIO(body),
                    allow_redirects=False,
                )
            async with response:
                await send({"type": "http.response.start", "status": response.status, "headers": response.raw_headers})
                while chunk := await self._read(response):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            raise UpstreamError(UpstreamErrorKind.TIMEOUT) from None
        except aiohttp.ClientConnectorError as error:
            raise UpstreamError(UpstreamErrorKind.UNREACHABLE, type(error).__name__) from None
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError(UpstreamErrorKind.RESET, type(error).__name__) from None

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        # aiohttp 3.14 forgets its own bound, and the reader, where a later chunk of the body is malformed
        async with asyncio.timeout(self._timeout.sock_read):
            return await response.content.readany()
