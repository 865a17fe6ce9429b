"""Every case of ``tests/regression/*.yaml`` in process: the guarded application as a client sees it.

Beside what a case expects, three things hold for all of them: exactly one record is written; every image that
reached the upstream is, byte for byte and in order, one that the guard was shown; and every piece of prose that
reached the upstream or the client stands in a transcript that the guard was asked about.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import ssl
from collections.abc import Iterator
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
from tests.support.cases import Case, GuardScript
from tests.support.scripted_worker import label

FILES = sorted(Path(__file__).parent.glob("*.yaml"))
CASES = [case for path in FILES for case in cases.load(path)]
RUNS = [
    pytest.param(
        case, stream, through, id=f"{case.id}{'-streamed' if stream else ''}{'-proxy' if through == 'proxy' else ''}"
    )
    for case in CASES
    for stream in case.streams
    for through in (("middleware", "proxy") if case.through == "both" else (case.through,))
]


@pytest.fixture(autouse=True, scope="module")
def one_trust_store() -> Iterator[None]:
    """Reading the system's certificates takes longer than a case."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", functools.cache(ssl.create_default_context))
        yield


class TranscriptGuard:
    """The rule guard on what a model would read: harmful is a transcript slot that contains ``pick a lock``."""

    def __init__(self, script: GuardScript | None) -> None:
        self.asked: list[ModerationRequest] = []
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
        return "\n".join(render(request.conversation).text() for request in self.asked)


def _text(segments: tuple[Segment, ...]) -> str:
    words = "".join("" if isinstance(segment, ImageSlot) else segment.text for segment in segments)
    return " ".join(words.split())


@dataclass
class Seen:
    """What one run of a case did."""

    sent: list[tuple[dict[str, Any], bytes]] = field(default_factory=list)
    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
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

    def __init__(self, case: Case, seen: Seen) -> None:
        self._upstream, self._seen = case.upstream, seen

    async def aclose(self) -> None:
        pass

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        self._seen.sent.append((scope, body))
        upstream = self._upstream
        if upstream.cut == "head":
            raise ConnectionError
        asked = json.loads(body) if body else {}
        kind, answer = upstream.answer(bool(asked.get("stream")), asked.get("n") or 1)
        headers = [(name.encode(), value.encode()) for name, value in upstream.headers.items()]
        headers.append((b"content-type", kind.encode()))
        await send({"type": "http.response.start", "status": upstream.status, "headers": headers})
        for start in range(0, len(answer), upstream.chunk):
            piece = answer[start : start + upstream.chunk]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)  # as between two reads of a real connection, where questions are answered
        if upstream.cut == "body":
            raise ConnectionError
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _exchange(case: Case, stream: bool, app: Any, seen: Seen) -> None:
    request = case.request
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
    case: Case, stream: bool, through: str, folder: Path, patch: pytest.MonkeyPatch
) -> tuple[Seen, TranscriptGuard]:
    seen, log = Seen(), folder / "decisions.jsonl"
    settings = {**case.config, "audit": {"path": str(log), **case.config.get("audit", {})}}
    if through == "proxy":
        settings = {"upstream": {"url": "http://upstream.invalid"}, **settings}
    guard = TranscriptGuard(case.guard)

    async def run() -> None:
        runtime = Runtime(config.parse(json.dumps(settings)), guard=guard)
        application = Application(case, seen)
        if through == "proxy":
            patch.setattr(proxy, "UpstreamApp", lambda *args, **options: application)
            app: Any = proxy.create_app(runtime.config, runtime=runtime)
        else:
            app = GuardMiddleware(application, runtime=runtime)
        try:
            await _exchange(case, stream, app, seen)
        finally:
            await runtime.aclose()

    asyncio.run(run())
    seen.records = [json.loads(line) for line in log.read_text().splitlines()]
    return seen, guard


