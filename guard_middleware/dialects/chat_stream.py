"""A streamed Chat Completions answer: every chunk checked, gathered per choice and surface, re-emitted when cleared.

Chunks are never passed on; they are parsed, their allowed fields kept in order, and encoded again. What is said
is gathered per (choice, surface): content, each kind of reasoning, refusal, citations, and each tool call by its
index, so that text split over chunks, choices or parallel calls is judged whole. The whole answer is released at
once; a later release in windows needs only a bound per choice on ``ParsedStream.chunks``, which are in order.

Refuses (``UpstreamError``):
- named events, data that is not a chunk, ``{"error": ...}``, anything after ``[DONE]``;
- unknown fields that carry content, audio, pictures, choices that were not asked for;
- content of a choice after its ``finish_reason``;
- an end without ``[DONE]``, without choices, or with a choice that has no ``finish_reason``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from guard_middleware import sse
from guard_middleware.dialects.base import Answer, Options, ParsedRequest, Ruling
from guard_middleware.dialects.chat_fields import CALL, CHUNK, CHUNK_CHOICE, DELTA, TOOL_CALLS
from guard_middleware.dialects.chat_moderation import explain
from guard_middleware.dialects.chat_response import (
    blocked,
    check_role,
    read_envelope,
    read_index,
    spoken,
    upstream_error,
)
from guard_middleware.dialects.chat_shared import arguments_text, read_annotations
from guard_middleware.dialects.fields import (
    FieldError,
    admit,
    as_identifier,
    as_list,
    as_object,
    as_word,
    in_order,
    invalid,
    unsupported_content,
)
from guard_middleware.errors import UpstreamError, UpstreamErrorKind
from guard_middleware.strictjson import JSONValue, StrictJSONError, dumps, loads
from guard_middleware.types import Message, Part, Text, ToolCall

SSE_TYPE = b"text/event-stream; charset=utf-8"
DONE = "[DONE]"
_CALLS = 128
_PER_CHUNK = 64


@dataclass(slots=True)
class _Call:
    id: str = ""
    kind: str = "function"
    name: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)

    def part(self) -> ToolCall:
        arguments = "".join(self.arguments)
        return ToolCall(
            self.id, "".join(self.name), arguments_text(arguments) if self.kind == "function" else arguments
        )


@dataclass(slots=True)
class _Choice:
    """What one choice has said so far, by surface."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    calls: dict[int, _Call] = field(default_factory=dict)
    function_call: _Call | None = None
    citations: list[Part] = field(default_factory=list)
    extras: dict[str, list[str]] = field(default_factory=dict)
    finish_reason: str | None = None

    def message(self, shared: dict[str, list[str]]) -> Message:
        parts = spoken({name: "".join(pieces) for name, pieces in self.texts.items()})
        parts += self.citations
        parts += [call.part() for _, call in sorted(self.calls.items())]
        if self.function_call is not None:
            parts.append(self.function_call.part())
        parts += [Text("".join(pieces)) for pieces in [*self.extras.values(), *shared.values()]]
        return Message("assistant", tuple(parts))


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk to re-emit: its top level without choices, and its choices as (index, choice)."""

    body: dict[str, JSONValue]
    choices: tuple[tuple[int, dict[str, JSONValue]], ...]


@dataclass(frozen=True, slots=True)
class ParsedStream:
    """A finished stream, none of it released."""

    chunks: tuple[Chunk, ...]
    answers: tuple[Answer, ...]
    include_usage: bool

    @property
    def content_type(self) -> bytes:
        return SSE_TYPE

    def render(self, ruling: Ruling) -> bytes:
        """Every event to ``[DONE]``. A blocked choice is one chunk, where it would have begun.

        There, and not at the end, because SDKs take the order in which choices appear for their index.
        """
        block = {a.index for a in self.answers if ruling.blocked(a.index, bool(a.message.parts))}
        told: set[int] = set()
        frames: list[dict[str, Any]] = []
        for chunk in self.chunks:
            choices: list[dict[str, JSONValue]] = []
            for index, choice in chunk.choices:
                if index not in block:
                    choices.append(choice)
                elif index not in told:
                    told.add(index)
                    delta, finish_reason = blocked(ruling.choices[index].message, ruling.soft)
                    choices.append({"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason})
            if choices or not chunk.choices:
                frames.append({**chunk.body, "choices": choices})
        last = next(frame for frame in reversed(frames) if frame["choices"])
        last.update(explain(ruling))
        if self.include_usage and frames[-1].get("usage") is None:
            # The usage came with a chunk of a blocked choice.
            bodies = [chunk.body for chunk in self.chunks if chunk.body.get("usage") is not None]
            frames += [{**body, "choices": []} for body in bodies[-1:]]
        return b"".join([*(sse.encode(dumps(frame)) for frame in frames), sse.encode(DONE)])


class ChatStreamParser:
    """Feed it every event of one stream, then ``finish``."""

    def __init__(self, request: ParsedRequest, options: Options) -> None:
        self._request, self._options = request, options
        self._choices: dict[int, _Choice] = {}
        self._chunks: list[Chunk] = []
        self._extras: dict[str, list[str]] = {}
        self._done = False

    def feed(self, event: sse.Event) -> None:
        """Take one event; raises ``UpstreamError``."""
        if self._done:
            raise UpstreamError(UpstreamErrorKind.MALFORMED, "data after [DONE]")
        if event.event == "error":
            raise UpstreamError(UpstreamErrorKind.RESET, "the upstream reported an error inside its stream")
        if event.event not in ("", "message"):
            raise UpstreamError(UpstreamErrorKind.UNSUPPORTED, "a named event in a stream of this API")
        if event.data.strip(" ") == DONE:
            self._done = True
            return
        try:
            self._chunk(loads(event.data.encode("utf-8")))
        except (StrictJSONError, UnicodeEncodeError):
            raise UpstreamError(UpstreamErrorKind.MALFORMED, "an event that is not JSON") from None
        except FieldError as error:
            raise upstream_error(error) from None

    def finish(self) -> ParsedStream:
        """The whole answer; raises ``UpstreamError`` where the stream is not complete."""
        if not self._done:
            raise UpstreamError(UpstreamErrorKind.RESET, "the stream ended without [DONE]")
        if not self._choices or any(choice.finish_reason is None for choice in self._choices.values()):
            raise UpstreamError(UpstreamErrorKind.MALFORMED, "the stream ended without a finish_reason")
        answers = tuple(
            Answer(index, choice.message(self._extras), choice.finish_reason)
            for index, choice in sorted(self._choices.items())
        )
        return ParsedStream(tuple(self._chunks), answers, self._request.include_usage)

    def _chunk(self, value: JSONValue) -> None:
        source = as_object(value, "")
        admitted = read_envelope(CHUNK, source, self._options)
        _gather(self._extras, admitted.extras)
        items = as_list(source.get("choices"), "choices", _PER_CHUNK)
        kept = [found for number, item in enumerate(items) if (found := self._choice(item, f"choices[{number}]"))]
        if kept or (self._request.include_usage and admitted.kept.get("usage") is not None):
            self._chunks.append(Chunk(admitted.kept, tuple(kept)))

    def _choice(self, value: JSONValue, where: str) -> tuple[int, dict[str, JSONValue]] | None:
        source = as_object(value, where)
        index = read_index(source, where, self._request.choices)
        state = self._choices.setdefault(index, _Choice())
        outer = admit(CHUNK_CHOICE, source, where, self._options)
        _gather(state.extras, outer.extras)
        delta = source.get("delta")
        sent, says = self._delta(state, {} if delta is None else delta, f"{where}.delta")
        if state.finish_reason is not None:
            if says or outer.extras:
                raise invalid(f"{where}.delta", "has content after its finish_reason")
            return None
        finish_reason = outer.kept.get("finish_reason")
        if finish_reason is not None:
            state.finish_reason = as_word(finish_reason, f"{where}.finish_reason")
        return index, {"index": index, "delta": sent, **outer.kept, "finish_reason": finish_reason}

    def _delta(self, state: _Choice, value: JSONValue, where: str) -> tuple[dict[str, JSONValue], bool]:
        source = as_object(value, where)
        check_role(source.get("role"), f"{where}.role")
        admitted = admit(DELTA, source, where, self._options)
        kept = admitted.kept
        _gather(state.texts, admitted.texts)
        _gather(state.extras, admitted.extras)
        says = any(admitted.texts.values()) or bool(admitted.extras)
        if (annotations := source.get("annotations")) is not None:
            kept["annotations"], found = read_annotations(annotations, f"{where}.annotations", self._options)
            state.citations += found
            says = says or bool(found)
        if (calls := source.get("tool_calls")) is not None:
            kept["tool_calls"] = self._tool_calls(state, calls, f"{where}.tool_calls")
            says = says or bool(calls)
        if (call := source.get("function_call")) is not None:
            state.function_call = state.function_call or _Call()
            kept["function_call"] = self._call(state, state.function_call, call, f"{where}.function_call")
            says = True
        return in_order(source, kept), says

    def _tool_calls(self, state: _Choice, value: JSONValue, path: str) -> list[JSONValue]:
        kept: list[JSONValue] = []
        for number, item in enumerate(as_list(value, path, _CALLS)):
            where = f"{path}[{number}]"
            source = as_object(item, where)
            index = source.get("index")
            if type(index) is not int or not 0 <= index < _CALLS:
                raise invalid(f"{where}.index", "must be the index of a tool call")
            kind = source.get("type") or ("custom" if "custom" in source else "function")
            if not isinstance(kind, str) or kind not in TOOL_CALLS:
                raise unsupported_content(f"{where}.type", "this type of tool call cannot be moderated")
            call = state.calls.setdefault(index, _Call(kind=kind))
            if source.get("type") not in (None, call.kind):
                raise invalid(f"{where}.type", "changes in the middle of a call")
            admitted = admit(TOOL_CALLS[call.kind], source, where, self._options)
            _gather(state.extras, admitted.extras)
            if source.get("id") is not None:
                admitted.kept["id"] = source["id"]
                if source["id"] != "":
                    call.id = as_identifier(source["id"], f"{where}.id")
            if source.get(call.kind) is not None:
                admitted.kept[call.kind] = self._call(state, call, source[call.kind], f"{where}.{call.kind}")
            kept.append(in_order(source, admitted.kept))
        return kept

    def _call(self, state: _Choice, call: _Call, value: JSONValue, where: str) -> dict[str, JSONValue]:
        table = CALL[call.kind]
        admitted = admit(table, value, where, self._options)
        _gather(state.extras, admitted.extras)
        for name, said in zip(table, (call.name, call.arguments), strict=True):
            if name in admitted.texts:
                said.append(admitted.texts[name])
        return admitted.kept


def _gather(into: dict[str, list[str]], pieces: dict[str, str]) -> None:
    for name, text in pieces.items():
        into.setdefault(name, []).append(text)
