"""What an upstream says in each dialect, piece by piece, and what a client makes of the bytes it gets.

shape = SHAPES["messages"]
httpx.post(url + shape.path, json=shape.asked("m", stream=True))
stream = shape.opening() + shape.says("Hello ") + shape.says("you.") + shape.ending("Hello you.")
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from guard_middleware.sse import Decoder
from tests.support import anthropic_events, responses

BREAD = "how do I bake bread?"
COMMENT = b": guard pending\n\n"
DONE = b"data: [DONE]\n\n"
_TOKENS = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def events(data: bytes) -> list[dict[str, Any]]:
    """The bodies of a stream's events, but for ``[DONE]``."""
    return [json.loads(event.data) for event in Decoder().feed(data) if event.data != "[DONE]"]


@dataclass(frozen=True)
class Shape:
    """One dialect. ``last`` stands in every stream that came to an end of its own, and ``error_event`` says an error.

    ``usage`` of an answer and of an ending takes the place of the proper numbers.
    """

    path: str
    last: bytes
    error_event: bytes = b'data: {"error": {"message": "x"}}\n\n'
    keep_alive: bytes = COMMENT
    #: where its streams end after an error
    after_error: bytes = b""

    def asked(self, model: str, stream: bool, text: str = BREAD) -> dict[str, Any]:
        raise NotImplementedError

    def answer(self, text: str, usage: Any = None) -> dict[str, Any]:
        raise NotImplementedError

    def opening(self) -> bytes:
        raise NotImplementedError

    def says(self, text: str) -> bytes:
        raise NotImplementedError

    def ending(self, said: str, usage: Any = None) -> bytes:
        """The rest of a stream that said so much."""
        raise NotImplementedError

    def text(self, data: bytes) -> str:
        """What a stream said so far."""
        raise NotImplementedError

    def code(self, body: Any) -> str:
        """The code of an error, whole or from a stream; fails where the body has not the dialect's form."""
        error = body["error"]
        assert error.keys() >= {"message", "type", "param", "code"}
        assert error["type"] in ("server_error", "invalid_request_error")
        return str(error["code"])


class _Chunks(Shape):
    """Both APIs that stream chunks with choices."""

    kind = ""

    def _choice(self, text: str, begins: bool = False) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk(self, choices: list[Any], **more: Any) -> bytes:
        body = {"id": "c", "object": self.kind, "created": 1, "model": "m", "choices": choices, **more}
        return b"data: " + json.dumps(body).encode() + b"\n\n"

    def opening(self) -> bytes:
        return self._chunk([{"index": 0, **self._choice("", True), "finish_reason": None}])

    def says(self, text: str) -> bytes:
        return self._chunk([{"index": 0, **self._choice(text), "finish_reason": None}])

    def ending(self, said: str, usage: Any = None) -> bytes:
        finish = self._chunk([{"index": 0, **self._choice(""), "finish_reason": "stop"}])
        return finish + (self._chunk([], usage=usage) if usage is not None else b"") + DONE

    def text(self, data: bytes) -> str:
        choices = [choice for event in events(data) for choice in event.get("choices", ())]
        return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


class _Chat(_Chunks):
    kind = "chat.completion.chunk"

    def asked(self, model: str, stream: bool, text: str = BREAD) -> dict[str, Any]:
        return {"model": model, "messages": [{"role": "user", "content": text}], "stream": stream}

    def answer(self, text: str, usage: Any = None) -> dict[str, Any]:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        head = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"}
        return {**head, "choices": [choice], "usage": _TOKENS if usage is None else usage}

    def _choice(self, text: str, begins: bool = False) -> dict[str, Any]:
        return {"delta": {**({"role": "assistant"} if begins else {}), "content": text}}


