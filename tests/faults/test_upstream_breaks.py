"""An upstream that breaks, lies or says what nobody can screen: a clear 5xx, one record, and none of its bytes."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import gateway as support
from tests.support.gateway import (
    GOOD,
    Behaviour,
    Gateway,
    Seen,
    Upstream,
    chat,
    chunk,
    chunked,
    completion,
    event,
    head,
    scripted_worker,
    stream_head,
    unique,
    whole,
)

#: in every broken answer, and never at a client
SECRET = "mauve-walrus"
SILENCE = 0.4


def writes(make: Any, *, close: bool = False, reset: bool = False, hang: bool = False) -> Behaviour:
    """Answers with these bytes (or what the function makes of the request); then goes on, ends, resets or is silent."""

    async def behaviour(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(make(seen) if callable(make) else make)
        await writer.drain()
        if reset:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        elif close:
            writer.close()
        elif hang:
            await reader.read(1)

    return behaviour


def said(seen: Seen, **message: Any) -> dict[str, Any]:
    return completion(seen, {"content": f"{SECRET} {GOOD}"} | message)


def spoken(seen: Seen) -> bytes:
    return chunk(seen, {"role": "assistant", "content": f"{SECRET} "})


def events(*after: bytes, finish: bool = True, end: bool = True) -> Any:
    """A stream that says the secret, finishes where it should, and then these bytes."""

    def make(seen: Seen) -> bytes:
        last = [chunk(seen, {}, "stop")] if finish else []
        return stream_head() + chunked(spoken(seen), *last, *after, end=end)

    return make


def dripping(seen: Seen) -> bytes:
    return head("application/json", "200 OK", "content-length: 5000") + f'{{"id": "{SECRET}'.encode()


def extended(key: str, value: Any) -> Any:
    return lambda seen: whole({**said(seen), key: value})


def choices(*found: Any) -> Any:
    return lambda seen: whole({**said(seen), "choices": list(found)})


DONE = event("[DONE]")
HTML = f"<html>{SECRET}</html>".encode()
ERROR = {"message": SECRET, "type": "server_error", "code": "boom"}

#: name -> (behaviour, streamed, status, code)
CASES: dict[str, tuple[Behaviour, bool, int, str]] = {
    # the connection
    "ends_at_once": (writes(b"", close=True), False, 502, "upstream_reset"),
    "resets_at_once": (writes(b"", reset=True), False, 502, "upstream_reset"),
    "ends_in_head": (writes(b"HTTP/1.1 200 OK\r\ncontent-ty", close=True), False, 502, "upstream_reset"),
    "ends_in_body": (writes(dripping, close=True), False, 502, "upstream_reset"),
    "resets_in_body": (writes(dripping, reset=True), False, 502, "upstream_reset"),
    "ends_in_chunk": (
        writes(stream_head() + b"ff\r\ndata: mauve-walrus", close=True), True, 502, "upstream_reset",
    ),
    "resets_in_stream": (writes(events(finish=False, end=False), reset=True), True, 502, "upstream_reset"),
    "resets_after_finish": (writes(events(end=False), reset=True), True, 502, "upstream_reset"),
    "resets_after_done": (writes(events(DONE, end=False), reset=True), True, 502, "upstream_reset"),
    "no_http": (writes(f"{SECRET}\r\n\r\n".encode(), close=True), False, 502, "upstream_reset"),
    "bad_chunk": (writes(stream_head() + b"zz\r\nmauve-walrus\r\n0\r\n\r\n", close=True), True, 502, "upstream_reset"),
    # silence
    "silent": (writes(b"", hang=True), False, 504, "upstream_timeout"),
    "silent_in_body": (writes(dripping, hang=True), False, 504, "upstream_timeout"),
    "silent_in_stream": (writes(events(finish=False, end=False), hang=True), True, 504, "upstream_timeout"),
    # what it is
    "gzip": (
        writes(lambda seen: whole(gzip.compress(json.dumps(said(seen)).encode()), "200 OK", "application/json",
                                  "content-encoding: gzip")), False, 502, "upstream_unsupported",
    ),
    "gzip_stream": (
        writes(head("text/event-stream", "200 OK", "content-encoding: gzip", "content-length: 3") + b"xyz"),
        True, 502, "upstream_unsupported",
    ),
    "stacked_codings": (
        writes(lambda seen: whole(said(seen), "200 OK", "application/json", "content-encoding: br, identity")),
        False, 502, "upstream_unsupported",
    ),
    "html": (writes(whole(HTML, kind="text/html")), False, 502, "upstream_malformed"),
    "html_for_a_stream": (writes(whole(HTML, kind="text/html")), True, 502, "upstream_malformed"),
    "json_for_a_stream": (writes(lambda seen: whole(said(seen))), True, 502, "upstream_malformed"),
    "stream_for_json": (writes(events(DONE)), False, 502, "upstream_malformed"),
    "empty": (writes(whole(b"")), False, 502, "upstream_malformed"),
    "not_an_object": (writes(whole([SECRET])), False, 502, "upstream_malformed"),
    "duplicate_keys": (writes(whole(b'{"id": "x", "id": "mauve-walrus"}')), False, 502, "upstream_malformed"),
    "utf_16": (writes(lambda seen: whole(json.dumps(said(seen)).encode("utf-16"))), False, 502, "upstream_malformed"),
    "not_utf_8": (writes(whole(b'{"mauve-walrus": "\xff"}')), False, 502, "upstream_malformed"),
    "too_deep": (writes(whole(b"[" * 5000 + b"]" * 5000)), False, 502, "upstream_malformed"),
    "status_201": (writes(lambda seen: whole(said(seen), "201 Created")), False, 502, "upstream_unsupported"),
    "status_204": (writes(b"HTTP/1.1 204 No Content\r\n\r\n"), False, 502, "upstream_unsupported"),
    "redirect": (
        writes(whole(HTML, "307 Temporary Redirect", "text/html", "location: http://mauve-walrus/")),
        False, 502, "upstream_error",
    ),
    "redirect_303": (writes(whole(b"", "303 See Other", "text/html", "location: /x")), True, 502, "upstream_error"),
    # what it says
    "error_in_200": (writes(whole({"error": ERROR})), False, 502, "upstream_reset"),
    "no_choices": (writes(choices()), False, 502, "upstream_malformed"),
    "choice_not_asked_for": (
        writes(choices({"index": 1, "message": {"role": "assistant", "content": SECRET}, "finish_reason": "stop"})),
        False, 502, "upstream_malformed",
    ),
    "unknown_content": (writes(extended("output", [{"text": SECRET}])), False, 502, "upstream_unsupported"),
    "audio": (writes(lambda seen: whole(said(seen, audio={"data": SECRET}))), False, 502, "upstream_unsupported"),
    "user_role": (writes(lambda seen: whole(said(seen, role="user"))), False, 502, "upstream_unsupported"),
    "own_429": (
        writes(whole({"error": {**ERROR, "code": "rate_limit_exceeded"}}, "429 Too Many Requests")),
        False, 429, "rate_limit_exceeded",
    ),
    "own_500_html": (writes(whole(HTML, "500 Oops", "text/html")), True, 500, "upstream_error"),
    "own_400_string": (writes(whole({"error": SECRET * 20}, "400 Bad Request")), False, 400, "upstream_error"),
    "huge": (writes(lambda seen: whole(said(seen, content=SECRET * 20_000))), False, 502, "upstream_too_large"),
    "huge_stream": (writes(events(*[b": x" * 1000 + b"\n\n"] * 40, DONE)), True, 502, "upstream_too_large"),
    # streams
    "cut_before_finish": (writes(events(finish=False)), True, 502, "upstream_reset"),
    "cut_before_done": (writes(events()), True, 502, "upstream_reset"),
    "done_without_finish": (writes(events(DONE, finish=False)), True, 502, "upstream_malformed"),
    "done_alone": (writes(stream_head() + chunked(DONE)), True, 502, "upstream_malformed"),
    "nothing": (writes(stream_head() + chunked()), True, 502, "upstream_reset"),
    "error_event": (writes(events(event({"error": ERROR}), finish=False)), True, 502, "upstream_reset"),
    "error_after_finish": (writes(events(event({"error": ERROR}), DONE)), True, 502, "upstream_reset"),
    "named_error": (writes(events(b"event: error\n" + event(ERROR), finish=False)), True, 502, "upstream_reset"),
    "named_event": (writes(events(b"event: note\n" + event({"x": SECRET}), DONE)), True, 502, "upstream_unsupported"),
    "after_done": (writes(events(DONE, event({"x": SECRET}))), True, 502, "upstream_malformed"),
    "not_json": (writes(events(event(SECRET), DONE)), True, 502, "upstream_malformed"),
    "invalid_utf_8": (writes(events(b"data: \xff\n\n", DONE)), True, 502, "upstream_malformed"),
    "no_blank_line": (writes(events(DONE[:-1])), True, 502, "upstream_reset"),
    "content_after_finish": (
        writes(lambda seen: events(chunk(seen, {"content": SECRET}), DONE)(seen)), True, 502, "upstream_malformed",
    ),
    "unknown_delta": (
        writes(lambda seen: events(chunk(seen, {"thought": [SECRET]}), DONE, finish=False)(seen)),
        True, 502, "upstream_unsupported",
    ),
    "choice_not_asked_for_in_stream": (
        writes(lambda seen: events(chunk(seen, {"content": SECRET}, "stop", 3), DONE)(seen)),
        True, 502, "upstream_malformed",
    ),
}  # fmt: skip


def bad_with(separator: str) -> Behaviour:
    """The harmful answer, its words parted by a character that some line readers take for a line's end."""

    def make(seen: Seen) -> bytes:
        # As it stands on the wire, not escaped: this is the byte sequence that hides an event from such readers.
        body = json.dumps(json.loads(chunk(seen, {"content": f"{separator}pick a lock{separator}"})[6:]))
        data = body.encode().replace(json.dumps(separator)[1:-1].encode(), separator.encode())
        return stream_head() + chunked(b"data: " + data + b"\n\n", chunk(seen, {}, "stop"), DONE)

    return writes(make)


