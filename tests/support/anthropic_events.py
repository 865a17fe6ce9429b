"""Events of the Messages API, as its service would send them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from guard_middleware.sse import Event

Events = list[dict[str, Any]]
_DELTAS = {"text": "text_delta", "thinking": "thinking_delta"}


def start(**fields: Any) -> dict[str, Any]:
    message = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": 1},
    }
    return {"type": "message_start", "message": {**message, **fields}}


def opened(index: int, kind: str = "text", **fields: Any) -> dict[str, Any]:
    block = {
        "text": {"text": ""},
        "thinking": {"thinking": "", "signature": ""},
        "tool_use": {"id": "toolu_1", "name": "f", "input": {}},
        "server_tool_use": {"id": "srvtoolu_1", "name": "bash_code_execution", "input": {}},
    }.get(kind, {})
    return {"type": "content_block_start", "index": index, "content_block": {"type": kind, **block, **fields}}


def delta(index: int, kind: str = "text_delta", **fields: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **fields}}


def closed(index: int) -> dict[str, Any]:
    return {"type": "content_block_stop", "index": index}


def ending(stop_reason: Any = "end_turn", output_tokens: int = 7, **fields: Any) -> Events:
    stop = {"stop_reason": stop_reason, "stop_sequence": None, **fields}
    return [
        {"type": "message_delta", "delta": stop, "usage": {"output_tokens": output_tokens}},
        {"type": "message_stop"},
    ]


def said(index: int, pieces: Sequence[str], kind: str = "text") -> Events:
    """A block of text or of thinking in ``pieces``."""
    words = [delta(index, _DELTAS[kind], **{kind: piece}) for piece in pieces]
    signed = [delta(index, "signature_delta", signature="c2lnbmVk")] if kind == "thinking" else []
    return [opened(index, kind), *words, *signed, closed(index)]


def called(index: int, pieces: Sequence[str], **fields: Any) -> Events:
    """A call whose arguments come in ``pieces``."""
    words = [delta(index, "input_json_delta", partial_json=piece) for piece in pieces]
    return [opened(index, "tool_use", **fields), *words, closed(index)]


def cut_at(text: str, *places: int) -> list[str]:
    marks = [0, *sorted(places), len(text)]
    return [text[a:b] for a, b in pairwise(marks)]


def as_events(bodies: Iterable[dict[str, Any]]) -> list[Event]:
    return [Event(str(body["type"]), json.dumps(body)) for body in bodies]


def wire(bodies: Iterable[dict[str, Any]]) -> str:
    return "".join(f"event: {body['type']}\ndata: {json.dumps(body)}\n\n" for body in bodies)
