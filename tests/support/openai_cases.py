"""Regression cases of the Responses and the legacy Completions API as data: the same form as ``cases``.

A request's ``say`` becomes the input or the prompt, ``fields`` stand beside it. What a Responses upstream answers is
given as ``say``, as output ``items``, or as raw ``body``, ``events`` (a string stands as it is) or ``sse``; items are
streamed as OpenAI streams them. A Completions upstream answers one text of ``say`` per choice.
"""

from __future__ import annotations

import json
from typing import Any

from tests.support import cases
from tests.support.responses import encoded, streamed


class ResponsesRequest(cases.Request):
    path: str = "/v1/responses"

    def value(self) -> Any:
        return cases.build({"model": "m", "input": self.say, **self.fields} if self.body is None else self.body)


class CompletionsRequest(cases.Request):
    path: str = "/v1/completions"

    def value(self) -> Any:
        return cases.build({"model": "m", "prompt": self.say, **self.fields} if self.body is None else self.body)


class ResponsesUpstream(cases.Upstream):
    items: tuple[Any, ...] | None = None
    finish: str | None = "completed"

    def _answer(self) -> dict[str, Any]:
        part = {"type": "output_text", "text": self.say, "annotations": []}
        item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
        head = {"id": "resp_1", "object": "response", "created_at": 1, "model": "m", "status": self.finish}
        usage = {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}
        echoed = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}
        output = [item] if self.items is None else cases.build(list(self.items))
        return {**head, **echoed, "output": output, "usage": usage, **cases.build(self.top)}

    def _whole(self, choices: int) -> bytes:
        if self.base64 is not None or self.text is not None or self.body is not None:
            return super()._whole(choices)
        return json.dumps(self._answer()).encode()

    def _stream(self, choices: int) -> bytes:
        if self.sse is not None:
            return self.sse.encode()
        if self.events is None:
            return encoded(streamed(self._answer(), self.pieces))
        told = cases.build(list(self.events))
        return b"".join(event.encode() if isinstance(event, str) else encoded([event]) for event in told)


class CompletionsUpstream(cases.Upstream):
    def _head(self) -> dict[str, Any]:
        return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m"}

    def _choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        return {"text": text, "index": index, "logprobs": None, "finish_reason": finish, **cases.build(self.choice)}

    def _texts(self, choices: int) -> list[str]:
        texts = [self.say] if isinstance(self.say, str) else self.say
        return [texts[index % len(texts)] for index in range(choices)]

    def _whole(self, choices: int) -> bytes:
        if self.base64 is not None or self.text is not None or self.body is not None:
            return super()._whole(choices)
        said = [self._choice(index, text, self.finish) for index, text in enumerate(self._texts(choices))]
        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        return json.dumps({**self._head(), "choices": said, "usage": usage, **cases.build(self.top)}).encode()

    def _chunks(self, choices: int) -> list[Any]:
        texts = self._texts(choices)
        told = [
            self._choice(index, text[start : start + self.pieces], None)
            for start in range(0, max(map(len, texts)), self.pieces)
            for index, text in enumerate(texts)
            if start < len(text)
        ]
        told += [self._choice(index, "", self.finish) for index in range(choices)]
        return [{**self._head(), "choices": [choice], **cases.build(self.top)} for choice in told]


class ResponsesCase(cases.Case):
    request: ResponsesRequest = ResponsesRequest()
    upstream: ResponsesUpstream = ResponsesUpstream()


class CompletionsCase(cases.Case):
    request: CompletionsRequest = CompletionsRequest()
    upstream: CompletionsUpstream = CompletionsUpstream()


KINDS: dict[str, type[cases.Case]] = {"responses": ResponsesCase, "completions": CompletionsCase}
