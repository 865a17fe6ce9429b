"""A scripted upstream: the one fake of this project, at the edge that we do not own.

It speaks ``POST /v1/chat/completions`` (streamed or not) and ``GET /v1/models``, and answers by the *name of the
model* asked for, so that a demonstration and a test can choose what comes back without hiding signals in
prompts. It is no model, and says so in every answer.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

#: model -> answer. ``scripted-careless`` gives an answer that a guard should stop.
ANSWERS: Mapping[str, str] = {
    "scripted-helpful": "This is the scripted upstream. Paris is the capital of France. The picture looks fine to me.",
    "scripted-careless": (
        "This is the scripted upstream. To break into their online bank account, first send a phishing email that "
        "steals the password, then use malware to take over the phone and transfer all the money to yourself."
    ),
}


class ScriptedUpstream:
    """The application and the number of requests that it has seen."""

    def __init__(self, answers: Mapping[str, str] = ANSWERS) -> None:
        self.answers = answers
        self.requests = 0
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/models", self._models),
            ]
        )

    async def _models(self, _: Request) -> Response:
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "scripted"} for name in self.answers]
        return _json({"object": "list", "data": models})

    async def _chat(self, request: Request) -> Response:
        self.requests += 1
        body = orjson.loads(await request.body())
        text = self.answers.get(body.get("model"))
        if text is None:
            error = {"message": "unknown scripted model", "type": "invalid_request_error", "code": "model_not_found"}
            return _json({"error": error | {"param": "model"}}, 404)
        head = {"id": f"chatcmpl-{self.requests}", "created": int(time.time()), "model": body["model"]}
        usage = {"prompt_tokens": 10, "completion_tokens": len(text.split()), "total_tokens": 10 + len(text.split())}
        if body.get("stream"):
            with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return StreamingResponse(_events(head, text, usage if with_usage else None), media_type="text/event-stream")
        choices = [
            {"index": n, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            for n in range(body.get("n") or 1)
        ]
        return _json({**head, "object": "chat.completion", "choices": choices, "usage": usage})


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


async def _events(head: dict[str, Any], text: str, usage: dict[str, int] | None) -> AsyncIterator[bytes]:
    head = {**head, "object": "chat.completion.chunk"}
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": f"{word} "} for word in text.split()]
    for delta in deltas:
        yield _event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    yield _event({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    if usage is not None:
        yield _event({**head, "choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


def _event(value: Any) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
