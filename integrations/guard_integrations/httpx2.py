"""Guarded transports for clients on httpx2: what an SDK sends and gets is screened in its own process.

    client = OpenAI(http_client=httpx2.Client(transport=GuardTransport(config="guard.yaml")))
    client = AsyncOpenAI(http_client=httpx2.AsyncClient(transport=AsyncGuardTransport(config="guard.yaml")))

SDKs that have moved to httpx22 (anthropic 2, openai 3 by default) take ``guard_integrations.httpx22``. What both refuse
is in ``guard_integrations.transport``.
"""

from __future__ import annotations

import httpx2

from guard_integrations import transport


class _Stream(transport.SyncStream, httpx2.SyncByteStream):
    pass


class _AsyncStream(transport.AsyncStream, httpx2.AsyncByteStream):
    pass


class GuardTransport(transport.SyncTransport, httpx2.BaseTransport):
    """Guards every request of an ``httpx2.Client``; closing it ends the guard's worker."""

    _library, _stream = httpx2, _Stream


class AsyncGuardTransport(transport.AsyncTransport, httpx2.AsyncBaseTransport):
    """Guards every request of an ``httpx2.AsyncClient``; closing it ends the guard's worker."""

    _library, _stream = httpx2, _AsyncStream