@pytest.mark.parametrize(("case", "stream", "through"), RUNS)
def test_case(case: Case, stream: bool, through: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, guard = replay(case, stream, through, tmp_path, monkeypatch)
    expect = case.expect
    assert seen.status == expect.status, seen.everything
    if expect.status != 200:
        error = json.loads(seen.body)["error"]
        assert error["code"] == expect.code, error
    (record,) = seen.records
    assert record["status"] == seen.status
    assert expect.outcome is None or record["outcome"] == expect.outcome
    assert expect.reached is None or len(seen.sent) == expect.reached
    assert record["upstream_called"] == bool(seen.sent)
    assert expect.calls is None or len(guard.asked) == expect.calls
    for path, value in expect.record.items():
        assert at(record, path) == value, path
    _check_client(expect, seen)
    _check_upstream(expect, seen)
    transcripts = guard.transcripts()
    assert [words for words in expect.judged_contains if words not in transcripts] == [], transcripts
    assert [words for words in expect.judged_lacks if words in transcripts] == [], transcripts
    _check_coverage(case, seen, guard)


def _check_client(expect: cases.Expect, seen: Seen) -> None:
    assert seen.header("x-guard-decision-id")
    assert [words for words in expect.client_contains if words not in seen.everything] == []
    assert [words for words in expect.client_lacks if words in seen.everything] == [], seen.everything
    for name, value in expect.client_headers.items():
        assert seen.header(name) == value, name
    for path, value in expect.client.items():
        assert at(json.loads(seen.body), path) == value, path
    if expect.said is not None or expect.finish is not None:
        said, finish = spoken(seen)
        assert expect.said is None or said == list(expect.said)
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


def _check_coverage(case: Case, seen: Seen, guard: TranscriptGuard) -> None:
    sources = {
        source: all(policy.get(source, {}).get("moderate", True) for policy in case.config.get("policies", {}).values())
        for source in ("input", "output")
    }
    heard = [request for request in guard.asked if request.source == "input"]
    transcripts = guard.transcripts()
    if seen.sent and seen.sent[0][1] and sources["input"]:
        (asked,) = heard
        value = json.loads(seen.sent[0][1])
        urls = [leaf for leaf in leaves(value) if leaf.startswith("data:")]
        assert [base64.b64decode(url.partition(",")[2]) for url in urls] == [b.data for b in asked.conversation.blobs()]
        opaque = {name for d in case.config.get("dialects", {}).values() for name in d.get("extra_fields", {})}
        assert unread({name: item for name, item in value.items() if name not in opaque}, transcripts) == []
    if seen.status == 200 and seen.sent and seen.sent[0][1] and sources["output"] and case.expect.outcome == "allowed":
        for value in events(seen):
            assert unread(value, transcripts) == []


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


def events(seen: Seen) -> Iterator[Any]:
    if seen.header("content-type") == "application/json":
        yield json.loads(seen.body)
        return
    lines = seen.body.decode().split("\n")
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    assert len(data) == len([line for line in lines if line])
    yield from map(json.loads, data[:-1])


def spoken(seen: Seen) -> tuple[list[str | None], list[str | None]]:
    """(content, finish_reason) of each choice, streamed or not."""
    said: dict[int, list[str]] = {}
    finish: dict[int, str | None] = {}
    for event in events(seen):
        for choice in event["choices"]:
            text = choice.get("message", choice.get("delta")).get("content")
            said.setdefault(choice["index"], []).extend([] if text is None else [text])
            finish[choice["index"]] = choice["finish_reason"] or finish.get(choice["index"])
    return [("".join(said[i]) or None) for i in sorted(said)], [finish[i] for i in sorted(finish)]


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


def test_the_memory_is_broad_and_not_one_sided() -> None:
    ids = [case.id for case in CASES]
    assert len(ids) == len(set(ids))
    assert {path.stem for path in FILES} == set("ABCDEFGH")
    assert len(CASES) >= 150
    assert sum(case.negative for case in CASES) >= len(CASES) / 5


@pytest.mark.parametrize("path", ["request.bodyy", "expect.statu", "upstream.sayy", "titel"])
def test_an_unknown_key_in_a_case_is_an_error(path: str) -> None:
    value: dict[str, Any] = {
        "id": "A1-x",
        "title": "a title",
        "request": {},
        "upstream": {},
        "expect": {"is": "passes"},
    }
    cases.Case.model_validate(value)
    outer, _, inner = path.rpartition(".")
    (value[outer] if outer else value)[inner] = 1
    with pytest.raises(ValueError, match=inner):
        cases.Case.model_validate(value)
