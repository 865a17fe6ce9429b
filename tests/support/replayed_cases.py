"""One regression case in process: the guarded application between a client and an upstream that answers as it says."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from guard_middleware import config, proxy
from guard_middleware.errors import GuardError
from guard_middleware.guard.parse import parse
from guard_middleware.guard.prompt import ImageSlot, Segment, render
from guard_middleware.middleware import GuardMiddleware
from guard_middleware.runtime import Runtime
from guard_middleware.types import Usage, Verdict
from guard_middleware.wire import ModerationRequest
from tests.support import cases
from tests.support.cases import Case, GuardScript, Mode
from tests.support.scripted_worker import label


class TranscriptGuard:
    """The rule guard on what a model would read: harmful is a transcript slot that contains ``pick a lock``."""

    def __init__(self, script: GuardScript | None) -> None:
        self.asked: list[ModerationRequest] = []
        self.judged: list[ModerationRequest] = []
        self._script = script or GuardScript(after=1 << 30)

    async def moderate(self, request: ModerationRequest) -> Verdict | GuardError:
        self.asked.append(request)
        transcript = render(request.conversation)
        request_label, response_label = label(_text(transcript.prompt)), None
        if transcript.answer is not None:
            response_label = label(_text(transcript.answer))
        if len(self.asked) > self._script.after:
            try:
                async with asyncio.timeout(request.deadline):
                    await asyncio.sleep(self._script.wait)
            except TimeoutError:
                return GuardError("timeout")
            if self._script.error is not None:
                return GuardError(self._script.error)
            if self._script.output is not None:
                try:
                    said = parse(self._script.output, answered=response_label is not None)
                except GuardError as error:
                    return error
                request_label, response_label = said.request, said.response
        self.judged.append(request)
        return Verdict(
            request=request_label,
            response=response_label,
            request_score=float(request_label == "harmful"),
            response_score=None if response_label is None else float(response_label == "harmful"),
            reasoning="Step 1: The rule decides.",
            usage=Usage(1, 1, 1),
            model="rule",
            revision="0",
        )

    def transcripts(self) -> str:
        return texts(self.asked)


def texts(requests: list[ModerationRequest]) -> str:
    return "\n".join(render(request.conversation).text() for request in requests)


def _text(segments: tuple[Segment, ...]) -> str:
    words = "".join("" if isinstance(segment, ImageSlot) else segment.text for segment in segments)
    return " ".join(words.split())


@dataclass
class Seen:
    """What one exchange of a case did."""

    sent: list[tuple[dict[str, Any], bytes]] = field(default_factory=list)
    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    #: pieces of the body, and how many questions had been judged when each left
    left: list[tuple[bytes, int]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def everything(self) -> str:
        return (
            "\n".join(f"{name}: {value}" for name, value in self.headers) + "\n" + self.body.decode("utf-8", "replace")
        )

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)


class Application:
    """Behind the guard: keeps what it gets and answers as the case says."""

    def __init__(self) -> None:
        self.upstream, self.seen = cases.Upstream(), Seen()

    async def aclose(self) -> None:
        pass

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        self.seen.sent.append((scope, body))
        upstream = self.upstream
        if upstream.cut == "head":
            raise ConnectionError
        asked = json.loads(body) if body else {}
        kind, answer = upstream.answer(bool(asked.get("stream")), asked.get("n") or 1)
        headers = [(name.encode(), value.encode()) for name, value in upstream.headers.items()]
        headers.append((b"content-type", kind.encode()))
        await send({"type": "http.response.start", "status": upstream.status, "headers": headers})
        for piece in upstream.cut_up(answer):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)  # as between two reads of a real connection, where questions are answered
        if upstream.cut == "body":
            raise ConnectionError
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _exchange(request: cases.Request, stream: bool, app: Any, seen: Seen, guard: TranscriptGuard) -> None:
    data = request.data(stream)
    size = request.pieces or max(1, len(data))
    pieces = [data[start : start + size] for start in range(0, len(data), size)] or [b""]
    kind = [("content-type", request.type)] if request.type is not None else []

    async def receive() -> Any:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            seen.status = message["status"]
            seen.headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message["headers"]]
        else:
            seen.body += message.get("body", b"")
            seen.left.append((message.get("body", b""), len(guard.judged)))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": unquote(request.path),
        "raw_path": request.path.encode("latin-1"),
        "query_string": request.query.encode("latin-1"),
        "root_path": "",
        "headers": [
            (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in (*kind, *request.headers)
        ],
        "client": (request.client, 40000),
        "server": ("gateway.example", 8080),
    }
    await asyncio.wait_for(app(scope, receive, send), 20)


def replay(
    case: Case, mode: Mode, through: str, folder: Path, patch: pytest.MonkeyPatch
) -> tuple[Seen, TranscriptGuard]:
    """What the case's own exchange did, after the earlier ones."""
    log = folder / "decisions.jsonl"
    settings = {**case.settings(mode), "audit": {"path": str(log), **case.config.get("audit", {})}}
    if through == "proxy":
        settings = {"upstream": {"url": "http://upstream.invalid"}, **settings}
    guard = TranscriptGuard(case.guard)
    exchanges = [(item, Seen()) for item in case.exchanges]

    async def run() -> None:
        runtime = Runtime(config.parse(json.dumps(settings)), guard=guard)
        application = Application()
        if through == "proxy":
            patch.setattr(proxy, "UpstreamApp", lambda *args, **options: application)
            app: Any = proxy.create_app(runtime.config, runtime=runtime)
        else:
            app = GuardMiddleware(application, runtime=runtime)
        try:
            for exchange, seen in exchanges:
                application.upstream, application.seen = exchange.upstream, seen
                await _exchange(exchange.request, mode != "whole", app, seen, guard)
        finally:
            await runtime.aclose()

    asyncio.run(run())
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(records) == len(exchanges)
    for (exchange, seen), record in zip(exchanges, records, strict=True):
        seen.records = [record]
        if exchange is not case:
            assert (seen.status, record["outcome"]) == (exchange.expect.status, exchange.expect.outcome)
    return exchanges[-1][1], guard
