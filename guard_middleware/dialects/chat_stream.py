"""A streamed Chat Completions answer: every chunk checked, cut into frames of one choice, re-emitted when cleared.

Chunks are never passed on; they are parsed, their allowed fields kept in order, and encoded again. What is said
is gathered per (choice, surface): content, each kind of reasoning, refusal, citations, and each tool call by its
index, so that text split over chunks, choices or parallel calls is judged whole. Citations, tool calls and fields
that the operator calls moderated leave only with the last verdict.

Refuses (``UpstreamError``):
- named events, data that is not a chunk, ``{"error": ...}``, anything after ``[DONE]``;
- unknown fields that carry content, audio, pictures, choices that were not asked for;
- content of a choice after its ``finish_reason``;
- an end without ``[DONE]``, without choices, or with a choice that has no ``finish_reason``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from guard_middleware import sse
from guard_middleware.dialects.answer_shared import DONE, read_chunk, read_envelope, read_index, upstream_error
from guard_middleware.dialects.base import Answer, Frame, Notice, Options, ParsedRequest, PublicError, Ruling, Said
from guard_middleware.dialects.chat_fields import CALL, CHUNK, CHUNK_CHOICE, DELTA, TOOL_CALLS
from guard_middleware.dialects.chat_moderation import explain
from guard_middleware.dialects.chat_response import blocked, check_role, spoken
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
from guard_middleware.dialects.openai_error import openai_error
from guard_middleware.errors import UpstreamError, UpstreamErrorKind
from guard_middleware.strictjson import JSONValue, dumps
from guard_middleware.types import Message, Part, Text, ToolCall

_CALLS = 128
_PER_CHUNK = 64
#: what an ending of ours repeats of the upstream's chunks: identity, never content
_ENVELOPE = ("id", "object", "created", "model", "service_tier", "system_fingerprint")


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
class _Piece:
    """A frame's value: one choice of a chunk, and the chunk's top level."""

    body: dict[str, JSONValue]
    choice: dict[str, JSONValue]


class ChatStreamParser:
    """``base.StreamParser`` of this API."""

    keep_alive = sse.comment("guard pending")
    answer_id = None

    def __init__(self, request: ParsedRequest, options: Options) -> None:
        self._request, self._options = request, options
        self._choices: dict[int, _Choice] = {}
        self._envelope: dict[str, JSONValue] = {}
        self._usage: dict[str, JSONValue] | None = None
        self._endings: dict[int, _Piece] = {}
        self._cut: set[int] = set()
        self._extras: dict[str, list[str]] = {}
        self._done = False

    def feed(self, event: sse.Event) -> Sequence[Frame]:
        """Take one event; raises ``UpstreamError``."""
        if self._done:
            raise UpstreamError(UpstreamErrorKind.MALFORMED, "data after [DONE]")
        chunk = read_chunk(event)
        if chunk is None:
            self._done = True
            return ()
        try:
            return self._chunk(chunk)
        except FieldError as error:
            raise upstream_error(error) from None

    def finish(self) -> tuple[Answer, ...]:
        """The whole answer; raises ``UpstreamError`` where the stream is not complete."""
        if not self._done:
            raise UpstreamError(UpstreamErrorKind.RESET, "the stream ended without [DONE]")
        if not self._choices or any(choice.finish_reason is None for choice in self._choices.values()):
            raise UpstreamError(UpstreamErrorKind.MALFORMED, "the stream ended without a finish_reason")
        return tuple(
            Answer(index, choice.message(self._extras), choice.finish_reason)
            for index, choice in sorted(self._choices.items())
        )

    def release(self, frame: Frame) -> bytes:
        piece: _Piece = frame.value
        return sse.encode(dumps({**piece.body, "choices": [piece.choice]}))

    def cut(self, choice: int, notice: Notice, soft: bool) -> bytes:
        self._cut.add(choice)
        delta, finish_reason = blocked(notice.message, soft)
        ending: JSONValue = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        said = explain(Ruling(None, {choice: notice}))
        return sse.encode(dumps({**self._envelope, "choices": [ending], **said}))

    def close(self, ruling: Ruling) -> bytes:
        """The chunks that end the choices, in the order in which they ended, the moderation, usage, ``[DONE]``."""
        endings = [piece for index, piece in self._endings.items() if index not in self._cut]
        frames: list[dict[str, JSONValue]] = [{**piece.body, "choices": [piece.choice]} for piece in endings]
        if frames:
            frames[-1].update(explain(ruling))
        if self._request.include_usage and self._usage is not None:
            body = self._usage if endings else {**self._envelope, "usage": self._usage["usage"]}
            frames.append({**body, "choices": []})
        return b"".join([*(sse.encode(dumps(frame)) for frame in frames), sse.encode(DONE)])

    def fail(self, error: PublicError) -> bytes:
        return sse.encode(openai_error(error, prompt_param="messages").body) + sse.encode(DONE)

    def _chunk(self, source: dict[str, JSONValue]) -> list[Frame]:
        admitted = read_envelope(CHUNK, source, self._options)
        _gather(self._extras, admitted.extras)
        body = {name: value for name, value in admitted.kept.items() if name != "usage"}
        if admitted.kept.get("usage") is not None:
            self._usage = admitted.kept
        self._envelope = self._envelope or {name: body[name] for name in _ENVELOPE if name in body}
        frames: list[Frame] = []
        for number, item in enumerate(as_list(source.get("choices"), "choices", _PER_CHUNK)):
            frames += self._choice(item, f"choices[{number}]", body, bool(admitted.extras))
        return frames

    def _choice(self, value: JSONValue, where: str, body: dict[str, JSONValue], extras: bool) -> Iterator[Frame]:
        source = as_object(value, where)
        index = read_index(source, where, self._request.choices)
        state = self._choices.setdefault(index, _Choice())
        outer = admit(CHUNK_CHOICE, source, where, self._options)
        _gather(state.extras, outer.extras)
        delta = source.get("delta")
        sent, said, whole = self._delta(state, {} if delta is None else delta, f"{where}.delta")
        whole = whole or bool(outer.extras) or extras
        if state.finish_reason is not None:
            if said or whole:
                raise invalid(f"{where}.delta", "has content after its finish_reason")
            return
        finish_reason = outer.kept.get("finish_reason")
        if finish_reason is not None:
            state.finish_reason = as_word(finish_reason, f"{where}.finish_reason")
        if finish_reason is None or said or whole:
            choice = {"index": index, "delta": sent, **outer.kept, "finish_reason": None}
            yield Frame(index, _Piece(body, choice), said, whole)
            sent = {}
        if finish_reason is not None:
            self._endings[index] = _Piece(
                {name: body[name] for name in _ENVELOPE if name in body},
                {"index": index, "delta": sent, **outer.kept, "finish_reason": finish_reason},
            )

    def _delta(
        self, state: _Choice, value: JSONValue, where: str
    ) -> tuple[dict[str, JSONValue], tuple[Said, ...], bool]:
        """What to send of a delta, the text in it by surface, and whether it must wait for the last verdict."""
        source = as_object(value, where)
        check_role(source.get("role"), f"{where}.role")
        admitted = admit(DELTA, source, where, self._options)
        kept = admitted.kept
        _gather(state.texts, admitted.texts)
        _gather(state.extras, admitted.extras)
        said = tuple(Said(name, text, name.startswith("reasoning")) for name, text in admitted.texts.items() if text)
        whole = bool(admitted.extras)
        if (annotations := source.get("annotations")) is not None:
            kept["annotations"], found = read_annotations(annotations, f"{where}.annotations", self._options)
            state.citations += found
            whole = whole or bool(found)
        if (calls := source.get("tool_calls")) is not None:
            kept["tool_calls"] = self._tool_calls(state, calls, f"{where}.tool_calls")
            whole = whole or bool(calls)
        if (call := source.get("function_call")) is not None:
            state.function_call = state.function_call or _Call()
            kept["function_call"] = self._call(state, state.function_call, call, f"{where}.function_call")
            whole = True
        return in_order(source, kept), said, whole

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
