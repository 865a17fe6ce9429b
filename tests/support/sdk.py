"""The openai SDK in front of one dialect: requests are read by it, answers are what a policy makes of a script's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from guard_middleware import enforce
from guard_middleware.dialects.answer_shared import JSON_TYPE, SSE_TYPE
from guard_middleware.dialects.base import Dialect, Notice, Options, ParsedRequest, PublicError, Reply, Ruling
from guard_middleware.limits import Limits
from guard_middleware.sse import Decoder
from guard_middleware.strictjson import loads
from guard_middleware.types import Action, Basis, Conversation, Decision, Message, Source, Text, Usage, Verdict
from tests.support.streams import finished

_ASKED = Conversation((Message("user", (Text("hi"),)),))


def notice(source: Source, action: Action, choice: int = 0) -> Notice:
    label: Any = "unharmful" if action is Action.ALLOW else "harmful"
    verdict = Verdict(label, label, 0.9, 0.9, "why", Usage(), "nano", "1")
    decision = Decision(f"d.{source}.{choice}", source, action, Basis.VERDICT, "p", "0", action, verdict)
    return enforce.notice(decision, _ASKED)


def ruling(*actions: Action, soft: bool = False) -> Ruling:
    """The request is allowed; the choices are ruled as ``actions`` say."""
    notices = {index: notice("output", action, index) for index, action in enumerate(actions)}
    return Ruling(notice("input", Action.ALLOW), notices, soft)


def unavailable() -> PublicError:
    failed = Decision("d1", "input", Action.BLOCK, Basis.ERROR, "p", "0", Action.BLOCK, None, "unavailable")
    return enforce.guard_unavailable(failed)


@dataclass
class Gateway:
    """Answers every request of the SDK with ``reply``, made from the request as the dialect reads it."""

    dialect: Dialect
    reply: Callable[[ParsedRequest], Reply]
    hits: int = 0
    seen: list[ParsedRequest] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.hits += 1
        self.seen.append(self.dialect.parse_request(loads(request.content), Limits(), Options()))
        reply = self.reply(self.seen[-1])
        return httpx.Response(reply.status, headers=list(reply.headers), content=reply.body)

    def client(self) -> openai.OpenAI:
        transport = httpx.MockTransport(self)
        return openai.OpenAI(api_key="k", base_url="http://gateway/v1", http_client=httpx.Client(transport=transport))


def failing(dialect: Dialect, error: PublicError) -> Gateway:
    return Gateway(dialect, lambda request: enforce.render(dialect, error))


def answering(
    dialect: Dialect, what: Ruling, whole: Callable[[ParsedRequest], Any], stream: Callable[[ParsedRequest], bytes]
) -> Gateway:
    """A gateway whose upstream answers ``whole``, or ``stream`` where that was asked for, ruled as ``what`` says."""

    def reply(request: ParsedRequest) -> Reply:
        parsed: Any
        if request.stream:
            parsed = finished(dialect.stream_parser(request, Options()), Decoder().feed(stream(request)))
        else:
            parsed = dialect.parse_response(whole(request), request, Options())
        kind = SSE_TYPE if request.stream else JSON_TYPE
        return Reply(200, ((b"content-type", kind),), parsed.render(what))

    return Gateway(dialect, reply)


def raw(dialect: Dialect, pieces: Iterable[bytes]) -> Gateway:
    """A gateway that sends these bytes as a stream."""
    body = b"".join(pieces)
    return Gateway(dialect, lambda request: Reply(200, ((b"content-type", b"text/event-stream"),), body))
