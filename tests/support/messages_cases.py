"""Regression cases of the Messages API as data: the same form as ``cases``, in this dialect's shape.

A request's ``say`` or ``messages`` become a Messages body, ``fields`` stand beside them. What the upstream answers is
given as ``say``, as ``blocks``, or as raw ``body``, ``events`` (bodies of events; a string stands as it is) or ``sse``;
blocks are streamed in pieces where the case is streamed. ``{$source: {...}}`` is a base64 image source.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

from tests.support import cases

MESSAGES = "/v1/messages"


class Request(cases.Request):
    path: str = MESSAGES

    def value(self) -> Any:
        if self.body is not None:
            return build(self.body)
        messages = [{"role": "user", "content": self.say}] if self.messages is None else self.messages
        return build({"model": "m", "max_tokens": 99, "messages": messages, **self.fields})


class Upstream(cases.Upstream):
    blocks: tuple[Any, ...] | None = None
    finish: str | None = "end_turn"
    #: events without their name
    unnamed: bool = False

    def _blocks(self) -> list[dict[str, Any]]:
        if self.blocks is not None:
            return list(build(list(self.blocks)))
        assert isinstance(self.say, str)
        return [{"type": "text", "text": self.say}]

    def _head(self) -> dict[str, Any]:
        return {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", **build(self.top)}

    def _whole(self, choices: int) -> bytes:
        if self.base64 is not None or self.text is not None or self.body is not None:
            return super()._whole(choices)
        usage = {"input_tokens": 3, "output_tokens": 4}
        stop = {"stop_reason": self.finish, "stop_sequence": None, **build(self.choice)}
        return json.dumps({**self._head(), "content": self._blocks(), **stop, "usage": usage}).encode()

    def _stream(self, choices: int) -> bytes:
        if self.sse is not None:
            return self.sse.encode()
        events = build(list(self.events)) if self.events is not None else list(self._events())
        return "".join(event if isinstance(event, str) else self._event(event) for event in events).encode()

    def _event(self, body: dict[str, Any]) -> str:
        name = "" if self.unnamed else f"event: {body['type']}\n"
        return f"{name}data: {json.dumps(body, ensure_ascii=False)}\n\n"

    def _events(self) -> Iterator[dict[str, Any]]:
        usage = {"input_tokens": 3, "output_tokens": 1}
        head = {**self._head(), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield {"type": "message_start", "message": head}
        yield {"type": "ping"}
        for index, block in enumerate(self._blocks()):
            empty, deltas = self._deltas(block)
            yield {"type": "content_block_start", "index": index, "content_block": empty}
            for delta in deltas:
                yield {"type": "content_block_delta", "index": index, "delta": delta}
            yield {"type": "content_block_stop", "index": index}
        stop = {"stop_reason": self.finish, "stop_sequence": None, **build(self.choice)}
        yield {"type": "message_delta", "delta": stop, "usage": {"output_tokens": 4}}
        yield {"type": "message_stop"}

    def _deltas(self, block: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(the block at its start, what follows)."""
        match block["type"]:
            case "text" | "thinking" as kind:
                words = [{"type": f"{kind}_delta", kind: piece} for piece in self._cut(block[kind])]
                cited = [{"type": "citations_delta", "citation": item} for item in block.get("citations") or []]
                rest = {name: item for name, item in block.items() if name != "citations"}
                return {**rest, kind: ""}, words + cited
            case "tool_use" | "server_tool_use":
                written = json.dumps(block["input"], ensure_ascii=False)
                words = [{"type": "input_json_delta", "partial_json": piece} for piece in self._cut(written)]
                return {**block, "input": {}}, words
            case _:
                return block, []

    def _cut(self, text: str) -> list[str]:
        return [text[start : start + self.pieces] for start in range(0, len(text), self.pieces)]


class MessagesCase(cases.Case):
    request: Request = Request()
    upstream: Upstream = Upstream()


def build(value: Any) -> Any:
    """``value`` with every generator run."""
    if isinstance(value, list | tuple):
        return [build(item) for item in value]
    match value:
        case {"$source": options, **rest} if not rest:
            data = base64.b64encode(cases.picture(cases.Picture.model_validate(options))).decode()
            return {"type": "base64", "media_type": options.get("mime", "image/png"), "data": data}
        case dict() if not any(name.startswith("$") for name in value):
            return {name: build(item) for name, item in value.items()}
    return cases.build(value)
