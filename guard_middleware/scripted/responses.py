"""The Responses API as the scripted upstream speaks it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from guard_middleware.scripted.turn import OPENAI_UNKNOWN_MODEL, PROMPT_TOKENS, Turn, event

UNKNOWN_MODEL = OPENAI_UNKNOWN_MODEL


def tool(body: Any) -> tuple[str | None, bool]:
    """The name of the first tool on offer, and whether a tool's result has come last."""
    names = [tool["name"] for tool in body.get("tools") or [] if tool.get("type") == "function"]
    items = body["input"] if isinstance(body.get("input"), list) else []
    return next(iter(names), None), bool(items) and items[-1].get("type") == "function_call_output"


def whole(turn: Turn, body: Any) -> dict[str, Any]:
    return _response(turn, body, "completed", [_item(turn, "completed", turn.said)])


def events(turn: Turn, body: Any) -> Iterator[bytes]:
    for number, (kind, fields) in enumerate(_events(turn, body)):
        yield event({"type": kind, "sequence_number": number, **fields}, kind)


def _events(turn: Turn, body: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    begun = _response(turn, body, "in_progress", [])
    yield "response.created", {"response": begun}
    yield "response.in_progress", {"response": begun}
    yield "response.output_item.added", {"output_index": 0, "item": _item(turn, "in_progress", None)}
    yield from _called(turn) if turn.tool is not None else _spoken(turn)
    item = _item(turn, "completed", turn.said)
    yield "response.output_item.done", {"output_index": 0, "item": item}
    yield "response.completed", {"response": _response(turn, body, "completed", [item])}


def _spoken(turn: Turn) -> Iterator[tuple[str, dict[str, Any]]]:
    where = {"item_id": _item(turn, "", None)["id"], "output_index": 0, "content_index": 0}
    yield "response.content_part.added", {**where, "part": _text("")}
    for piece in turn.pieces:
        yield "response.output_text.delta", {**where, "delta": piece, "logprobs": []}
    yield "response.output_text.done", {**where, "text": turn.text, "logprobs": []}
    yield "response.content_part.done", {**where, "part": _text(turn.text)}


def _called(turn: Turn) -> Iterator[tuple[str, dict[str, Any]]]:
    where = {"item_id": _item(turn, "", None)["id"], "output_index": 0}
    for piece in turn.pieces:
        yield "response.function_call_arguments.delta", {**where, "delta": piece}
    yield "response.function_call_arguments.done", {**where, "name": turn.tool, "arguments": turn.arguments}


def _item(turn: Turn, status: str, said: str | None) -> dict[str, Any]:
    """The only item; before anything was ``said`` it is empty."""
    if turn.tool is None:
        content = [] if said is None else [_text(said)]
        item = {"type": "message", "id": f"msg_{turn.number}", "role": "assistant", "content": content}
    else:
        item = {"type": "function_call", "id": f"fc_{turn.number}", "call_id": f"call_{turn.number}", "name": turn.tool}
        item |= {"arguments": said or ""}
    return {**item, "status": status}


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _response(turn: Turn, body: Any, status: str, output: list[Any]) -> dict[str, Any]:
    usage = {
        "input_tokens": PROMPT_TOKENS,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": turn.tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": PROMPT_TOKENS + turn.tokens,
    }
    return {
        "id": f"resp_{turn.number}",
        "object": "response",
        "created_at": turn.created,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "model": turn.model,
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": body.get("previous_response_id"),
        "reasoning": {"effort": None, "summary": None},
        "store": True,
        "temperature": 1.0,
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": usage if status == "completed" else None,
        "user": None,
        "metadata": body.get("metadata") or {},
    }
