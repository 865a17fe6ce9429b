"""Runs one regression case in process, and checks what holds for every case of every dialect.

Beside what a case expects: exactly one record is written, without content; every image that reached the upstream is,
byte for byte and in order, one that the guard was shown; every piece of prose that reached the upstream or the client
stands in a transcript that the guard was asked about; in ``hold`` and ``window`` it stood in one that the guard had
judged when it left; and in ``async`` at most the declared bound follows the harmful words.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Iterator
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
from guard_middleware.sse import Decoder
from guard_middleware.types import Usage, Verdict
from guard_middleware.wire import ModerationRequest
from tests.support import cases
from tests.support.cases import LEAK_BOUND, Case, Expect, GuardScript, Mode
from tests.support.scripted_worker import label

#: what makes a text harmful, and what our own words about a block hold
HARM, OURS = "pick a lock", "by the content policy of this service"


@dataclass(frozen=True)
class Dialect:
    """How a client of one API reads what it gets."""

    #: the bodies of the events, or the one body
    events: Callable[[Seen], Iterator[Any]]
    #: (what says it, text) for all that an event says in pieces
    pieces: Callable[[Any], Iterator[tuple[Any, str]]]
    #: (text, why it ended) of each choice
    spoken: Callable[[Seen], tuple[list[str | None], list[str | None]]]
    #: the code of an error's body; fails where the body has not the API's form
    code: Callable[[Any], str]
    #: the images in a request
    images: Callable[[Any], list[bytes]]


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


def check(case: Case, mode: Mode, through: str, dialect: Dialect, folder: Path, patch: pytest.MonkeyPatch) -> None:
    seen, guard = replay(case, mode, through, folder, patch)
    expect = case.expect
    (record,) = seen.records
    _check_status(expect, mode, dialect, seen)
    assert record["status"] == seen.status
    assert expect.outcome is None or record["outcome"] == expect.outcome
    assert expect.reached is None or len(seen.sent) == expect.reached
    assert record["upstream_called"] == bool(seen.sent)
    # windows are questions too
    assert expect.calls is None or len(guard.asked) == expect.calls or (mode in ("window", "async") and seen.sent)
    for path, value in expect.record.items():
        assert at(record, path) == value, path
    if "capture_content" not in case.config.get("audit", {}):
        assert HARM not in json.dumps(record)
    _check_client(expect, mode, dialect, seen)
    _check_upstream(expect, seen)
    transcripts = guard.transcripts()
    assert [words for words in expect.judged_contains if words not in transcripts] == [], transcripts
    assert [words for words in expect.judged_lacks if words in transcripts] == [], transcripts
    _check_coverage(case, dialect, seen, guard)
    _check_released(case, mode, dialect, seen, guard)


def _check_status(expect: Expect, mode: Mode, dialect: Dialect, seen: Seen) -> None:
    if expect.status == 200:
        assert seen.status == 200, seen.everything
        return
    if seen.status == 200:  # the head of the stream was out: the error is its last event
        assert mode in ("window", "async"), seen.everything
        assert expect.reached == 1
        body = list(dialect.events(seen))[-1]
    else:
        assert seen.status == expect.status, seen.everything
        body = json.loads(seen.body)
    assert dialect.code(body) == expect.code, body


def _check_client(expect: Expect, mode: Mode, dialect: Dialect, seen: Seen) -> None:
    assert seen.header("x-guard-decision-id")
    shown, said = seen.everything, ""
    if seen.status == 200 and seen.body:  # words may be split over events
        said = "\n".join(told(dialect, seen).values())
    assert [words for words in expect.client_contains if words not in shown + said] == [], shown
    # what ``async`` shows before its verdict is held to its bound instead
    early = said if mode == "async" else ""
    assert [words for words in expect.client_lacks if words in shown + said and words not in early] == [], shown
    for name, value in expect.client_headers.items():
        told_early = seen.header(name) == "pending" and mode in ("window", "async")
        assert seen.header(name) == value or told_early, name
    for path, value in expect.client.items():
        assert at(json.loads(seen.body), path) == value, path
    if expect.said is not None or expect.finish is not None:
        words, finish = dialect.spoken(seen)
        assert expect.said is None or words == list(expect.said) or (mode == "async" and expect.outcome == "blocked")
        assert expect.finish is None or finish == list(expect.finish)


def _check_upstream(expect: cases.Expect, seen: Seen) -> None:
    if not seen.sent:
        return
    ((scope, raw),) = seen.sent
    text = raw.decode()
    for path, value in expect.sent.items():
        assert at(json.loads(raw), path) == cases.build(value), path
    assert [path for path in expect.absent if at(json.loads(raw), path) is not None] == []
    assert [words for words in expect.sent_contains if words not in text] == [], text
    assert [words for words in expect.sent_lacks if words in text] == [], text
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    for name, value in expect.sent_headers.items():
        assert headers.get(name) == value, name
    assert expect.sent_query is None or scope["query_string"].decode() == expect.sent_query


def _check_coverage(case: Case, dialect: Dialect, seen: Seen, guard: TranscriptGuard) -> None:
    """What reached the upstream or the client stands in what the guard was asked about."""
    transcripts = guard.transcripts()
    if seen.sent and seen.sent[0][1] and _moderates(case, "input"):
        heard = [request for request in guard.asked if request.source == "input"]
        assert len(heard) == 1 or case.earlier
        value = json.loads(seen.sent[0][1])
        assert dialect.images(value) == [blob.data for blob in heard[-1].conversation.blobs()]
        opaque = {name for d in case.config.get("dialects", {}).values() for name in d.get("extra_fields", {})}
        assert unread({name: item for name, item in value.items() if name not in opaque}, transcripts) == []
    if seen.status == 200 and seen.sent and _moderates(case, "output") and case.expect.outcome == "allowed":
        for value in dialect.events(seen) if seen.sent[0][1] else ():
            assert unread(value, transcripts) == []


def _check_released(case: Case, mode: Mode, dialect: Dialect, seen: Seen, guard: TranscriptGuard) -> None:
    """A stream shows what was judged, or what its bound allows."""
    if mode == "whole" or seen.status != 200 or not seen.sent or not _moderates(case, "output"):
        return
    if mode == "async":
        assert seen.records[0]["leaked_characters"] <= LEAK_BOUND
        if case.expect.outcome == "blocked":
            for text in told(dialect, seen).values():
                assert len(text.partition(HARM)[2]) <= LEAK_BOUND, text
        return
    assert seen.records[0]["leaked_characters"] == 0
    if case.expect.outcome not in ("allowed", "blocked") or seen.records[0]["bypassed"]:
        return
    decoder, judged = Decoder(), functools.cache(lambda verdicts: texts(guard.judged[:verdicts]))
    for data, verdicts in seen.left:
        for event in decoder.feed(data):
            if event.data != "[DONE]":
                for _, text in dialect.pieces(json.loads(event.data)):
                    assert unread(text, judged(verdicts)) == [] or OURS in text


def _moderates(case: Case, source: str) -> bool:
    return all(policy.get(source, {}).get("moderate", True) for policy in case.config.get("policies", {}).values())


def told(dialect: Dialect, seen: Seen) -> dict[Any, str]:
    """What the answer of the upstream says to the client in pieces, by what says it; not our own words."""
    said: dict[Any, str] = {}
    for event in dialect.events(seen):
        for place, text in dialect.pieces(event):
            said[place] = said.get(place, "") + ("" if OURS in text else text)
    return said


def unread(value: Any, transcripts: str) -> list[str]:
    """Lines of prose in ``value`` that stand in no transcript: as they are, or as JSON writes or reads them."""
    lines = [line.strip() for leaf in leaves(value) if not leaf.startswith("data:") for line in leaf.splitlines()]
    prose = [line for line in lines if any(c.isspace() or ord(c) > 126 for c in line)]
    missing = []
    for line in prose:
        if line in transcripts or json.dumps(line, ensure_ascii=False)[1:-1] in transcripts:
            continue
        inner = json.loads(line) if line.startswith("{") and "\\u" in line else None
        missing += [line] if inner is None else unread(inner, transcripts)
    return missing


def leaves(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [*value, *(leaf for item in value.values() for leaf in leaves(item))]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value] if isinstance(value, str) else []


def at(value: Any, path: str) -> Any:
    """The value at a dotted path, or None."""
    for key in path.split("."):
        if isinstance(value, list):
            value = value[int(key)] if int(key) < len(value) else None
        elif isinstance(value, dict):
            value = value.get(key)
        else:
            return None
    return value
