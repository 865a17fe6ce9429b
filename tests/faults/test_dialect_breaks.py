"""The same upstream that breaks, lies or stalls, in the other dialects: their own error, one record, no byte of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.test_upstream_breaks import HTML, SECRET, SILENCE, impatient, writes
from tests.support.gateway import (
    GOOD,
    PATIENCE,
    Behaviour,
    Gateway,
    Upstream,
    chunked,
    head,
    stream_head,
    unique,
    whole,
)
from tests.support.shapes import BREAD, DONE, SHAPES, Shape

SAID = f"{SECRET} {GOOD}"
OTHERS = [name for name in SHAPES if name != "chat_completions"]
Make = Callable[[Shape], bytes]


def _json(shape: Shape) -> bytes:
    return json.dumps(shape.answer(SAID)).encode()


def begun(shape: Shape) -> bytes:
    return head("application/json", "200 OK", "content-length: 5000") + _json(shape)


def answered(**change: Any) -> Make:
    return lambda shape: whole({**shape.answer(SAID), **change})


def streamed(*after: bytes, ended: bool = False, end: bool = True, usage: Any = None) -> Make:
    """A stream that says the secret, comes to its end where it should, and then these bytes."""

    def make(shape: Shape) -> bytes:
        told = [shape.opening(), shape.says(SAID), *([shape.ending(SAID, usage)] if ended else []), *after]
        return stream_head() + chunked(*told, end=end)

    return make


#: name -> (what is written, what follows it, streamed, status, code)
BREAKS: dict[str, tuple[Make, str, bool, int, str]] = {
    "resets_at_once": (lambda _: b"", "reset", False, 502, "upstream_reset"),
    "ends_in_body": (begun, "close", False, 502, "upstream_reset"),
    "resets_in_body": (begun, "reset", False, 502, "upstream_reset"),
    "silent": (lambda _: b"", "hang", False, 504, "upstream_timeout"),
    "silent_in_body": (begun, "hang", False, 504, "upstream_timeout"),
    "html": (lambda _: whole(HTML, kind="text/html"), "", False, 502, "upstream_malformed"),
    "not_json": (lambda shape: whole(_json(shape)[:-1]), "", False, 502, "upstream_malformed"),
    "after_the_object": (lambda shape: whole(_json(shape) + b"{}"), "", False, 502, "upstream_malformed"),
    "stream_for_json": (streamed(ended=True), "", False, 502, "upstream_malformed"),
    "unknown_content": (answered(note=[{"text": SECRET}]), "", False, 502, "upstream_unsupported"),
    "own_429": (
        lambda _: whole({"error": {"message": SECRET, "code": "rate_limit_exceeded"}}, "429 Too Many Requests"),
        "", False, 429, "rate_limit_exceeded",
    ),
    "huge": (lambda shape: whole(shape.answer(SAID * 5000)), "", False, 502, "upstream_too_large"),
    "resets_in_stream": (streamed(end=False), "reset", True, 502, "upstream_reset"),
    "resets_after_the_end": (streamed(ended=True, end=False), "reset", True, 502, "upstream_reset"),
    "silent_in_stream": (streamed(end=False), "hang", True, 504, "upstream_timeout"),
    "bad_chunk": (lambda _: stream_head() + b"zz\r\nmauve-walrus\r\n0\r\n\r\n", "close", True, 502, "upstream_reset"),
    "json_for_a_stream": (answered(), "", True, 502, "upstream_malformed"),
    "no_events": (lambda _: stream_head() + chunked(), "", True, 502, "upstream_reset"),
    "no_end": (streamed(), "", True, 502, "upstream_reset"),
    "done_before_the_end": (streamed(DONE), "", True, 502, "upstream_malformed"),
    "malformed_event": (streamed(b"data: {\n\n"), "", True, 502, "upstream_malformed"),
    "duplicate_keys": (streamed(b'data: {"type": "x", "type": "y"}\n\n'), "", True, 502, "upstream_malformed"),
    "invalid_utf_8": (streamed(b"data: \xff\n\n"), "", True, 502, "upstream_malformed"),
    "unknown_event": (
        streamed(b'event: note\ndata: {"type": "note", "x": "mauve-walrus"}\n\n'),
        "", True, 502, "upstream_unsupported",
    ),
    "error_event": (lambda shape: streamed(shape.error_event)(shape), "", True, 502, "upstream_reset"),
    "text_after_the_end": (
        lambda shape: streamed(shape.says(SECRET), ended=True)(shape), "", True, 502, "upstream_malformed",
    ),
    "second_end": (
        lambda shape: streamed(shape.ending(SAID), ended=True)(shape), "", True, 502, "upstream_malformed",
    ),
    "huge_stream": (streamed(b": x" * 40_000 + b"\n\n"), "", True, 502, "upstream_too_large"),
}  # fmt: skip
USAGE = {"input_tokens": SECRET, "output_tokens": SECRET, "prompt_tokens": SECRET, "more": [SECRET]}


def _spoken(usage: Any = None) -> Make:
    return lambda shape: stream_head() + chunked(shape.opening(), shape.says(GOOD), shape.ending(GOOD, usage))


#: what passes
SOUND: dict[str, tuple[Make, str]] = {
    "good": (_spoken(), ""),
    "usage": (lambda shape: whole(shape.answer(GOOD, USAGE)), ""),
    "usage_stream": (_spoken(USAGE), ""),
}


def _behaviour(make: Make, then: str, shape: Shape) -> Behaviour:
    return writes(lambda seen: make(shape), **({then: True} if then else {}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("d")


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    told = {
        f"{name}-{dialect}": _behaviour(make, then, shape)
        for dialect, shape in SHAPES.items()
        for name, (make, then) in {**{name: case[:2] for name, case in BREAKS.items()}, **SOUND}.items()
    }
    with Upstream(told) as server:
        yield server


@pytest.fixture(scope="module")
def gateway(folder: Path, upstream: Upstream) -> Iterator[Gateway]:
    with impatient(folder, upstream) as process:
        yield process


def post(gateway: Gateway, shape: Shape, model: str, stream: bool, text: str = BREAD) -> httpx.Response:
    url, body = f"{gateway.url}{shape.path}", shape.asked(model, stream, text)
    return httpx.post(url, json=body, timeout=PATIENCE, trust_env=False)


@pytest.mark.parametrize("dialect", OTHERS)
@pytest.mark.parametrize("name", BREAKS)
def test_what_cannot_be_screened_is_withheld(gateway: Gateway, upstream: Upstream, name: str, dialect: str) -> None:
    _, _, stream, status, code = BREAKS[name]
    shape, model = SHAPES[dialect], unique(f"{name}-{dialect}")
    began = time.monotonic()
    response = post(gateway, shape, model, stream)
    assert time.monotonic() - began < SILENCE + 2
    assert response.status_code == status
    assert shape.code(response.json()) == code
    assert SECRET not in response.text + repr(response.headers)
    assert response.headers["content-type"] == "application/json"
    assert len(upstream.of(model)) == 1
    record = gateway.record(response)
    assert (record["outcome"], record["status"], record["upstream_called"]) == ("upstream_error", status, True)
    assert (record["guard_calls"], record["released_bytes"]) == (1, 0)
    assert gateway.records(model=model) == [record]


@pytest.mark.parametrize("dialect", SHAPES)
@pytest.mark.parametrize("name", ["usage", "usage_stream"])
def test_words_in_the_place_of_token_counts_are_dropped(gateway: Gateway, name: str, dialect: str) -> None:
    shape, stream = SHAPES[dialect], name == "usage_stream"
    response = post(gateway, shape, unique(f"{name}-{dialect}"), stream)
    assert response.status_code == 200
    assert SECRET not in response.text
    assert (shape.text(response.content) if stream else response.text).count(GOOD) == 1
    record = gateway.record(response)
    assert (record["outcome"], record["guard_calls"]) == ("allowed", 2)


@pytest.mark.parametrize("dialect", SHAPES)
def test_a_stream_that_is_held_shows_signs_of_life_and_then_its_text(
    folder: Path, upstream: Upstream, gateway: Gateway, dialect: str
) -> None:
    shape = SHAPES[dialect]
    held = {"policies": {"p": {"output": {"stream": {"mode": "hold", "keep_alive": "50ms"}}}}, "default_policy": "p"}
    with Gateway(folder, upstream.url, folder / "w.sock", held) as holding:
        response = post(holding, shape, unique(f"good-{dialect}"), True, f"[wait 0.4] {BREAD}")
        record = holding.record(response)
    assert response.status_code == 200
    assert response.content.count(shape.keep_alive) >= 3
    before, _, after = response.content.rpartition(shape.keep_alive)
    assert (shape.text(before), shape.text(after)) == ("", GOOD)
    assert shape.last in after
    assert (record["outcome"], record["stream_ending"]) == ("allowed", "released")
    assert record["released_bytes"] == len(response.content.replace(shape.keep_alive, b""))
