"""A Responses answer as the events that OpenAI streams for it, and events back as bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from guard_middleware.sse import Event

_TEXT = {"output_text": "text", "refusal": "refusal", "reasoning_text": "text", "summary_text": "text"}
_NAMES = {
    "output_text": "response.output_text",
    "refusal": "response.refusal",
    "reasoning_text": "response.reasoning_text",
    "summary_text": "response.reasoning_summary_text",
    "arguments": "response.function_call_arguments",
    "input": "response.custom_tool_call_input",
}


def streamed(answer: dict[str, Any], pieces: int = 7) -> list[dict[str, Any]]:
    """``pieces`` is the number of characters of a delta."""
    begun = {**answer, "status": "in_progress", "output": [], "usage": None}
    told: list[dict[str, Any]] = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
    ]
    for index, item in enumerate(answer["output"]):
        told += [{**event, "output_index": index} for event in _item(item, pieces)]
    told.append({"type": f"response.{answer['status']}", "response": answer})
    return [{**event, "sequence_number": number} for number, event in enumerate(told)]


def events(told: Iterable[dict[str, Any] | str]) -> list[Event]:
    return [
        Event("", event) if isinstance(event, str) else Event(str(event.get("type", "")), json.dumps(event))
        for event in told
    ]


def encoded(told: Iterable[dict[str, Any]]) -> bytes:
    lines = (f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n" for event in told)
    return "".join(lines).encode()


def _item(item: dict[str, Any], pieces: int) -> Iterator[dict[str, Any]]:
    empty = {name: [] for name in ("content", "summary") if name in item}
    spoken = {name: "" for name in ("arguments", "input") if name in item}
    yield {"type": "response.output_item.added", "item": {**item, "status": "in_progress", **empty, **spoken}}
    place = {"item_id": item.get("id", "")}
    for name, kind in (("summary", "reasoning_summary_part"), ("content", "content_part")):
        for number, part in enumerate(item.get(name) or ()):
            at = {**place, f"{name}_index": number}
            yield {"type": f"response.{kind}.added", **at, "part": _opened(part)}
            yield from _text(part["type"], part[_TEXT[part["type"]]], at, pieces)
            for n, note in enumerate(part.get("annotations", ())):
                name_of = "response.output_text.annotation.added"
                yield {"type": name_of, **at, "annotation_index": n, "annotation": note}
            yield {"type": f"response.{kind}.done", **at, "part": part}
    for name in spoken:
        yield from _text(name, item[name], place, pieces)
    yield {"type": "response.output_item.done", "item": item}


def _opened(part: dict[str, Any]) -> dict[str, Any]:
    return {**part, _TEXT[part["type"]]: "", **({"annotations": []} if "annotations" in part else {})}


def _text(kind: str, text: str, at: dict[str, Any], pieces: int) -> Iterator[dict[str, Any]]:
    more: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
    for start in range(0, len(text), pieces):
        yield {
            "type": f"{_NAMES[kind]}.delta",
            **at,
            **more,
            "delta": text[start : start + pieces],
            "obfuscation": "x y",
        }
    yield {"type": f"{_NAMES[kind]}.done", **at, **more, _TEXT.get(kind, kind): text}
