"""The Responses API (``POST /v1/responses``): its requests, answers, streams, errors and blocks.

Stored answers cannot be read, listed, cancelled or deleted through us: those paths are not routed, for what they
would give out has no verdict here.
"""

from __future__ import annotations

from typing import Any

from guard_middleware import sse
from guard_middleware.dialects.answer_shared import JSON_TYPE, SSE_TYPE
from guard_middleware.dialects.base import Notice, Options, ParsedRequest, PublicError, Reply
from guard_middleware.dialects.openai_error import openai_error
from guard_middleware.dialects.responses_request import parse_request
from guard_middleware.dialects.responses_response import (
    ECHOED,
    ParsedResponse,
    message,
    own_id,
    parse_response,
    refusal,
)
from guard_middleware.dialects.responses_shown import Shown
from guard_middleware.dialects.responses_stream import ResponseStreamParser
from guard_middleware.limits import Limits
from guard_middleware.strictjson import JSONValue, dumps

_USAGE: dict[str, JSONValue] = {
    "input_tokens": 0,
    "input_tokens_details": {"cached_tokens": 0},
    "output_tokens": 0,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 0,
}


class Responses:
    """The dialect ``responses``; see ``base.Dialect``."""

    name = "responses"

    def parse_request(self, body: JSONValue, limits: Limits, options: Options) -> ParsedRequest:
        return parse_request(body, limits, options)

    def parse_response(self, body: JSONValue, request: ParsedRequest, options: Options) -> ParsedResponse:
        return parse_response(body, request, options)

    def stream_parser(self, request: ParsedRequest, options: Options) -> ResponseStreamParser:
        return ResponseStreamParser(request, options)

    def error(self, error: PublicError) -> Reply:
        return openai_error(error, prompt_param="input")

    def soft_block(self, request: ParsedRequest, notice: Notice, created: int) -> Reply:
        """A blocked prompt as an answer of the assistant, in one piece or as a short stream."""
        body: dict[str, Any] = {
            "id": own_id("resp", notice),
            "object": "response",
            "created_at": created,
            "status": "completed",
            "error": None,
            "incomplete_details": None,
            "model": request.model or "",
            "parallel_tool_calls": True,
            "temperature": None,
            "top_p": None,
            **{name: request.body.get(name) or value for name, value in ECHOED.items()},
        }
        item = message(own_id("msg", notice), "completed", [refusal(notice.message, soft=True)])
        whole = {**body, "output": [item], "usage": _USAGE}
        if not request.stream:
            return Reply(200, ((b"content-type", JSON_TYPE),), dumps(whole))
        opening = {**body, "status": "in_progress", "output": [], "usage": None}
        events: list[dict[str, Any]] = [
            {"type": "response.created", "response": opening},
            {"type": "response.in_progress", "response": opening},
        ]
        shown = Shown()
        for event in shown.closing(notice, soft=True):
            shown.saw(event)
            events.append(event)
        events.append({"type": "response.completed", "response": whole})
        data = [sse.encode(dumps({**e, "sequence_number": n}), e["type"]) for n, e in enumerate(events)]
        return Reply(200, ((b"content-type", SSE_TYPE),), b"".join(data))
