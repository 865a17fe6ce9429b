"""Streams of LiteLLM's SDK whose pieces are released by the guard: of the type that LiteLLM made, sync or async.

What leaves is built anew from the released bytes. The object that the caller gets has everything that LiteLLM's own
has, except what that has read and not shown (``chunks``, ``completed_response``), which is what was released.
"""

from __future__ import annotations

import contextlib
import inspect
import uuid
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime
from typing import Any, Final

import httpx
import orjson

from guard_integrations.litellm import sdk_errors, wire
from guard_integrations.litellm.calls import Call
from guard_integrations.litellm.relay import Relay, Turn, Whole
from guard_integrations.litellm.steps import GuardLoop, Host, OnGuard, Steps
from guard_integrations.litellm.streams import Stream
from guard_middleware import sse
from guard_middleware.errors import UpstreamError, UpstreamErrorKind

_DONE: Final = "[DONE]"
#: of one released event: a held answer may leave in one
_EVENT_BYTES: Final = 64 * 1024 * 1024
_KINDS: Final[dict[Any, Any]] = {}
#: what LiteLLM's streams keep of their content
_READ: Final = {
    "chunks": list, "response_uptil_now": str, "complete_response": str, "holding_chunk": str, "thinking_content": str,
    "completion_stream": None, "make_call": None, "completed_response": None, "_generated_content": str,
    "collected_chat_completion_chunks": list, "response": None,
}  # fmt: skip


class Pump:
    """Reads ``source`` where the guard wants more, and makes objects of what it released.

    ``chunks`` and ``shown`` are the objects and the text that the caller has so far.
    """

    def __init__(self, loop: GuardLoop, relay: Relay, call: Call, source: Any) -> None:
        self._loop, self._relay, self._route, self._source, self._model = loop, relay, call.route, source, call.model
        self._stream = Stream(call.route, source)
        self._decoder = sse.Decoder(max_event_bytes=_EVENT_BYTES)
        self._ready: deque[Any] = deque()
        self._upstreams: Exception | None = None
        self._error: Exception | None = None
        self._over = self._read_out = False
        self.chunks: list[Any] = []
        self.shown = ""

    @classmethod
    def of(cls, loop: GuardLoop, relay: Relay, call: Call, events: bytes) -> Pump:
        """One that has all its events."""
        pump = cls(loop, relay, call, None)
        pump._ready.extend(pump._objects(events))
        pump._over = pump._read_out = True
        return pump

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
                    self._over, self._error = True, self._upstreams
                else:
                    self._ready.extend(self._objects(piece))
        except Exception as error:
            self._over, self._error = True, self._raised(error)
        except BaseException:
            self.abandon()
            raise
        if self._ready:
            item = self._ready.popleft()
            self.chunks.append(item)
            self.shown += _text(item)
            return item
        yield OnGuard(self._relay.close())
        if not self._read_out:  # cut: the rest of the upstream's answer is for nobody
            self._read_out = True
            yield Host(self._close_source if pull is next else self._aclose_source)
        if self._error is not None:
            raised, self._error = self._error, None
            raise raised from None
        return Turn.END

    def _pull(self, pull: Callable[[Any, Turn], Any]) -> Steps[bytes | UpstreamError | Turn]:
        if self._read_out:
            return Turn.END
        try:
            item = yield Host(lambda: pull(self._source, Turn.END))
        except Exception as error:
            self._upstreams = error
            return UpstreamError(UpstreamErrorKind.RESET, "the stream failed")
        if item is Turn.END:
            self._read_out = True
            return b"".join(self._stream.endings()) if self._route in (wire.CHAT, wire.COMPLETIONS) else Turn.END
        try:
            return self._stream.encode(item)
        except UpstreamError as error:
            return error

    def _objects(self, piece: bytes) -> Iterator[Any]:
        for event in self._decoder.feed(piece):
            if event.data == _DONE:
                continue
            value = orjson.loads(event.data)
            if (error := sdk_errors.in_stream(value, self._model)) is not None:
                raise error
            yield sse.encode(event.data, event.event) if self._route is wire.MESSAGES else self._stream.build(value)

    def _raised(self, error: Exception) -> Exception:
        """The error for the caller: LiteLLM's own where that is why the guard has nothing to release."""
        if isinstance(error, Whole):
            error = sdk_errors.of(error, self._model)
        elif isinstance(error, UpstreamError):
            error = sdk_errors.broken(error, self._model)
        if self._upstreams is not None and isinstance(error, sdk_errors.AnswerUnreadable):
            return sdk_errors.after(self._upstreams, self.shown)
        return error

    def abandon(self) -> None:
        """Ends the exchange without waiting for it."""
        self._over = True
        self._loop.begin(self._relay.close())

    def close(self) -> None:
        self._over = self._read_out = True
        self._ready.clear()
        self._loop.call(self._relay.close())
        self._close_source()

    async def aclose(self) -> None:
        self._over = self._read_out = True
        self._ready.clear()
        await self._loop.acall(self._relay.close())
        await self._aclose_source()

    def _close_source(self) -> None:
        for held in _held(self._source):
            if callable(close := getattr(held, "close", None)) and not inspect.iscoroutinefunction(close):
                with contextlib.suppress(Exception):  # the answer is over, however its connection ends
                    close()

    async def _aclose_source(self) -> None:
        for held in _held(self._source):
            if callable(close := getattr(held, "aclose", None) or getattr(held, "close", None)):
                with contextlib.suppress(Exception):
                    closed = close()
                    if inspect.isawaitable(closed):
                        await closed

    def sync_next(self) -> Any:
        return self._loop.run(self.next(next))

    async def async_next(self) -> Any:
        return await self._loop.arun(self.next(anext))


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


def _over(kind: Any) -> Any:
    if kind not in _KINDS:
        _KINDS[kind] = type(kind.__name__, (_Guarded, kind), {"__module__": kind.__module__})
    return _KINDS[kind]


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
    if "chunks" in stream.__dict__:
        stream.chunks = pump.chunks
    stream._guard = pump
    weakref.finalize(stream, pump.abandon)
    return stream


def refusing(call: Call, pump: Pump) -> Any:
    """A stream of the guard's own, of the type that LiteLLM would have made."""
    from litellm.litellm_core_utils.litellm_logging import Logging

    logging = Logging(
        model=call.model,
        messages=[],
        stream=True,
        call_type="completion",
        start_time=datetime.now(),  # as LiteLLM does: local and without a zone
        litellm_call_id=str(uuid.uuid4()),
        function_id="",
    )
    source: Any
    if call.route is wire.CHAT:
        from litellm import CustomStreamWrapper

        source = CustomStreamWrapper(None, call.model, logging)
    elif call.route is wire.COMPLETIONS:
        from litellm.utils import TextCompletionStreamWrapper

        source = TextCompletionStreamWrapper(None, call.model)
    elif call.route is wire.RESPONSES:
        from litellm.responses.streaming_iterator import BaseResponsesAPIStreamingIterator

        source = BaseResponsesAPIStreamingIterator(httpx.Response(200), call.model, None, logging)
    else:
        source = _Empty()
    return guarded(source, pump)


class _Empty:
    """LiteLLM's streams of the Messages API are plain iterators."""


def _text(item: Any) -> str:
    """What a chunk shows, where LiteLLM would go on from it elsewhere."""
    for choice in getattr(item, "choices", None) or ():
        return str(getattr(getattr(choice, "delta", None), "content", None) or "")
    return str(getattr(item, "delta", None) or "")


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
