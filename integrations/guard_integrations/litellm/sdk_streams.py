"""Streams of LiteLLM's SDK whose pieces are released by the guard: of the type that LiteLLM made, sync or async.

What leaves is built anew from the released bytes. The object that the caller gets has everything that LiteLLM's own
has, except what that has read and not shown (``chunks``, ``completed_response``), which is what was released.
"""

from __future__ import annotations

import inspect
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from functools import cache
from typing import Any, Final

import orjson

from guard_integrations.litellm import sdk_errors, wire
from guard_integrations.litellm.portal import Host, OnGuard, Portal, Steps
from guard_integrations.litellm.relay import Relay, Turn, Whole
from guard_integrations.litellm.streams import Stream
from guard_middleware import sse
from guard_middleware.errors import UpstreamError, UpstreamErrorKind

_DONE: Final = "[DONE]"
#: what LiteLLM's streams keep of their content
_READ: Final = {
    "chunks": list, "response_uptil_now": str, "complete_response": str, "holding_chunk": str, "thinking_content": str,
    "completion_stream": None, "make_call": None, "completed_response": None, "_generated_content": str,
    "collected_chat_completion_chunks": list, "response": None,
}  # fmt: skip


class Pump:
    """Reads ``source`` where the guard wants more, and makes objects of what it released."""

    def __init__(self, portal: Portal, relay: Relay, route: wire.Route, source: Any, model: str) -> None:
        self._portal, self._relay, self._route, self._source, self._model = portal, relay, route, source, model
        self._stream = Stream(route, source)
        self._decoder = sse.Decoder(max_event_bytes=64 * 1024 * 1024)
        self._ready: deque[Any] = deque()
        self._failure: Exception | None = None
        self._over = False
        self._read_out = False
        self.shown = ""
        self.on_item: Callable[[Any], None] = lambda item: None

    def next(self, pull: Callable[[Any, Turn], Any]) -> Steps[Any]:
        """Steps to the next object, or ``END``; ``pull`` is ``next`` or ``anext``."""
        given: bytes | UpstreamError | Turn = Turn.MORE
        try:
            while not self._ready and not self._over:
                piece = yield OnGuard(self._relay.advance(given))
                given = Turn.MORE
                if piece is Turn.MORE:
                    given = yield from self._pull(pull)
                elif piece is Turn.END:
                    self._over = True
                else:
                    self._ready.extend(self._objects(piece))
        except Whole as whole:
            raise self._ended(sdk_errors.of(whole, self._model)) from None
        except UpstreamError as error:
            raise self._ended(sdk_errors.broken(error, self._model)) from None
        except BaseException:
            self.abandon()
            raise
        if self._ready:
            item = self._ready.popleft()
            self.on_item(item)
            return item
        if self._failure is not None:
            raise self._ended(self._failure)
        yield OnGuard(self._relay.close())
        if not self._read_out:  # cut: the rest of the upstream's answer is for nobody
            yield Host(self._close_source if pull is next else self._aclose_source)
        return Turn.END

    def _pull(self, pull: Callable[[Any, Turn], Any]) -> Steps[bytes | UpstreamError | Turn]:
        if self._read_out:
            return Turn.END
        try:
            item = yield Host(lambda: pull(self._source, Turn.END))
        except Exception as error:
            self._failure = error
            return UpstreamError(UpstreamErrorKind.RESET, "the stream failed")
        if item is not Turn.END:
            return self._encode(item)
        self._read_out = True
        chat = self._route in (wire.CHAT, wire.COMPLETIONS)
        return sse.encode(_DONE) if chat else Turn.END

    def _encode(self, item: Any) -> bytes | UpstreamError:
        self._stream._first = self._stream._first or item
        try:
            return self._stream._bytes(item)
        except UpstreamError as error:
            return error

    def _objects(self, piece: bytes) -> Iterator[Any]:
        for event in self._decoder.feed(piece):
            if event.data == _DONE:
                continue
            value = orjson.loads(event.data)
            if (error := sdk_errors.in_stream(value, self._model)) is not None:
                raise error
            if self._route is wire.MESSAGES:
                yield sse.encode(event.data, event.event)
            else:
                yield self._stream._object(value)

    def _ended(self, error: Exception) -> Exception:
        """The error to raise: the upstream's own where that is why the guard has nothing to release."""
        self._over = True
        self.abandon()
        if self._failure is None or not sdk_errors.is_upstreams(error):
            return error
        return sdk_errors.shown_so_far(self._failure, self.shown)

    def abandon(self) -> None:
        """Ends the exchange without waiting for it."""
        self._portal.start(self._relay.close())

    def close(self) -> None:
        self._over = True
        self._ready.clear()
        self._portal.call(self._relay.close())
        self._close_source()

    async def aclose(self) -> None:
        self._over = True
        self._ready.clear()
        await self._portal.acall(self._relay.close())
        await self._aclose_source()

    def _close_source(self) -> None:
        for held in _held(self._source):
            if callable(close := getattr(held, "close", None)) and not inspect.iscoroutinefunction(close):
                close()

    async def _aclose_source(self) -> None:
        for held in _held(self._source):
            if callable(close := getattr(held, "aclose", None) or getattr(held, "close", None)):
                closed = close()
                if inspect.isawaitable(closed):
                    await closed

    def sync_next(self) -> Any:
        return self._portal.run(self.next(next))

    async def async_next(self) -> Any:
        return await self._portal.arun(self.next(anext))


def _held(source: Any) -> Iterator[Any]:
    """A stream of LiteLLM's with the provider's stream or response under it; LiteLLM's own closes only some."""
    yield source
    for name in ("completion_stream", "response"):
        if (held := getattr(source, name, None)) is not None:
            yield held


class _Guarded:
    """Lies over one of LiteLLM's stream classes."""

    _guard: Pump

    def __iter__(self) -> Any:
        return self

    def __aiter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        if (item := self._guard.sync_next()) is Turn.END:
            raise StopIteration
        return item

    async def __anext__(self) -> Any:
        if (item := await self._guard.async_next()) is Turn.END:
            raise StopAsyncIteration
        return item

    def close(self) -> None:
        self._guard.close()

    async def aclose(self) -> None:
        await self._guard.aclose()


@cache
def _over(kind: Any) -> Any:
    return type(kind.__name__, (_Guarded, kind), {"__module__": kind.__module__})


def guarded(source: Any, pump: Pump) -> Any:
    """What the caller gets in place of ``source``."""
    if inspect.isgenerator(source):
        return _generator(pump)
    if inspect.isasyncgen(source):
        return _async_generator(pump)
    stream: Any = object.__new__(_over(type(source)))
    stream.__dict__.update(source.__dict__)
    for name, empty in _READ.items():
        if name in stream.__dict__:
            stream.__dict__[name] = None if empty is None else empty()
    stream._guard = pump
    chunks = stream.__dict__.get("chunks")

    def item_shown(item: Any) -> None:
        if chunks is not None:
            chunks.append(item)

    pump.on_item = item_shown
    weakref.finalize(stream, pump.abandon)
    return stream


def _generator(pump: Pump) -> Iterator[Any]:
    try:
        while (item := pump.sync_next()) is not Turn.END:
            yield item
    finally:
        pump.abandon()


async def _async_generator(pump: Pump) -> AsyncIterator[Any]:
    try:
        while (item := await pump.async_next()) is not Turn.END:
            yield item
    finally:
        pump.abandon()


def is_stream(result: Any) -> bool:
    return hasattr(result, "__next__") or hasattr(result, "__anext__")
