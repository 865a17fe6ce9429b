"""A streamed Messages answer: every event checked, made a frame, encoded again when it is cleared.

There is one choice. Each block is a surface (``block.0``, its citations ``block.0.citations``), so that text split
over deltas is judged whole. Calls, results of server-run tools and fields that the operator calls moderated leave
only with the last verdict. What ends the answer (``message_delta``, ``message_stop``) is kept for ``close``; a cut
closes the open block there and stops as a ``refusal``. Pings of the upstream are dropped, ours stand in for them.

Refuses (``UpstreamError``):
- events of unknown type, a name that is not the data's type, data that is not JSON, ``error``;
- events out of order: blocks that overlap, leave out an index, or go on after their end; anything after the end;
- deltas that do not belong to their block, unknown fields that carry content, blocks that cannot be screened;
- an end without ``message_stop``, without ``stop_reason``, or within a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from guard_middleware import sse
from guard_middleware.dialects.answer_shared import read_data, upstream_error
from guard_middleware.dialects.anthropic_error import error_event
from guard_middleware.dialects.base import Answer, Frame, Notice, Options, ParsedRequest, PublicError, Ruling, Said
from guard_middleware.dialects.chat_shared import arguments_text
from guard_middleware.dialects.fields import Admitted, FieldError, admit, as_object, in_order, invalid
from guard_middleware.dialects.messages_blocks import CALLS, typed
from guard_middleware.dialects.messages_fields import DELTAS, ENDING, EVENTS
from guard_middleware.dialects.messages_response import (
    explained,
    read_ending,
    read_envelope,
    reader,
    refusal,
    thread_id,
)
from guard_middleware.errors import UpstreamError, UpstreamErrorKind
from guard_middleware.strictjson import JSONValue, dumps
from guard_middleware.types import Message, Part, Reasoning, Text, ToolCall

#: the deltas that each type of block takes
_TAKES: dict[str, frozenset[str]] = {
    "text": frozenset({"text_delta", "citations_delta"}),
    "thinking": frozenset({"thinking_delta", "signature_delta"}),
    "tool_use": frozenset({"input_json_delta"}),
    "server_tool_use": frozenset({"input_json_delta"}),
}
_Object = dict[str, JSONValue]


def encode(body: _Object) -> bytes:
    """One event; its name repeats its type, because clients skip events without one."""
    return sse.encode(dumps(body), str(body["type"]))


@dataclass(slots=True)
class _Block:
    """What one block has said. ``start`` is all of a block that comes in one piece."""

    kind: str
    start: list[Part] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    citations: list[str] = field(default_factory=list)
    id: str = ""
    name: str = ""

    def parts(self) -> list[Part]:
        text, citations = "".join(self.texts), "".join(self.citations)
        said: list[Part] = []
        if self.kind in CALLS:
            said = [ToolCall(self.id, self.name, arguments_text(text) or "{}")]
        elif text:
            said = [Reasoning(text) if self.kind == "thinking" else Text(text)]
        return [*said, *([Text(citations)] if citations else []), *self.start]


class MessagesStreamParser:
    """``base.StreamParser`` of this API."""

    keep_alive = encode({"type": "ping"})

    def __init__(self, request: ParsedRequest, options: Options) -> None:
        self._request, self._options = request, options
        self._blocks: list[_Block] = []
        self._open = False
        self._message: _Object | None = None
        self._usage: _Object = {}
        self._ending: _Object = {}
        self._extras: list[Part] = []
        self._done = False
        #: what has left: the start, so many blocks, and the index of one that is open
        self._begun = False
        self._sent = 0
        self._sent_open: int | None = None
        self._blocked: tuple[Notice, bool] | None = None

    @property
    def answer_id(self) -> str | None:
        return thread_id(self._request, self._message or {})

    def feed(self, event: sse.Event) -> Sequence[Frame]:
        """Take one event; raises ``UpstreamError``."""
        if self._done:
            if event == sse.Event("", "[DONE]", event.id):  # vLLM's habit from its other APIs
                return ()
            raise UpstreamError(UpstreamErrorKind.MALFORMED, "data after message_stop")
        if event.event == "error":
            raise UpstreamError(UpstreamErrorKind.RESET, "the upstream reported an error inside its stream")
        try:
            return self._event(event.event, read_data(event))
        except FieldError as error:
            raise upstream_error(error) from None

    def finish(self) -> tuple[Answer, ...]:
        """The whole answer; raises ``UpstreamError`` where the stream is not complete."""
        if not self._done:
            raise UpstreamError(UpstreamErrorKind.RESET, "the stream ended without message_stop")
        stop_reason = self._ending.get("stop_reason")
        if not isinstance(stop_reason, str) or not stop_reason or self._open:
            raise UpstreamError(UpstreamErrorKind.MALFORMED, "the stream ended without a stop_reason, or in a block")
        parts = [part for block in self._blocks for part in block.parts()]
        return (Answer(0, Message("assistant", (*parts, *self._extras)), stop_reason),)

    def release(self, frame: Frame) -> bytes:
        body: _Object = frame.value
        match body["type"]:
            case "message_start":
                self._begun = True
            case "content_block_start":
                self._sent_open = self._sent
                self._sent += 1
            case "content_block_stop":
                self._sent_open = None
        return encode(body)

    def cut(self, choice: int, notice: Notice, soft: bool) -> bytes:
        """Ends the blocks; ``close`` says why, with the usage, in the one ``message_delta`` that clients expect."""
        self._blocked = notice, soft
        events: list[_Object] = []
        if not self._begun:
            events.append({"type": "message_start", "message": self._message or {}})
        if self._sent_open is not None:
            events.append({"type": "content_block_stop", "index": self._sent_open})
        if soft:
            events += text_block(self._sent, notice.message)
        return b"".join(map(encode, events))

    def close(self, ruling: Ruling) -> bytes:
        started = (self._message or {}).get("usage")
        known = self._usage or ({"output_tokens": started.get("output_tokens")} if isinstance(started, dict) else {})
        usage: _Object = {**known, "output_tokens": known.get("output_tokens") or 0}
        delta = refusal(*self._blocked) if self._blocked else self._ending
        ending: _Object = {"type": "message_delta", "delta": delta, "usage": usage, **explained(ruling)}
        return encode(ending) + encode({"type": "message_stop"})

    def fail(self, error: PublicError) -> bytes:
        return error_event(error)

    def _event(self, name: str, source: _Object) -> Sequence[Frame]:
        if source.get("type") == "error":
            raise UpstreamError(UpstreamErrorKind.RESET, "the upstream reported an error inside its stream")
        source, kind, table = typed(EVENTS, source, "")
        if name not in ("", kind):
            raise invalid("type", "is not the name of its event")
        if kind == "ping":
            return ()
        if (kind == "message_start") != (self._message is None):
            raise invalid("type", "message_start comes first, and once")
        admitted = admit(table, source, "", self._options)
        extras: list[Part] = [Text(text) for text in admitted.extras.values()]
        self._extras += extras
        match kind:
            case "message_start":
                frame = self._start(source, admitted)
            case "content_block_start":
                frame = self._block_start(source, admitted)
            case "content_block_delta":
                frame = self._block_delta(source, admitted)
            case "content_block_stop":
                self._block(source)
                self._open = False
                frame = Frame(0, admitted.kept)
            case "message_delta":
                self._end(source, admitted)
                return ()
            case _:
                self._done = True
                return ()
        return (Frame(0, in_order(source, frame.value), frame.said, frame.whole or bool(extras)),)

    def _start(self, source: _Object, admitted: Admitted) -> Frame:
        message = as_object(source.get("message"), "message")
        if message.get("content") not in (None, []):
            raise invalid("message.content", "must be empty at the start of a stream")
        envelope, said = read_envelope(message, "message", self._request, self._options)
        self._extras += said
        self._message = in_order(message, envelope.kept) | envelope.kept | {"content": []}
        admitted.kept["message"] = self._message
        return Frame(0, admitted.kept, whole=bool(said))

    def _block_start(self, source: _Object, admitted: Admitted) -> Frame:
        index = len(self._blocks)
        if not _is_index(source.get("index"), index) or self._open:
            raise invalid("index", "must be that of the next block, after the end of the last")
        value = as_object(source.get("content_block"), "content_block")
        kept, parts = reader(self._options).block(value, "assistant", "content_block", ())
        kind = str(kept["type"])
        block = _Block(kind)
        self._blocks.append(block)
        self._open = True
        admitted.kept["content_block"] = kept
        first, rest = (parts[0], parts[1:]) if parts else (None, [])
        if isinstance(first, ToolCall):
            block.id, block.name, block.start = first.id, first.name, rest
            block.texts = [first.arguments] if kept["input"] else []
            return Frame(0, admitted.kept, whole=True)
        if kind not in _TAKES:
            block.start = parts
            return Frame(0, admitted.kept, whole=bool(parts))
        assert isinstance(first, Text | Reasoning)
        block.texts, block.start = [first.text], rest
        return Frame(0, admitted.kept, self._said(index, first.text), whole=bool(rest))

    def _block_delta(self, source: _Object, admitted: Admitted) -> Frame:
        block = self._block(source)
        delta, kind, table = typed(DELTAS, source.get("delta"), "delta")
        if kind not in _TAKES.get(block.kind, frozenset()):
            raise invalid("delta.type", "does not belong to its block")
        inner = admit(table, delta, "delta", self._options)
        block.start += [Text(text) for text in inner.extras.values()]
        surface = len(self._blocks) - 1
        said: tuple[Said, ...] = ()
        whole = bool(inner.extras)
        if kind == "citations_delta":
            inner.kept["citation"], text = reader(self._options).citation(delta.get("citation"), "delta.citation")
            block.citations.append(text)
            said = (Said(f"block.{surface}.citations", text),) if text else ()
        elif kind != "signature_delta":
            (text,) = inner.texts.values() or ("",)
            block.texts.append(text)
            said = self._said(surface, text)
            whole = whole or kind == "input_json_delta"
        admitted.kept["delta"] = in_order(delta, inner.kept)
        return Frame(0, admitted.kept, () if kind == "input_json_delta" else said, whole)

    def _said(self, index: int, text: str) -> tuple[Said, ...]:
        return (Said(f"block.{index}", text, self._blocks[index].kind == "thinking"),) if text else ()

    def _block(self, source: _Object) -> _Block:
        if not self._open or not _is_index(source.get("index"), len(self._blocks) - 1):
            raise invalid("index", "must be that of the open block")
        return self._blocks[-1]

    def _end(self, source: _Object, admitted: Admitted) -> None:
        delta = as_object(source.get("delta"), "delta")
        inner = admit(ENDING, delta, "delta", self._options)
        self._extras += [
            *read_ending(delta, inner, self._request, self._options),
            *(Text(text) for text in inner.extras.values()),
        ]
        self._ending |= in_order(delta, inner.kept)
        if isinstance(usage := admitted.kept.get("usage"), dict):
            self._usage |= usage


def _is_index(value: JSONValue, index: int) -> bool:
    return type(value) is int and value == index


def text_block(index: int, text: str) -> list[_Object]:
    """A block of our own words, as events."""
    return [
        {"type": "content_block_start", "index": index, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": index, "delta": {"type": "text_delta", "text": text}},
        {"type": "content_block_stop", "index": index},
    ]
