"""The legacy Completions API (``POST /v1/completions``): its requests, answers, streams, errors and blocks."""

from __future__ import annotations

from guard_middleware import sse
from guard_middleware.dialects.answer_shared import DONE, JSON_TYPE, SSE_TYPE
from guard_middleware.dialects.base import Notice, Options, ParsedRequest, PublicError, Reply
from guard_middleware.dialects.completions_request import parse_request
from guard_middleware.dialects.completions_response import ParsedText, blocked, parse_response
from guard_middleware.dialects.completions_stream import TextStreamParser
from guard_middleware.dialects.openai_error import openai_error
from guard_middleware.limits import Limits
from guard_middleware.strictjson import JSONValue, dumps


class Completions:
    """The dialect ``completions``; see ``base.Dialect``."""

    name = "completions"

    def parse_request(self, body: JSONValue, limits: Limits, options: Options) -> ParsedRequest:
        return parse_request(body, limits, options)

    def parse_response(self, body: JSONValue, request: ParsedRequest, options: Options) -> ParsedText:
        return parse_response(body, request, options)

    def stream_parser(self, request: ParsedRequest, options: Options) -> TextStreamParser:
        return TextStreamParser(request, options)

    def error(self, error: PublicError) -> Reply:
        return openai_error(error, prompt_param="prompt")

    def soft_block(self, request: ParsedRequest, notice: Notice, created: int) -> Reply:
        """A blocked prompt as a completion, in one piece or as a stream of one chunk."""
        envelope: dict[str, JSONValue] = {
            "id": f"cmpl-{notice.id}",
            "object": "text_completion",
            "created": created,
            "model": request.model or "",
        }
        usage: JSONValue = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        choices: list[JSONValue] = [blocked(index, notice.message, soft=True) for index in range(request.choices)]
        if not request.stream:
            return Reply(200, ((b"content-type", JSON_TYPE),), dumps({**envelope, "choices": choices, "usage": usage}))
        chunks = [{**envelope, "choices": [choice]} for choice in choices]
        if request.include_usage:
            chunks.append({**envelope, "choices": [], "usage": usage})
        data = b"".join(sse.encode(dumps(chunk)) for chunk in chunks) + sse.encode(DONE)
        return Reply(200, ((b"content-type", SSE_TYPE),), data)
