"""The Messages API as the scripted upstream speaks it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from guard_middleware.scripted.turn import PROMPT_TOKENS, Turn, event

UNKNOWN_MODEL: Mapping[str, Any] = {
    "type": "error",
    "error": {"type": "not_found_error", "message": "model: unknown scripted model"},
}


def tool(body: Any) -> tuple[str | None, bool]:
    """The name of the first tool on offer, and whether a tool's result has come last."""
    content = body["messages"][-1].get("content") if body.get("messages") else None
    called = isinstance(content, list) and any(block.get("type") == "tool_result" for block in content)
    return next((tool.get("name") for tool in body.get("tools") or []), None), called


def whole(turn: Turn, body: Any) -> dict[str, Any]:
    block = _block(turn)
    said = {"text": turn.text} if turn.tool is None else {"input": orjson.loads(turn.arguments)}
    return {**_message(turn), "content": [{**block, **said}], **_ending(turn), "usage": _usage(turn.tokens)}


def events(turn: Turn, body: Any) -> Iterator[bytes]:
    yield _event("message_start", message=_message(turn))
    yield _event("content_block_start", index=0, content_block=_block(turn))
    yield _event("ping")
    for piece in turn.pieces:
        text = {"type": "text_delta", "text": piece}
        delta = text if turn.tool is None else {"type": "input_json_delta", "partial_json": piece}
        yield _event("content_block_delta", index=0, delta=delta)
    yield _event("content_block_stop", index=0)
    yield _event("message_delta", delta=_ending(turn), usage={"output_tokens": turn.tokens})
    yield _event("message_stop")


def _message(turn: Turn) -> dict[str, Any]:
    return {
        "id": f"msg_{turn.number}",
        "type": "message",
        "role": "assistant",
        "model": turn.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(1),
    }


def _block(turn: Turn) -> dict[str, Any]:
    """The only block as it opens in a stream."""
    if turn.tool is None:
        return {"type": "text", "text": ""}
    return {"type": "tool_use", "id": f"toolu_{turn.number}", "name": turn.tool, "input": {}}


def _ending(turn: Turn) -> dict[str, Any]:
    return {"stop_reason": "end_turn" if turn.tool is None else "tool_use", "stop_sequence": None}


def _usage(tokens: int) -> dict[str, int]:
    return {"input_tokens": PROMPT_TOKENS, "output_tokens": tokens}


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)