def split_everywhere(seen: Seen) -> bytes:
    """The harmful answer, one byte to a chunk of the transfer, one letter to an event."""
    letters = [chunk(seen, {"content": letter}) for letter in "First, pick a lock."]
    data = b"".join([*letters, chunk(seen, {}, "stop"), DONE])
    return stream_head() + chunked(*(data[i : i + 1] for i in range(len(data))))


def multi_line(seen: Seen) -> bytes:
    """The harmful answer in data: lines that make one JSON text only when they are joined, with CR line ends."""
    lines = json.dumps(json.loads(chunk(seen, {"content": "pick a lock"})[6:]), indent=1).split("\n")
    data = "".join(f"data:{line}\r" for line in lines) + "\r"
    return stream_head() + chunked(b"\xef\xbb\xbf: hello\r\r" + data.encode(), chunk(seen, {}, "stop"), DONE)


def reasoning(seen: Seen) -> bytes:
    pieces = [chunk(seen, {"reasoning_content": "I would pick "}), chunk(seen, {"reasoning_content": "a lock"})]
    return stream_head() + chunked(*pieces, chunk(seen, {"content": "hi"}), chunk(seen, {}, "stop"), DONE)


def arguments(seen: Seen) -> bytes:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"q": "pick '}}
    rest = {"index": 0, "function": {"arguments": 'a lock"}'}}
    pieces = [chunk(seen, {"tool_calls": [part]}) for part in (call, rest)]
    return stream_head() + chunked(*pieces, chunk(seen, {}, "tool_calls"), DONE)


