"""The legacy Completions API as the scripted upstream speaks it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from guard_middleware.scripted.turn import OPENAI_UNKNOWN_MODEL, Turn, event, openai_usage, wants_usage

UNKNOWN_MODEL = OPENAI_UNKNOWN_MODEL


def tool(body: Any) -> tuple[str | None, bool]:
    """This API has no tools."""
    return None, False


def whole(turn: Turn, body: Any) -> dict[str, Any]:
    prompts = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1
    choices = [_choice(turn.text, "stop", n) for n in range(prompts * (body.get("n") or 1))]
    return {**_head(turn), "choices": choices, "usage": openai_usage(turn)}


def events(turn: Turn, body: Any) -> Iterator[bytes]:
    for piece in turn.pieces:
        yield event({**_head(turn), "choices": [_choice(piece, None)]})
    yield event({**_head(turn), "choices": [_choice("", "stop")]})
    if wants_usage(body):
        yield event({**_head(turn), "choices": [], "usage": openai_usage(turn)})
    yield b"data: [DONE]\n\n"


def _head(turn: Turn) -> dict[str, Any]:
    return {"id": f"cmpl-{turn.number}", "object": "text_completion", "created": turn.created, "model": turn.model}


def _choice(text: str, finish_reason: str | None, index: int = 0) -> dict[str, Any]:
    return {"text": text, "index": index, "logprobs": None, "finish_reason": finish_reason}
