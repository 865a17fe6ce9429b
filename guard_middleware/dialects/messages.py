"""The Messages API (``POST /v1/messages``), and its count of tokens (``POST /v1/messages/count_tokens``).

A count is asked for with the whole request, so that request is read and judged like any other: its content leaves for
the upstream. Its answer holds numbers and nothing to judge.
"""

from __future__ import annotations

from guard_middleware.dialects.answer_shared import JSON_TYPE, SSE_TYPE
from guard_middleware.dialects.anthropic_error import anthropic_error
from guard_middleware.dialects.base import Notice, Options, ParsedAnswer, ParsedRequest, PublicError, Reply
from guard_middleware.dialects.messages_request import parse_request
from guard_middleware.dialects.messages_response import parse_count, parse_response, refusal
from guard_middleware.dialects.messages_stream import MessagesStreamParser, encode, text_block
from guard_middleware.errors import RejectKind, RequestRejected
from guard_middleware.limits import Limits
from guard_middleware.strictjson import JSONValue, dumps


class Messages:
    """The dialect ``messages``; see ``base.Dialect``."""

    name = "messages"

    def parse_request(self, body: JSONValue, limits: Limits, options: Options) -> ParsedRequest:
        return parse_request(body, limits, options)

    def parse_response(self, body: JSONValue, request: ParsedRequest, options: Options) -> ParsedAnswer:
        return parse_response(body, request, options)

    def stream_parser(self, request: ParsedRequest, options: Options) -> MessagesStreamParser:
        return MessagesStreamParser(request, options)

    def error(self, error: PublicError) -> Reply:
        return anthropic_error(error)

    def soft_block(self, request: ParsedRequest, notice: Notice, created: int) -> Reply:
        """A blocked prompt as an answer of the assistant, in one piece or as a stream of one block."""
        usage: JSONValue = {"input_tokens": 0, "output_tokens": 0}
        message: dict[str, JSONValue] = {
            "id": f"msg_{notice.id}",
            "type": "message",
            "role": "assistant",
            "model": request.model or "",
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        ending = refusal(notice, soft=True)
        if not request.stream:
            said: JSONValue = [{"type": "text", "text": notice.message}]
            return Reply(200, ((b"content-type", JSON_TYPE),), dumps({**message, "content": said, **ending}))
        events: list[dict[str, JSONValue]] = [
            {"type": "message_start", "message": message},
            *text_block(0, notice.message),
            {"type": "message_delta", "delta": ending, "usage": {"output_tokens": 0}},
            {"type": "message_stop"},
        ]
        return Reply(200, ((b"content-type", SSE_TYPE),), b"".join(map(encode, events)))


class MessagesCount(Messages):
    """How many tokens a request would cost."""

    def parse_request(self, body: JSONValue, limits: Limits, options: Options) -> ParsedRequest:
        request = parse_request(body, limits, options)
        if request.stream:
            raise RequestRejected(RejectKind.INVALID_REQUEST, "stream: a count is no stream", param="stream")
        return request

    def parse_response(self, body: JSONValue, request: ParsedRequest, options: Options) -> ParsedAnswer:
        return parse_count(body, options)

    def soft_block(self, request: ParsedRequest, notice: Notice, created: int) -> Reply:
        """An error all the same: there is no number that would say it."""
        return anthropic_error(PublicError(400, "content_filter", "invalid_request_error", notice.message))
