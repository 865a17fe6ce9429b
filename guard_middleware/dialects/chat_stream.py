"""A streamed Chat Completions answer; see ``chunk_stream``.

What is said is gathered per (choice, surface): content, each kind of reasoning, refusal, citations, and each tool
call by its index, so that text split over chunks, choices or parallel calls is judged whole. Citations, tool calls
and fields that the operator calls moderated leave only with the last verdict.

Refuses besides (``UpstreamError``): unknown fields that carry content, audio, pictures; content of a choice after its
``finish_reason``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from guard_middleware.dialects.answer_shared import unread_id
from guard_middleware.dialects.base import Frame, Notice, Said
from guard_middleware.dialects.chat_fields import CALL, CHUNK, CHUNK_CHOICE, DELTA, TOOL_CALLS
from guard_middleware.dialects.chat_response import blocked, check_role, spoken
from guard_middleware.dialects.chat_shared import MOST_CALLS, arguments_text, read_annotations
from guard_middleware.dialects.chunk_stream import Choice, ChunkStreamParser, Piece, gather
from guard_middleware.dialects.fields import (
    admit,
    as_identifier,
    as_list,
    as_object,
    as_word,
    in_order,
    invalid,
    unsupported_content,
)
from guard_middleware.strictjson import JSONValue
from guard_middleware.types import Part, ToolCall


@dataclass(slots=True)
class _Call:
    ids: list[str] = field(default_factory=list)
    kind: str = "function"
    name: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)

    def parts(self) -> list[Part]:
        name, arguments = "".join(self.name), "".join(self.arguments)
        said = arguments_text(arguments) if self.kind == "function" else arguments
        # Most servers say the id once, some in every piece; clients join what differs.
        id = "".join(self.ids if len(set(self.ids)) > 1 else self.ids[:1])
        return [ToolCall(id, name, said), *unread_id(id, name)]


@dataclass(slots=True)
class _Choice(Choice):
    calls: dict[int, _Call] = field(default_factory=dict)
    function_call: _Call | None = None
    citations: list[Part] = field(default_factory=list)


class ChatStreamParser(ChunkStreamParser[_Choice]):
    """``base.StreamParser`` of this API."""

    table = CHUNK
    identity = ("id", "object", "created", "model", "service_tier", "system_fingerprint")
    prompt_param = "messages"

    def _new(self) -> _Choice:
        return _Choice()

    def _said(self, choice: _Choice) -> list[Part]:
        parts = spoken({name: "".join(pieces) for name, pieces in choice.texts.items()})
        parts += choice.citations
        calls = [call for _, call in sorted(choice.calls.items())]
        calls += [choice.function_call] if choice.function_call else []
        return [*parts, *(part for call in calls for part in call.parts())]

    def _blocked(self, index: int, notice: Notice, soft: bool) -> dict[str, JSONValue]:
        delta, finish_reason = blocked(notice.message, soft)
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

    def _read(
        self,
        state: _Choice,
        index: int,
        source: dict[str, JSONValue],
        where: str,
        body: dict[str, JSONValue],
        whole: bool,
    ) -> Iterator[Frame]:
        outer = admit(CHUNK_CHOICE, source, where, self._options)
        gather(state.extras, outer.extras)
        delta = source.get("delta")
        sent, said, waits = self._delta(state, {} if delta is None else delta, f"{where}.delta")
        whole = whole or waits or bool(outer.extras)
        if state.finish_reason is not None:
            if said or whole:
                raise invalid(f"{where}.delta", "has content after its finish_reason")
            return
        finish_reason = outer.kept.get("finish_reason") or None  # some servers write "" until the end
        if finish_reason is not None:
            state.finish_reason = as_word(finish_reason, f"{where}.finish_reason")
        if finish_reason is None or said or whole:
            choice = {"index": index, "delta": sent, **outer.kept, "finish_reason": None}
            yield Frame(index, Piece(body, choice), said, whole)
            sent = {}
        if finish_reason is not None:
            ending = {"index": index, "delta": sent, **outer.kept, "finish_reason": finish_reason}
            self._endings[index] = Piece(self._head(body), ending)

    def _delta(
        self, state: _Choice, value: JSONValue, where: str
    ) -> tuple[dict[str, JSONValue], tuple[Said, ...], bool]:
        """What to send of a delta, the text in it by surface, and whether it must wait for the last verdict."""
        source = as_object(value, where)
        check_role(source.get("role"), f"{where}.role")
        admitted = admit(DELTA, source, where, self._options)
        kept = admitted.kept
        gather(state.texts, admitted.texts)
        gather(state.extras, admitted.extras)
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
        for number, item in enumerate(as_list(value, path, MOST_CALLS)):
            where = f"{path}[{number}]"
            source = as_object(item, where)
            index = source.get("index")
            if type(index) is not int or not 0 <= index < MOST_CALLS:
                raise invalid(f"{where}.index", "must be the index of a tool call")
            kind = source.get("type") or ("custom" if "custom" in source else "function")
            if not isinstance(kind, str) or kind not in TOOL_CALLS:
                raise unsupported_content(f"{where}.type", "this type of tool call cannot be moderated")
            call = state.calls.setdefault(index, _Call(kind=kind))
            if (source.get("type") or call.kind) != call.kind:
                raise invalid(f"{where}.type", "changes in the middle of a call")
            admitted = admit(TOOL_CALLS[call.kind], source, where, self._options)
            if admitted.kept.get("type") == "":
                del admitted.kept["type"]  # clients take the last type that they are told
            gather(state.extras, admitted.extras)
            if source.get("id") is not None:
                admitted.kept["id"] = source["id"]
                if source["id"] != "":
                    call.ids.append(as_identifier(source["id"], f"{where}.id"))
            if source.get(call.kind) is not None:
                admitted.kept[call.kind] = self._call(state, call, source[call.kind], f"{where}.{call.kind}")
            kept.append(in_order(source, admitted.kept))
        return kept

    def _call(self, state: _Choice, call: _Call, value: JSONValue, where: str) -> dict[str, JSONValue]:
        table = CALL[call.kind]
        admitted = admit(table, value, where, self._options)
        gather(state.extras, admitted.extras)
        for name, said in zip(table, (call.name, call.arguments), strict=True):
            if name in admitted.texts:
                said.append(admitted.texts[name])
        return admitted.kept
