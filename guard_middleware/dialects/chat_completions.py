"""The Chat Completions API (``POST /v1/chat/completions``): its requests, answers, streams, errors and blocks."""

from __future__ import annotations

from guard_middleware import sse
from guard_middleware.dialects.answer_shared import DONE, JSON_TYPE, SSE_TYPE
from guard_middleware.dialects.base import (
    Notice,
    Options,
    ParsedRequest,
    PublicError,
    Reply,
)
from guard_middleware.dialects.chat_request import parse_request
from guard_middleware.dialects.chat_response import ParsedCompletion, parse_response
from guard_middleware.dialects.chat_stream import ChatStreamParser
from guard_middleware.dialects.openai_error import openai_error
from guard_middleware.limits import Limits
from guard_middleware.strictjson import JSONValue, dumps


class ChatCompletions:
    """The dialect ``chat_completions``; see ``base.Dialect``."""

    name = "chat_completions"

    def parse_request(self, body: JSONValue, limits: Limits, options: Options) -> ParsedRequest:
        return parse_request(body, limits, options)

    def parse_response(self, body: JSONValue, request: ParsedRequest, options: Options) -> ParsedCompletion:
        return parse_response(body, request, options)

    def stream_parser(self, request: ParsedRequest, options: Options) -> ChatStreamParser:
        return ChatStreamParser(request, options)

    def error(self, error: PublicError) -> Reply:
        return openai_error(error, prompt_param="messages")

    def soft_block(self, request: ParsedRequest, notice: Notice, created: int) -> Reply:
        """A blocked prompt as an answer of the assistant, in one piece or as a stream of one chunk."""
        envelope: dict[str, JSONValue] = {
            "id": f"chatcmpl-{notice.id}",
            "object": "chat.completion.chunk" if request.stream else "chat.completion",
            "created": created,
            "model": request.model or "",
        }
        usage: JSONValue = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        said: JSONValue = {"role": "assistant", "content": notice.message, "refusal": None}
        choice: dict[str, JSONValue] = {"index": 0, "logprobs": None, "finish_reason": "stop"}
        if not request.stream:
            body = dumps({**envelope, "choices": [{**choice, "message": said}], "usage": usage})
            return Reply(200, ((b"content-type", JSON_TYPE),), body)
        frames = [sse.encode(dumps({**envelope, "choices": [{**choice, "delta": said}]}))]
        if request.include_usage:
            frames.append(sse.encode(dumps({**envelope, "choices": [], "usage": usage})))
        frames.append(sse.encode(DONE))
        return Reply(200, ((b"content-type", SSE_TYPE),), b"".join(frames))
