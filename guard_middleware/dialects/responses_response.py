"""A Responses answer that came in one piece: read into one Message, released as what was read.

What the upstream repeats of the request (instructions, tools, metadata) is replaced by what the request said. Token
probabilities and vendors' second copies are dropped.

Refuses (``UpstreamError``): answers that failed or are not finished; items of tools that the upstream ran; parts,
citations and unknown fields that carry content and no table covers; items without what makes them one.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field, replace
from typing import Any

from guard_middleware.dialects.answer_shared import read_envelope, unread_id, upstream_error
from guard_middleware.dialects.base import Answer, Notice, Options, ParsedRequest, Ruling
from guard_middleware.dialects.chat_moderation import explain as explain_several
from guard_middleware.dialects.fields import (
    Admitted,
    FieldError,
    admit,
    as_identifier,
    as_list,
    as_object,
    as_word,
    in_order,
    unsupported_content,
)
from guard_middleware.dialects.responses_fields import OUTPUT_ITEMS, RESPONSE, SAID
from guard_middleware.dialects.responses_items import TextPart, open_part, read_call, text_part
from guard_middleware.errors import UpstreamError, UpstreamErrorKind
from guard_middleware.strictjson import JSONValue, dumps
from guard_middleware.types import Message, Part, Text

ITEMS = 256
PARTS = 1024
_NOT_ID = re.compile(r"[^A-Za-z0-9_-]")
#: the fields of an answer that repeat the request, and what stands there where the request is silent
ECHOED: dict[str, JSONValue] = {
    "instructions": None,
    "metadata": {},
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
}
#: where items that speak hold their parts, and of which types
_SPOKEN: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "message": (("content", ("output_text", "refusal")),),
    "reasoning": (("summary", ("summary_text",)), ("content", ("reasoning_text",))),
}
#: statuses of an answer that has ended well
ENDED = ("completed", "incomplete")


@dataclass(frozen=True, slots=True)
class Item:
    """One output item: what is released of it, and what the guard reads.

    ``texts`` are what it says as it is on the wire, by (type of part or name of field, number); ``notes`` the
    citations of its text parts, by number; ``extra`` says that there is more in it that the operator has read.
    """

    kind: str
    kept: dict[str, JSONValue]
    parts: tuple[Part, ...]
    texts: dict[tuple[str, int], str] = field(default_factory=dict)
    notes: dict[int, list[JSONValue]] = field(default_factory=dict)
    extra: bool = False


@dataclass(frozen=True, slots=True)
class ParsedResponse:
    """``body`` is the answer without its output."""

    body: dict[str, JSONValue]
    output: tuple[JSONValue, ...]
    answers: tuple[Answer, ...]

    @property
    def answer_id(self) -> str | None:
        id = self.body.get("id")
        return id if isinstance(id, str) else None

    def render(self, ruling: Ruling) -> bytes:
        (answer,) = self.answers
        if not ruling.blocked(0, bool(answer.message.parts)):
            return dumps({**self.body, "output": list(self.output), **explain(ruling)})
        notice = ruling.choices[0]
        status = "completed" if ruling.soft else "incomplete"
        item = message(own_id("msg", notice), status, [refusal(notice.message, ruling.soft)])
        return dumps({**ended_by_us(self.body, ruling.soft), "output": [item], **explain(ruling)})


def ended_by_us(body: dict[str, JSONValue], soft: bool) -> dict[str, JSONValue]:
    """The top level of an answer that was blocked."""
    details: JSONValue = None if soft else {"reason": "content_filter"}
    completed: dict[str, JSONValue] = {} if soft or "completed_at" not in body else {"completed_at": None}
    status = "completed" if soft else "incomplete"
    return {**body, "status": status, "error": None, "incomplete_details": details, **completed}


def refusal(public_text: str, soft: bool) -> dict[str, JSONValue]:
    """The content part that stands for what was blocked."""
    if soft:
        return {"type": "output_text", "text": public_text, "annotations": [], "logprobs": []}
    return {"type": "refusal", "refusal": public_text}


def own_id(prefix: str, notice: Notice) -> str:
    """An id of ours; clients send it back, and OpenAI takes letters, digits, dashes and underscores only."""
    return f"{prefix}_{_NOT_ID.sub('-', notice.id)}"[:64]


def message(id: str, status: str, content: list[JSONValue]) -> dict[str, JSONValue]:
    """An output item of ours."""
    return {"id": id, "type": "message", "role": "assistant", "status": status, "content": content}


def explain(ruling: Ruling) -> dict[str, JSONValue]:
    """As for the chat dialect, but each side of ``moderation`` is one result, for there is one answer."""
    said: dict[str, Any] = explain_several(ruling)
    if not said:
        return {}
    sides = {name: (side["results"][0] if "results" in side else side) for name, side in said["moderation"].items()}
    return {**said, "moderation": sides}


def parse_response(body: JSONValue, request: ParsedRequest, options: Options) -> ParsedResponse:
    """Read the body of a 200; raises ``UpstreamError`` and nothing else."""
    try:
        source = as_object(body, "")
        top = read_top(source, request, options)
        finish_reason = read_ending(top.kept)
        items = read_output(source.get("output"), "output", options)
    except FieldError as error:
        raise upstream_error(error) from None
    parts = [part for item in items for part in item.parts] + [Text(text) for text in top.extras.values()]
    answer = Answer(0, Message("assistant", tuple(parts)), finish_reason)
    return ParsedResponse(top.kept, tuple(item.kept for item in items), (answer,))


def read_top(source: dict[str, JSONValue], request: ParsedRequest, options: Options) -> Admitted:
    """The top level of an answer without its output; raises for one that failed."""
    top = read_envelope(RESPONSE, source, options)
    as_identifier(source.get("id"), "id")
    echoed = {name: request.body.get(name) for name in ECHOED if name in source}
    top.kept |= {name: copy.deepcopy(ECHOED[name]) if item is None else item for name, item in echoed.items()}
    if "error" in source:
        top.kept["error"] = None
    top.kept = in_order(source, top.kept)
    return top


def read_ending(kept: dict[str, JSONValue]) -> str:
    """Why the answer ended; raises for one that did not."""
    status = as_word(kept.get("status"), "status")
    if status in ("failed", "cancelled"):
        raise UpstreamError(UpstreamErrorKind.RESET, "the upstream reported an error inside its answer")
    if status not in ENDED:
        raise unsupported_content("status", "an answer that has not ended cannot be moderated")
    details = kept.get("incomplete_details")
    reason = details.get("reason") if status == "incomplete" and isinstance(details, dict) else None
    return as_word(reason or status, "incomplete_details.reason")


def read_output(value: JSONValue, path: str, options: Options) -> list[Item]:
    return [read_item(item, f"{path}[{n}]", options) for n, item in enumerate(as_list(value, path, ITEMS))]


def read_item(value: JSONValue, where: str, options: Options) -> Item:
    source = as_object(value, where)
    kind = as_word(source.get("type"), f"{where}.type")
    table = OUTPUT_ITEMS.get(kind)
    if table is None:
        raise unsupported_content(f"{where}.type", "this type of item cannot be moderated")
    admitted = admit(table, source, where, options)
    extras = [Text(text) for text in admitted.extras.values()]
    if kind in SAID:
        return _call(kind, source, admitted, where, extras)
    if kind == "message" and source.get("role") != "assistant":
        raise unsupported_content(f"{where}.role", "must be assistant")
    kept, parts, item = admitted.kept, list[Part](), Item(kind, {}, ())
    extra = bool(extras)
    for name, kinds in _SPOKEN[kind]:
        if kind == "reasoning" and source.get(name) is None:
            kept |= {name: None} if name in source else {}
            continue
        said = _parts(source.get(name), kinds, f"{where}.{name}", options)
        for number, part in enumerate(said):
            item.texts[part.kind, number] = part.text
            if part.annotations:
                item.notes[number] = part.annotations
            parts += part.parts
            extra = extra or part.extra
        kept[name] = [part.kept for part in said]
    return replace(item, kept=in_order(source, kept), parts=(*parts, *extras), extra=extra)


def _parts(value: JSONValue, kinds: tuple[str, ...], path: str, options: Options) -> list[TextPart]:
    places = [(part, f"{path}[{number}]") for number, part in enumerate(as_list(value, path, PARTS))]
    return [text_part(*open_part(part, kinds, where, options), where, options) for part, where in places]


def _call(kind: str, source: dict[str, JSONValue], admitted: Admitted, where: str, extras: list[Text]) -> Item:
    id = as_identifier(source.get("call_id"), f"{where}.call_id")
    kept = in_order(source, admitted.kept | {"call_id": id})
    call = read_call(kind, id, admitted, where)
    texts = {(name, 0): text for name, text in admitted.texts.items()}
    return Item(kind, kept, (call, *unread_id(id, call.name), *extras), texts)
