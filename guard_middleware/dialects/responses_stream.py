"""A streamed Responses answer: every event checked, cut into frames, re-emitted with our numbers when cleared.

Events are never passed on; they are parsed, their allowed fields kept in order, and encoded again. The API says
everything twice or more (delta, done, part, item, response): what repeats must equal what it repeats, so that text
judged once is judged for all of them. Calls and citations leave only with the last verdict, and so does whatever
follows them. What ends the response is kept for ``close``.

Refuses (``UpstreamError``):
- events of an unknown type, or of a tool that the upstream ran; events whose name is not their type;
- text that is repeated differently; parts and items out of order, opened twice, or never closed;
- output in an event that opens the response; anything after the end;
- an error, a failed response, an end without ``response.completed`` or ``response.incomplete``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from guard_middleware import sse
from guard_middleware.dialects.answer_shared import DONE, read_data, upstream_error
from guard_middleware.dialects.base import Answer, Frame, Notice, Options, ParsedRequest, PublicError, Ruling, Said
from guard_middleware.dialects.fields import (
    Admitted,
    FieldError,
    admit,
    as_object,
    as_word,
    in_order,
    invalid,
    unsupported_content,
)
from guard_middleware.dialects.openai_error import openai_error
from guard_middleware.dialects.responses_fields import EVENTS
from guard_middleware.dialects.responses_items import TextPart, open_part, read_annotation, text_field, text_part
from guard_middleware.dialects.responses_making import (
    ITEM_PARTS,
    PART_TYPES,
    REASONING,
    TEXTS,
    Making,
    counter,
    read_place,
)
from guard_middleware.dialects.responses_response import (
    ITEMS,
    PARTS,
    Item,
    ended_by_us,
    explain,
    read_ending,
    read_item,
    read_output,
    read_top,
)
from guard_middleware.dialects.responses_shown import Shown
from guard_middleware.errors import UpstreamError, UpstreamErrorKind
from guard_middleware.strictjson import JSONValue, dumps
from guard_middleware.types import Message, Part, Text, ToolCall

_OPENING = ("response.created", "response.queued", "response.in_progress")
_ENDING = ("response.completed", "response.incomplete")
_BROKEN = ("response.failed", "error")
#: the SDK's helper reads ``logprobs`` of them
_WITH_LOGPROBS = ("response.output_text.delta", "response.output_text.done")


class ResponseStreamParser:
    """``base.StreamParser`` of this API."""

    keep_alive = sse.comment("guard pending")

    def __init__(self, request: ParsedRequest, options: Options) -> None:
        self._request, self._options = request, options
        self._items: dict[int, Making] = {}
        self._opening: dict[str, JSONValue] | None = None
        self._ending: tuple[str, dict[str, JSONValue]] | None = None
        self._finish_reason = ""
        self._extras: dict[str, list[str]] = {}
        self._begun: list[Part] = []
        self._shown = Shown()
        self._number = 0
        self._cut: bool | None = None
        self._read: dict[str, Callable[[str, dict[str, JSONValue], Admitted], Frame]] = {
            "response.output_item.added": self._item_added,
            "response.output_item.done": self._item_done,
            "response.output_text.annotation.added": self._annotation,
            **{f"{name}.added": self._part_added for name in PART_TYPES},
            **{f"{name}.done": self._part_done for name in PART_TYPES},
            **{f"{name}.delta": self._delta for name in TEXTS},
            **{f"{name}.done": self._said for name in TEXTS},
        }

    @property
    def answer_id(self) -> str | None:
        id = self._opening.get("id") if self._opening else None
        return id if isinstance(id, str) else None

    def feed(self, event: sse.Event) -> Sequence[Frame]:
        """Take one event; raises ``UpstreamError``."""
        if self._ending is not None:
            if event.data.strip(" ") == DONE:
                return ()
            raise UpstreamError(UpstreamErrorKind.MALFORMED, "data after the end of the response")
        try:
            return self._event(event.event, read_data(event))
        except FieldError as error:
            raise upstream_error(error) from None

    def finish(self) -> tuple[Answer, ...]:
        """The whole answer; raises ``UpstreamError`` where the stream is not complete."""
        if self._ending is None:
            raise UpstreamError(UpstreamErrorKind.RESET, "the stream ended without the end of its response")
        items = [item.done for _, item in sorted(self._items.items()) if item.done is not None]
        parts = [part for item in items for part in item.parts]
        extras = [Text("".join(pieces)) for pieces in self._extras.values()]
        parts += [part for part in (*self._begun, *extras) if part not in parts]
        return (Answer(0, Message("assistant", tuple(parts)), self._finish_reason),)

    def release(self, frame: Frame) -> bytes:
        return self._send(frame.value)

    def cut(self, choice: int, notice: Notice, soft: bool) -> bytes:
        """Closes what the client saw open, says the public text, and leaves the end to ``close``."""
        self._cut = soft
        opening = [] if self._shown.begun else [self._life("response.created")]
        closing = self._shown.closing(notice, soft)
        return b"".join([*map(self._send, opening), *map(self._send, closing)])

    def close(self, ruling: Ruling) -> bytes:
        kind, response = self._ending or ("response.completed", dict[str, JSONValue]())
        if self._cut is not None:
            kind = "response.completed" if self._cut else "response.incomplete"
            usage = {name: response[name] for name in ("usage",) if name in response}
            response = ended_by_us({**(self._opening or {}), **usage}, self._cut)
        return self._send({"type": kind, "response": {**response, "output": self._shown.output, **explain(ruling)}})

    def fail(self, error: PublicError) -> bytes:
        # ``error`` inside is what the SDKs raise; the fields beside it are what the API's own event has.
        reply = openai_error(error, prompt_param="input")
        said: dict[str, Any] = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
        return self._send({**said, **read_data(sse.Event("", reply.body.decode()))})

    def _send(self, event: dict[str, Any]) -> bytes:
        """Encodes an event with the next number, and remembers it as shown."""
        self._shown.saw(event)
        numbered = {**event, "sequence_number": self._number}
        self._number += 1
        return sse.encode(dumps(numbered), event["type"])

    def _life(self, kind: str) -> dict[str, JSONValue]:
        return {"type": kind, "response": {**(self._opening or {}), "output": []}}

    def _event(self, name: str, source: dict[str, JSONValue]) -> Sequence[Frame]:
        if name == "error" or source.get("type") in _BROKEN or source.get("error") is not None:
            raise UpstreamError(UpstreamErrorKind.RESET, "the upstream reported an error inside its stream")
        kind = as_word(source.get("type"), "type")
        if name not in ("", "message", kind):
            raise invalid("type", "is not the name of its event")
        table = EVENTS.get(kind)
        if table is None:
            raise unsupported_content("type", "this type of event cannot be moderated")
        admitted = admit(table, source, "", self._options)
        admitted.kept.pop("sequence_number", None)
        if kind in _OPENING:
            return [self._opened(kind, source, admitted)]
        if self._opening is None:
            raise invalid("type", "comes before response.created")
        if kind in _ENDING:
            self._ended(kind, source, admitted)
            return ()
        frame = self._read[kind](kind, source, admitted)
        value = in_order(source, frame.value)
        if kind in _WITH_LOGPROBS:
            value["logprobs"] = []
        extra = self._gather(admitted, "delta" in value)
        return [Frame(0, value, frame.said, frame.whole or extra)]

    def _gather(self, admitted: Admitted, delta: bool) -> bool:
        """Keeps what the operator calls moderated, deltas joined by name; True where there was any."""
        for name, text in admitted.extras.items():
            if delta:
                self._extras.setdefault(name, []).append(text)
            elif [text] not in self._extras.values():
                self._extras[f"{name} {len(self._extras)}"] = [text]
        return bool(admitted.extras)

    # -- the response --

    def _response(self, source: dict[str, JSONValue]) -> tuple[dict[str, JSONValue], dict[str, JSONValue], bool]:
        response = as_object(source.get("response"), "response")
        top = read_top(response, self._request, self._options)
        return response, top.kept, self._gather(top, delta=False)

    def _opened(self, kind: str, source: dict[str, JSONValue], admitted: Admitted) -> Frame:
        response, kept, whole = self._response(source)
        if (kind == "response.created") is (self._opening is not None):
            raise invalid("type", "is out of order")
        if response.get("output") or self._items:
            raise invalid("response.output", "comes before its items")
        if self._opening is not None and kept["id"] != self._opening["id"]:
            raise invalid("response.id", "changes")
        self._opening = kept
        whole = self._gather(admitted, delta=False) or whole
        return Frame(0, {**self._life(kind), **admitted.kept}, (), whole)

    def _ended(self, kind: str, source: dict[str, JSONValue], admitted: Admitted) -> None:
        response, kept, _ = self._response(source)
        self._gather(admitted, delta=False)
        if self._opening is None or kept["id"] != self._opening["id"]:
            raise invalid("response.id", "changes")
        self._finish_reason = read_ending(kept)
        if kept["status"] != kind.removeprefix("response."):
            raise invalid("response.status", "is not that of its event")
        output = read_output(response.get("output") or [], "response.output", self._options)
        self._check_output(output)
        self._ending = kind, kept

    def _check_output(self, output: list[Item]) -> None:
        """The last event repeats every item, or leaves them all out."""
        items = [item for _, item in sorted(self._items.items())]
        if any(item.done is None for item in items):
            raise invalid("response.output", "comes before the end of its items")
        if output and len(output) != len(items):
            raise invalid("response.output", "is not what was streamed")
        for number, (item, whole) in enumerate(zip(items, output, strict=False)):
            where = f"response.output[{number}]"
            assert item.done is not None
            if not item.matches(whole, where) or whole.parts != item.done.parts:
                raise invalid(where, "is not what was streamed")

    # -- items --

    def _item_added(self, kind: str, source: dict[str, JSONValue], admitted: Admitted) -> Frame:
        index = read_place(source, "output_index", ITEMS)
        if index in self._items:
            raise invalid("output_index", "was opened before")
        item = read_item(source.get("item"), "item", self._options)
        if item.kind in ("message", "reasoning") and item.texts:
            raise invalid("item", "has content before its parts")
        texts = {key: [text] for key, text in item.texts.items()}
        # What an item says at its start only is judged too: an operator's fields, the actions of a computer's call.
        self._begun += [part for part in item.parts if item.kind == "computer_call" or not isinstance(part, ToolCall)]
        if item.kind == "computer_call":
            texts = {}
        self._items[index] = Making(item.kind, item.kept.get("call_id"), texts)
        return Frame(0, {**admitted.kept, "output_index": index, "item": item.kept}, (), bool(item.parts))

    def _item_done(self, kind: str, source: dict[str, JSONValue], admitted: Admitted) -> Frame:
        index, item = self._item(source)
        whole = read_item(source.get("item"), "item", self._options)
        known = item.matches(whole, "item")
        item.close(whole)
        waits = whole.extra or not known or item.kind not in ("message", "reasoning")
        return Frame(0, {**admitted.kept, "output_index": index, "item": whole.kept}, (), waits)

    def _item(self, source: dict[str, JSONValue]) -> tuple[int, Making]:
        index = read_place(source, "output_index", ITEMS)
        item = self._items.get(index)
        if item is None or item.done is not None:
            raise invalid("output_index", "is not that of an open item")
        return index, item

    # -- parts --

    def _part_added(self, kind: str, source: dict[str, JSONValue], admitted: Admitted) -> Frame:
        index, item = self._item(source)
        part, whole = self._part(kind, source, item)
        number = read_place(source, counter(part.kind), PARTS)
        if number != item.parts(part.kind) or part.annotations:
            raise invalid(counter(part.kind), "is out of order")
        item.texts[part.kind, number] = [part.text]
        said = self._speak(index, part.kind, number, part.text)
        kept = {**admitted.kept, "part": part.kept, "output_index": index, counter(part.kind): number}
        return Frame(0, kept, said, whole)

    def _part_done(self, kind: str, source: dict[str, JSONValue], admitted: Admitted) -> Frame:
        index, item = self._item(source)
        part, whole = self._part(kind, source, item)
        number = read_place(source, counter(part.kind), PARTS)
        pieces = item.texts.get((part.kind, number))
        if pieces is None or "".join(pieces) != part.text:
            raise invalid("part", "is not what was streamed")
        item.closed.add((part.kind, number))
        item.ended.add(number)
        new = part.annotations if number not in item.notes else []
        if part.annotations != item.notes.get(number, new):
            raise invalid("part.annotations", "are not those that were streamed")
        if new:
            item.notes[number] = new
        kept = {**admitted.kept, "part": part.kept, "output_index": index, counter(part.kind): number}
        return Frame(0, kept, (), whole or bool(new))

    def _part(self, kind: str, source: dict[str, JSONValue], item: Making) -> tuple[TextPart, bool]:
        """The part of an event, and whether it must wait for the last verdict."""
        kinds = set(PART_TYPES[kind.rpartition(".")[0]]) & set(ITEM_PARTS.get(item.kind, ()))
        type, given, admitted = open_part(source.get("part"), kinds, "part", self._options)
        whole = self._gather(admitted, delta=False)
        return text_part(type, given, admitted, "part", self._options), whole

    def _annotation(self, kind: str, source: dict[str, JSONValue], admitted: Admitted) -> Frame:
        index, item = self._item(source)
        number = read_place(source, "content_index", PARTS)
        if ("output_text", number) not in item.texts or number in item.ended:
            raise invalid("content_index", "is not that of an open part")
        kept, _ = read_annotation(source.get("annotation"), "annotation", self._options)
        item.notes.setdefault(number, []).append(kept)
        return Frame(0, {**admitted.kept, "output_index": index, "content_index": number, "annotation": kept}, (), True)

    # -- texts --

    def _delta(self, kind: str, source: dict[str, JSONValue], admitted: Admitted) -> Frame:
        index, item, key, place = self._text(kind, source)
        if "delta" not in admitted.texts:
            raise invalid("delta", "must be a string")
        if key in item.closed:
            raise invalid("delta", "comes after the end of its text")
        text = admitted.texts["delta"]
        item.texts.setdefault(key, []).append(text)
        call = item.kind not in ("message", "reasoning")
        said = () if call else self._speak(index, *key, text)
        return Frame(0, {**admitted.kept, **place}, said, call)

    def _said(self, kind: str, source: dict[str, JSONValue], admitted: Admitted) -> Frame:
        index, item, key, place = self._text(kind, source)
        name = text_field(key[0]) if key[0] not in ("arguments", "input") else key[0]
        text = admitted.texts.get(name)
        call = item.kind not in ("message", "reasoning")
        pieces = item.texts.setdefault(key, [])
        said: tuple[Said, ...] = ()
        if text and not any(pieces):  # some servers send the whole text only
            pieces.append(text)
            said = () if call else self._speak(index, *key, text)
        if "".join(pieces) != text:
            raise invalid(name, "is not what was streamed")
        if "name" in admitted.texts and [admitted.texts["name"]] != item.texts.get(("name", 0)):
            raise invalid("name", "is not that of the item")
        item.closed.add(key)
        return Frame(0, {**admitted.kept, **place}, said, call)

    def _text(
        self, kind: str, source: dict[str, JSONValue]
    ) -> tuple[int, Making, tuple[str, int], dict[str, JSONValue]]:
        """(index, item, which text, where it is on the wire) of an event that says text."""
        index, item = self._item(source)
        type = TEXTS[kind.rpartition(".")[0]]
        if type not in ITEM_PARTS.get(item.kind, ()):
            raise invalid("output_index", "is that of an item of another type")
        place: dict[str, JSONValue] = {"output_index": index}
        number = 0
        if type not in ("arguments", "input"):
            place[counter(type)] = number = read_place(source, counter(type), PARTS)
            opens = type in REASONING and number == item.parts(type)  # some servers open these with their text
            if (type, number) not in item.texts and not opens:
                raise invalid(counter(type), "is not that of an open part")
        return index, item, (type, number), place

    @staticmethod
    def _speak(index: int, kind: str, number: int, text: str) -> tuple[Said, ...]:
        return (Said(f"output.{index}.{kind}.{number}", text, kind in REASONING),) if text else ()