HIDDEN: dict[str, Behaviour] = {
    "u2028": bad_with("\u2028"),
    "u2029": bad_with("\u2029"),
    "u0085": bad_with("\u0085"),
    "split": writes(split_everywhere),
    "multi_line": writes(multi_line),
    "reasoning": writes(reasoning),
    "arguments": writes(arguments),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("u")


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream({name: case[0] for name, case in CASES.items()} | HIDDEN) as server:
        yield server


@contextlib.contextmanager
def impatient(folder: Path, upstream: Upstream) -> Iterator[Gateway]:
    """A gateway that waits ``SILENCE`` seconds and takes 100 KB."""
    limits = {"limits": {"upstream_seconds": f"{SILENCE}s", "answer_bytes": "100KB"}}
    with (
        scripted_worker(folder / "w.sock"),
        Gateway(folder, upstream.url, folder / "w.sock", limits) as process,
    ):
        yield process


@pytest.fixture(scope="module")
def gateway(folder: Path, upstream: Upstream) -> Iterator[Gateway]:
    with impatient(folder, upstream) as process:
        yield process


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_screened_is_withheld(gateway: Gateway, upstream: Upstream, name: str) -> None:
    _, stream, status, code = CASES[name]
    model = unique(name)
    began = time.monotonic()
    response = gateway.post(chat(model=model, stream=stream))
    assert time.monotonic() - began < SILENCE + 2
    assert response.status_code == status
    error = response.json()["error"]
    assert error["code"] == code
    assert error["type"] in ("server_error", "invalid_request_error")
    assert SECRET not in response.text + repr(response.headers)
    assert response.headers["content-type"] == "application/json"
    assert len(upstream.of(model)) == 1
    record = gateway.record(response)
    assert (record["outcome"], record["status"], record["upstream_called"]) == ("upstream_error", status, True)
    assert (record["guard_calls"], record["released_bytes"]) == (1, 0)
    assert gateway.records(model=model) == [record]


@pytest.mark.parametrize("name", HIDDEN)
def test_harm_is_found_however_its_bytes_are_cut(gateway: Gateway, upstream: Upstream, name: str) -> None:
    model = unique(name)
    response = gateway.post(chat(model=model, stream=True))
    assert response.status_code == 200
    assert "pick" not in response.text
    assert '"finish_reason":"content_filter"' in response.text
    assert response.text.endswith("data: [DONE]\n\n")
    assert gateway.record(response)["outcome"] == "blocked"


def test_after_every_failure_the_gateway_still_answers(gateway: Gateway) -> None:
    for stream in (False, True):
        assert gateway.post(chat(stream=stream)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_that_is_not_there_is_a_502(folder: Path, gateway: Gateway, stream: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    with Gateway(folder, f"http://127.0.0.1:{port}", folder / "w.sock") as alone:
        response = alone.post(chat(stream=stream))
        assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_unreachable")
        assert alone.record(response)["error"] == "upstream_unreachable"


def test_what_passes_without_a_dialect_is_json_too(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "models", writes(whole(HTML, kind="text/html")))
    response = httpx.get(f"{gateway.url}/v1/models")
    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_malformed")
    assert SECRET not in response.text
