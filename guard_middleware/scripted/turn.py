"""What the scripted upstream says in one turn, whatever the shape: a text, or a call of a tool."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import orjson

#: tokens that every request is said to have cost
PROMPT_TOKENS = 10


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls the first tool on offer with ``arguments``; says ``text`` after its result, or where there is no tool."""

    arguments: Mapping[str, Any]
    text: str


Answer = str | Calls


@dataclass(frozen=True, slots=True)
class Turn:
    """The turn of request ``number``; ``tool`` is the name of the tool that is called, or None."""

    number: int
    created: int
    model: str
    text: str
    tool: str | None = None
    arguments: str = ""

    @classmethod
    def of(cls, answer: Answer, number: int, created: int, model: str, tool: str | None, called: bool) -> Self:
        """``tool`` is the first on offer; ``called`` says that its result has come."""
        if isinstance(answer, str):
            return cls(number, created, model, answer)
        if tool is None or called:
            return cls(number, created, model, answer.text)
        return cls(number, created, model, "", tool, orjson.dumps(dict(answer.arguments)).decode())

    @property
    def said(self) -> str:
        return self.text if self.tool is None else self.arguments

    @property
    def pieces(self) -> list[str]:
        """What is said, word by word."""
        return re.findall(r"\s*\S+\s*", self.said)

    @property
    def tokens(self) -> int:
        return len(self.pieces)


def event(value: Any, name: str = "") -> bytes:
    """One server-sent event."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + orjson.dumps(value) + b"\n\n"


def openai_usage(turn: Turn) -> dict[str, int]:
    """The usage of both Completions APIs."""
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": turn.tokens,
        "total_tokens": PROMPT_TOKENS + turn.tokens,
    }


def wants_usage(body: Any) -> bool:
    """Whether a stream of the Completions APIs is to end with its usage."""
    return bool((body.get("stream_options") or {}).get("include_usage"))


OPENAI_UNKNOWN_MODEL: Mapping[str, Any] = {
    "error": {
        "message": "unknown scripted model",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
}
