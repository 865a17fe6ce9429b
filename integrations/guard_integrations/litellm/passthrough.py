"""Pass-through routes of LiteLLM whose path ends with an API that is spoken here, and no others.

LiteLLM shows a guardrail the request of every such route. The answer it shows in three ways: a JSON body to the
post-call hook, where the route's own ``guardrails`` name the guard; a stream and all else only to the hook for response
headers, as the ``httpx.Response`` that it is about to read. There the stream is replaced by what the guard releases.
LiteLLM swallows what that hook raises, so a refusal is put where LiteLLM looks next: in the response's headers.

Refuses: other paths, routes whose configuration does not name the guard (``not_served``), answers other than JSON and
server-sent events.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, NoReturn

import httpx

from guard_integrations.litellm import wire
from guard_integrations.litellm.refusal import failed, not_served, refused
from guard_integrations.litellm.turn import Refused, Turn

CALL = "pass_through_endpoint"


def route_of(guardrail: Any, user_api_key_dict: Any, data: Mapping[str, Any]) -> wire.Route:
    """The API of a pass-through request; raises ``Refusal``."""
    configured = getattr(data.get("litellm_logging_obj"), "passthrough_guardrails_config", None) or ()
    route = wire.by_path(str(getattr(user_api_key_dict, "request_route", None) or ""))
    if route is None or guardrail.guardrail_name not in configured:
        raise not_served(guardrail, CALL)
    return route


async def guard_answer(guardrail: Any, turn: Turn, response: httpx.Response, data: dict[str, Any]) -> None:
    """Makes ``response`` release what may be released of it, or raise when LiteLLM goes on with it."""
    if turn.answered:
        return
    headers = ((b"content-type", response.headers.get("content-type", "").encode("latin-1")),)
    try:
        if response.is_stream_consumed:  # an error's body, or one that LiteLLM could not read as JSON
            await turn.whole(response.content, status=response.status_code, headers=headers)
            raise failed(guardrail, ValueError())
        upstream = httpx.Response(response.status_code, headers=response.headers, stream=response.stream)
        released = await turn.streamed(upstream.aiter_bytes(), status=response.status_code, headers=headers)
        response.stream = _Released(guardrail, turn, released, response.stream, data)
        response.headers.pop("content-encoding", None)
    except Refused as answer:
        guardrail.report.add(turn, data)
        response.headers = _Raising(refused(guardrail, turn, answer, data))  # type: ignore[assignment]
    except Exception as error:
        response.headers = _Raising(error)  # type: ignore[assignment]


class _Released(httpx.AsyncByteStream):
    def __init__(self, guardrail: Any, turn: Turn, chunks: AsyncIterator[bytes], upstream: Any, data: Any) -> None:
        self._guardrail, self._turn, self._chunks, self._upstream, self._data = guardrail, turn, chunks, upstream, data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._chunks:
            yield chunk

    async def aclose(self) -> None:
        await self._turn.close()
        self._guardrail.report.add(self._turn, self._data)
        await self._upstream.aclose()


class _Raising(Mapping[str, str]):
    """Headers that raise ``error`` whatever is asked of them."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def _raise(self, *_: Any) -> NoReturn:
        raise self._error

    def __getitem__(self, name: str) -> str:
        self._raise()

    def __iter__(self) -> Iterator[str]:
        self._raise()

    def __len__(self) -> int:
        self._raise()

    get = __contains__ = items = keys = values = _raise
