"""The gateway's end of several workers behind one URL: each question is an HTTP request of its own.

A session (``client.GuardClient``) belongs to one worker for as long as it lives; a load balancer such as Ray Serve can
only spread what comes as requests. A question that was with a worker which went away is asked once more, of whichever
worker the balancer then picks; the verdict is total, as ever. A balancer that has too many questions already (503 or
429 in its own words) is not asked more: that is ``overloaded``, and whoever asked may come back.

Refuses: an answer that is none of ``wire``, is too long, or answers another question; a redirect is not followed.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from functools import partial

import aiohttp
from yarl import URL

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.guard.client import MAX_ANSWER, GuardClient, decoded, gone
from guard_middleware.types import Verdict
from guard_middleware.wire import CONTENT_TYPE, ModerationRequest, WireError

#: how often one question is asked: content that kills a worker must not go through all of them
_TRIES = 2
#: seconds in which a balancer learns that a worker is gone, before it is asked again
_PAUSE = 0.1
_CONNECT_SECONDS = 2.0


class BalancedGuardClient(GuardClient):
    """Asks the workers behind ``address``, such as ``http://guard.corp:8000``, over as many connections as there are
    questions. ``identity`` and the session's limits are those of whichever worker answers."""

    def __init__(self, address: str, *, max_frame: int = 128 * 1024 * 1024) -> None:
        super().__init__(address, max_frame=max_frame)
        self._url = URL(address.rstrip("/") + "/v1/moderate")
        self._http: aiohttp.ClientSession | None = None

    async def aclose(self) -> None:
        """Ends the connections; questions in flight, and later ones, are ``unavailable``."""
        await super().aclose()
        if self._http is not None:
            await self._http.close()

    async def _ask(self, request: ModerationRequest, end: float) -> Verdict | GuardError:
        for left in reversed(range(_TRIES)):
            outcome = await self._try(request, end)
            if left == 0 or not isinstance(outcome, GuardError) or outcome.kind is not GuardErrorKind.UNAVAILABLE:
                return outcome
            await asyncio.sleep(_PAUSE)
        raise AssertionError

    async def _try(self, request: ModerationRequest, end: float) -> Verdict | GuardError:
        if self._closed:
            raise GuardError(GuardErrorKind.UNAVAILABLE, "the guard client is closed")
        if self._http is None:  # it binds itself to the running loop
            self._http = aiohttp.ClientSession(
                # before the other side hangs up on us: uvicorn's and Serve's servers wait for 5 s
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
            )
        id, frame = self._framed(request, end)
        post = partial(self._http.post, self._url, headers={"content-type": CONTENT_TYPE}, allow_redirects=False)
        try:
            # aiohttp copies bytes at once, and warns of it, where they are more than this
            async with post(data=frame if len(frame) <= 2**20 else io.BytesIO(frame)) as response:
                answer = await _body(response)
                status, headers = response.status, response.headers
        except (aiohttp.ClientError, OSError):
            return gone()
        try:
            answered, outcome = decoded(answer)
        except WireError:
            # the balancer's own words: it sheds load (Serve past max_queued_requests), or it lost the worker (500)
            if status in (429, 503):
                return GuardError(
                    GuardErrorKind.OVERLOADED, f"the balancer is busy ({status})", retry_after=_wait(headers)
                )
            return gone()
        # a worker that could not read the question cannot say which one it was
        if answered != id and not (answered == "" and isinstance(outcome, GuardError)):
            raise WireError("the answer to another question")
        return outcome


def _wait(headers: Mapping[str, str]) -> float:
    """Seconds of ``retry-after``; a date, nonsense or nothing is 1."""
    said = headers.get("retry-after", "")
    return min(float(said), 60.0) if said.isascii() and said.isdecimal() else 1.0


async def _body(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for piece in response.content.iter_chunked(65536):
        body += piece
        if len(body) > MAX_ANSWER:
            raise WireError("the answer is too long")
    return bytes(body)
