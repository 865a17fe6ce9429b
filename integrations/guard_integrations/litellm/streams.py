"""LiteLLM's streams as server-sent events of the APIs, and the events that were released as LiteLLM's objects.

LiteLLM's hooks see three kinds: chunks of a model (chat, completions), typed events (responses) and raw bytes
(messages). What leaves is always built anew from the released bytes; nothing of an object that came in is passed on.

Refuses (``UpstreamError``): whatever LiteLLM raises while it reads its upstream; an object that is none of these.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import orjson

from guard_integrations.litellm import wire
from guard_middleware import sse
from guard_middleware.errors import UpstreamError, UpstreamErrorKind

logger = logging.getLogger(__name__)

_DONE = "[DONE]"
#: what the chunks of one answer share
_HEAD = ("id", "object", "created", "model")


class StreamFailed(Exception):
    """The stream ended with an error of the guard's; ``error`` is its public form."""

    def __init__(self, error: dict[str, Any]) -> None:
        self.error = error
        super().__init__(str(error.get("message", "")))


class Stream:
    """One streamed answer. ``incoming`` feeds the guard, ``outgoing`` makes objects of what it released."""

    def __init__(self, route: wire.Route, response: AsyncIterator[Any]) -> None:
        self._route, self._response = route, response
        self._first: Any = None
        self._open: dict[int, bool] = {}
        self._made = False

    async def incoming(self) -> AsyncIterator[bytes]:
        """LiteLLM's objects as bytes."""
        try:
            async for item in self._response:
                yield self.encode(item)
        except UpstreamError:
            raise
        except Exception as error:
            logger.warning("the model's stream failed: %s", type(error).__name__)
            raise UpstreamError(UpstreamErrorKind.RESET, "the stream failed") from error
        finally:
            close: Callable[[], Any] | None = getattr(self._response, "aclose", None)
            if close is not None:
                await close()
        if self._route in (wire.CHAT, wire.COMPLETIONS):
            for piece in self.endings():
                yield piece

    async def outgoing(self, released: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        """The objects to hand on; raises ``StreamFailed`` where the stream ends with an error."""
        if self._route is wire.MESSAGES:
            async for piece in released:
                yield piece
            return
        decoder = sse.Decoder(max_event_bytes=64 * 1024 * 1024)
        async for piece in released:
            for event in decoder.feed(piece):
                if event.data == _DONE:
                    continue
                value = orjson.loads(event.data)
                if (error := _error(value)) is not None:
                    raise StreamFailed(error)
                yield self.build(value)

    def endings(self) -> Iterator[bytes]:
        """What LiteLLM leaves out: of several choices it ends one, and it never says ``[DONE]``."""
        if not all(self._open.values()):
            for index in (index for index, still_open in self._open.items() if still_open):
                yield sse.encode(wire.encode({**self._head, "choices": [_ended(index, self._route)]}))
        yield sse.encode(_DONE)

    @property
    def _head(self) -> dict[str, Any]:
        return {name: value for name, value in wire.answer_value(self._first).items() if name in _HEAD}

    def encode(self, item: Any) -> bytes:
        """One of LiteLLM's objects as events; raises ``UpstreamError``."""
        if self._first is None:
            self._first = item
        if isinstance(item, bytes):
            return item
        if isinstance(item, str):
            return item.encode() if item.startswith(("data:", "event:", ":")) else sse.encode(item)
        value = wire.answer_value(item)
        if not isinstance(value, dict):
            raise UpstreamError(UpstreamErrorKind.UNSUPPORTED, f"a {type(item).__name__} in a stream")
        if self._route in (wire.CHAT, wire.COMPLETIONS):
            for choice in value.get("choices") or ():
                index = choice.get("index", 0)
                self._open[index] = self._open.get(index, True) and not choice.get("finish_reason")
            return sse.encode(wire.answer_bytes(value))
        return sse.encode(wire.answer_bytes(self._begun(value)), str(value.get("type", "")))

    def _begun(self, event: dict[str, Any]) -> dict[str, Any]:
        """An event as it was when it came: LiteLLM makes streams of whole answers, whose items open with all they say.

        That is left to their deltas, and the guard holds the end against it.
        """
        kind = event.get("type")
        if kind == "response.output_item.added" and event["item"].get("status") == "completed":
            self._made = True
            empty = {"content": [], "summary": [], "arguments": "", "status": "in_progress"}
            return {**event, "item": _with(event["item"], empty)}
        if kind == "response.content_part.added" and self._made:
            return {**event, "part": _with(event["part"], {"text": "", "refusal": "", "annotations": []})}
        return event

    def build(self, value: dict[str, Any]) -> Any:
        """LiteLLM's object that says what one released event says."""
        if self._route is wire.RESPONSES:
            return _event(value)
        if "moderation" in value:
            value["provider_specific_fields"] = {}  # else LiteLLM writes the fields that it knows, and no others
        if hasattr(self._first, "model_dump"):
            return wire.rebuild(self._first, value)
        from litellm.types.utils import ModelResponseStream

        return ModelResponseStream(**value)


def _ended(index: int, route: wire.Route) -> dict[str, Any]:
    said: dict[str, Any] = {"text": ""} if route is wire.COMPLETIONS else {"delta": {}}
    return {"index": index, "finish_reason": "stop", **said}


def _with(value: dict[str, Any], empty: dict[str, Any]) -> dict[str, Any]:
    """``value`` with those of its fields emptied."""
    return {**value, **{name: blank for name, blank in empty.items() if name in value}}


def _event(value: dict[str, Any]) -> Any:
    """LiteLLM's event; its general one where its own class wants more than the API promises."""
    from litellm.llms.openai.responses.transformation import OpenAIResponsesAPIConfig
    from litellm.types.llms.openai import GenericEvent

    try:
        return OpenAIResponsesAPIConfig.get_event_model_class(value.get("type", ""))(**value)
    except ValueError:
        return GenericEvent(**value)


def _error(value: Any) -> dict[str, Any] | None:
    """The error that an event carries in place of an answer."""
    if not isinstance(value, dict):
        return None
    if value.get("type") == "error":
        return value.get("error") if isinstance(value.get("error"), dict) else value
    error = value.get("error")
    return error if isinstance(error, dict) and "choices" not in value and "type" not in value else None
