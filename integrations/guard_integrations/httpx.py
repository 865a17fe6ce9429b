"""Guarded transports for clients on httpx: what an SDK sends and gets is screened in its own process.

    client = OpenAI(http_client=httpx.Client(transport=GuardTransport(config="guard.yaml")))
    client = AsyncOpenAI(http_client=httpx.AsyncClient(transport=AsyncGuardTransport(config="guard.yaml")))

SDKs that have moved to httpx2 (anthropic 2, openai 3 by default) take ``guard_integrations.httpx2``. What both refuse
is in ``guard_integrations.transport``.
"""

from __future__ import annotations

import httpx

from guard_integrations import transport


class _Stream(transport.SyncStream, httpx.SyncByteStream):
    pass


class _AsyncStream(transport.AsyncStream, httpx.AsyncByteStream):
    pass


class GuardTransport(transport.SyncTransport, httpx.BaseTransport):
    """Guards every request of an ``httpx.Client``; closing it ends the guard's worker."""

    _library, _stream = httpx, _Stream


class AsyncGuardTransport(transport.AsyncTransport, httpx.AsyncBaseTransport):
    """Guards every request of an ``httpx.AsyncClient``; closing it ends the guard's worker."""

    _library, _stream = httpx, _AsyncStream
