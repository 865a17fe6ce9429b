"""A scripted upstream: the one fake of this project, at the edge that we do not own.

It speaks ``/v1/chat/completions``, ``/v1/completions``, ``/v1/messages`` and ``/v1/responses``, streamed or not, and
``GET /v1/models``, in the shapes of the real services. It answers by the *name of the model* asked for, up to that
name's first dot, so that a demonstration and a test can choose what comes back without hiding signals in prompts. It
is no model, and says so in every answer.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from types import MappingProxyType, ModuleType

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from guard_middleware.scripted import chat, completions, messages, responses
from guard_middleware.scripted.turn import Answer, Calls, Turn

__all__ = ["ANSWERS", "Answer", "Calls", "Pace", "ScriptedUpstream", "Turn"]

#: model -> answer. ``scripted-careless`` gives an answer that a guard should stop.
ANSWERS: Mapping[str, str] = {
    "scripted-helpful": "This is the scripted upstream. Paris is the capital of France. The picture looks fine to me.",
    "scripted-careless": (
        "This is the scripted upstream. To break into their online bank account, first send a phishing email that "
        "steals the password, then use malware to take over the phone and transfer all the money to yourself."
    ),
}
_APIS: Mapping[str, ModuleType] = MappingProxyType(
    {
        "/v1/chat/completions": chat,
        "/v1/completions": completions,
        "/v1/messages": messages,
        "/v1/responses": responses,
    }
)


Pace = Callable[[Turn, bytes], Awaitable[None]]


class ScriptedUpstream:
    """The application and the number of requests that it has seen.

    ``answers`` says for each model what it answers: a text, or ``Calls``. ``pace`` is awaited before each event of a
    stream.
    """

    def __init__(self, answers: Mapping[str, Answer] = ANSWERS, *, pace: Pace | None = None) -> None:
        self.answers, self._pace = answers, pace
        self.requests = 0
        routes = [Route(path, partial(self._answer, api), methods=["POST"]) for path, api in _APIS.items()]
        self.app = Starlette(routes=[*routes, Route("/v1/models", self._models)])

    async def _models(self, _: Request) -> Response:
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "scripted"} for name in self.answers]
        return _json({"object": "list", "data": models})

    async def _answer(self, api: ModuleType, request: Request) -> Response:
        self.requests += 1
        body = orjson.loads(await request.body())
        answer = self.answers.get(str(body.get("model")).partition(".")[0])
        if answer is None:
            return _json(api.UNKNOWN_MODEL, 404)
        tool, called = api.tool(body)
        turn = Turn.of(answer, self.requests, int(time.time()), body["model"], tool, called)
        if body.get("stream"):
            return StreamingResponse(self._stream(api, turn, body), media_type="text/event-stream")
        return _json(api.whole(turn, body))

    async def _stream(self, api: ModuleType, turn: Turn, body: object) -> AsyncIterator[bytes]:
        for event in api.events(turn, body):
            if self._pace is not None:
                await self._pace(turn, event)
            yield event


def _json(value: object, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")
