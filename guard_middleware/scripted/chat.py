"""The Chat Completions API as the scripted upstream speaks it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from guard_middleware.scripted.turn import OPENAI_UNKNOWN_MODEL, Turn, event, openai_usage, wants_usage

UNKNOWN_MODEL = OPENAI_UNKNOWN_MODEL


def tool(body: Any) -> tuple[str | None, bool]:
    """The name of the first tool on offer, and whether a tool's result has come last."""
    names = [tool["function"]["name"] for tool in body.get("tools") or [] if tool.get("type") == "function"]
    return next(iter(names), None), bool(body.get("messages")) and body["messages"][-1].get("role") == "tool"


def whole(turn: Turn, body: Any) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": turn.text}
    if turn.tool is not None:
        message |= {"content": None, "tool_calls": [_call(turn, turn.arguments)]}
    choices = [
        {"index": n, "message": message, "finish_reason": _finish(turn), "logprobs": None}
        for n in range(body.get("n") or 1)
    ]
    return {**_head(turn, "chat.completion"), "choices": choices, "usage": openai_usage(turn)}


def events(turn: Turn, body: Any) -> Iterator[bytes]:
    head = _head(turn, "chat.completion.chunk")
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    if turn.tool is None:
        deltas += [{"content": piece} for piece in turn.pieces]
    else:
        deltas = [{"role": "assistant", "content": None, "tool_calls": [{"index": 0, **_call(turn, "")}]}]
        deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": piece}}]} for piece in turn.pieces]
    for delta in deltas:
        yield event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    yield event({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": _finish(turn)}]})
    if wants_usage(body):
        yield event({**head, "choices": [], "usage": openai_usage(turn)})
    yield b"data: [DONE]\n\n"


def _head(turn: Turn, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{turn.number}", "object": kind, "created": turn.created, "model": turn.model}


def _call(turn: Turn, arguments: str) -> dict[str, Any]:
    function = {"name": turn.tool, "arguments": arguments}
    return {"id": f"call_{turn.number}", "type": "function", "function": function}


def _finish(turn: Turn) -> str:
    return "stop" if turn.tool is None else "tool_calls"