class _Completions(_Chunks):
    kind = "text_completion"

    def asked(self, model: str, stream: bool, text: str = BREAD) -> dict[str, Any]:
        return {"model": model, "prompt": text, "stream": stream}

    def answer(self, text: str, usage: Any = None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}
        head = {"id": "c", "object": self.kind, "created": 1, "model": "m"}
        return {**head, "choices": [choice], "usage": _TOKENS if usage is None else usage}

    def _choice(self, text: str, begins: bool = False) -> dict[str, Any]:
        return {"text": text, "logprobs": None}


class _Responses(Shape):
    def asked(self, model: str, stream: bool, text: str = BREAD) -> dict[str, Any]:
        return {"model": model, "input": text, "stream": stream}

    def answer(self, text: str, usage: Any = None) -> dict[str, Any]:
        part = {"type": "output_text", "text": text, "annotations": []}
        item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
        head = {"id": "resp_1", "object": "response", "created_at": 1, "model": "m", "status": "completed"}
        echoed = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}
        tokens = {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}
        return {**head, **echoed, "output": [item], "usage": tokens if usage is None else usage}

    def opening(self) -> bytes:
        return self._told("x")[0]

    def says(self, text: str) -> bytes:
        return self._told(text)[1]

    def ending(self, said: str, usage: Any = None) -> bytes:
        return self._told(said, usage)[2]

    def text(self, data: bytes) -> str:
        return "".join(event["delta"] for event in events(data) if event["type"] == "response.output_text.delta")

    def _told(self, text: str, usage: Any = None) -> tuple[bytes, bytes, bytes]:
        """(what comes before, the delta of the text, what comes after)."""
        told = responses.streamed(self.answer(text, usage), pieces=len(text))
        (at,) = [n for n, event in enumerate(told) if event["type"] == "response.output_text.delta"]
        return responses.encoded(told[:at]), responses.encoded(told[at : at + 1]), responses.encoded(told[at + 1 :])


class _Messages(Shape):
    def asked(self, model: str, stream: bool, text: str = BREAD) -> dict[str, Any]:
        return {"model": model, "max_tokens": 99, "messages": [{"role": "user", "content": text}], "stream": stream}

    def answer(self, text: str, usage: Any = None) -> dict[str, Any]:
        head = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m"}
        stop = {"stop_reason": "end_turn", "stop_sequence": None}
        tokens = {"input_tokens": 3, "output_tokens": 4}
        content = [{"type": "text", "text": text}]
        return {**head, "content": content, **stop, "usage": tokens if usage is None else usage}

    def opening(self) -> bytes:
        return _wire([anthropic_events.start(), anthropic_events.opened(0)])

    def says(self, text: str) -> bytes:
        return _wire([anthropic_events.delta(0, text=text)])

    def ending(self, said: str, usage: Any = None) -> bytes:
        delta, stop = anthropic_events.ending()
        return _wire([anthropic_events.closed(0), delta if usage is None else {**delta, "usage": usage}, stop])

    def text(self, data: bytes) -> str:
        return "".join(event["delta"].get("text", "") for event in events(data) if "delta" in event)

    def code(self, body: Any) -> str:
        assert body["type"] == "error"
        assert body["error"]["message"]
        assert body["error"]["type"] in ("api_error", "timeout_error", "rate_limit_error", "invalid_request_error")
        return str(body["error"]["details"]["error_code"])


def _wire(bodies: Iterable[dict[str, Any]]) -> bytes:
    return anthropic_events.wire(bodies).encode()


_CHOSEN = b'"finish_reason":"'
SHAPES: dict[str, Shape] = {
    "chat_completions": _Chat("/v1/chat/completions", _CHOSEN, after_error=DONE),
    "completions": _Completions("/v1/completions", _CHOSEN, after_error=DONE),
    "responses": _Responses(
        "/v1/responses",
        b"response.completed",
        b'event: error\ndata: {"type": "error", "code": "boom", "message": "x", "param": null}\n\n',
    ),
    "messages": _Messages(
        "/v1/messages",
        b"message_stop",
        b'event: error\ndata: {"type": "error", "error": {"type": "overloaded_error", "message": "x"}}\n\n',
        b'event: ping\ndata: {"type":"ping"}\n\n',
    ),
}
