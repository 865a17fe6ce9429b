"""The frame between gateway and worker: what goes in comes out, and nothing else is accepted."""

from __future__ import annotations

import contextlib
import json
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.types import (
    Blob,
    Conversation,
    Definition,
    Judging,
    Message,
    Reasoning,
    Text,
    ToolCall,
    ToolCallResponse,
    Uri,
    Usage,
    Verdict,
)
from guard_middleware.wire import (
    ModerationRequest,
    WireError,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
parts = st.one_of(
    st.builds(Text, texts),
    st.builds(Reasoning, texts),
    st.builds(ToolCall, texts, texts, texts),
    st.builds(ToolCallResponse, texts, texts),
    st.builds(Blob, st.sampled_from(["image/png", "image/jpeg"]), st.binary(max_size=40)),
)
messages = st.builds(
    Message,
    st.sampled_from(["system", "user", "assistant", "tool"]),
    st.lists(parts, max_size=4).map(tuple),
    st.none() | texts,
)
scores = st.floats(0, 1)
judgings = st.one_of(
    st.sampled_from([Judging(), Judging("label")]),
    st.tuples(scores, scores).filter(lambda pair: pair[0] < pair[1]).map(lambda pair: Judging("hybrid", *pair)),
)
requests = st.builds(
    ModerationRequest,
    texts,
    st.builds(
        Conversation,
        st.lists(messages, max_size=4).map(tuple),
        st.lists(st.builds(Definition, texts, texts), max_size=2).map(tuple),
        st.none() | messages,
    ),
    st.sampled_from(["input", "output"]),
    st.floats(0.001, 100),
    st.sampled_from([None, True, False]),
    st.none() | texts,
    judgings,
)
verdicts = st.builds(
    Verdict,
    st.sampled_from(["harmful", "unharmful"]),
    st.none(),
    scores,
    st.none(),
    texts,
    st.builds(Usage, st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)),
    texts,
    texts,
    st.lists(texts, max_size=3).map(tuple),
    st.lists(texts, max_size=3).map(tuple),
    st.lists(st.tuples(texts, st.floats(0, 9)), max_size=3).map(tuple),
    judging=judgings,
    thought=st.booleans(),
    ignored=st.lists(texts, max_size=2).map(tuple),
)


@settings(max_examples=100)
@given(requests)
def test_a_request_comes_out_as_it_went_in(request: ModerationRequest) -> None:
    assert decode_request(encode_request(request)) == request


@settings(max_examples=100)
@given(texts, verdicts)
def test_a_verdict_comes_out_as_it_went_in(id: str, verdict: Verdict) -> None:
    assert decode_answer(encode_answer(id, verdict)) == (id, verdict)


@pytest.mark.parametrize("kind", list(GuardErrorKind))
def test_an_error_comes_out_as_it_went_in(kind: GuardErrorKind) -> None:
    id, error = decode_answer(encode_answer("q", GuardError(kind, "why", retry_after=1.5)))
    assert isinstance(error, GuardError)
    assert (id, error.kind, error.message, error.retry_after) == ("q", kind, "why", 1.5)


def test_media_by_reference_is_never_sent() -> None:
    conversation = Conversation((Message("user", (Uri("http://example.com/a.png"),)),))
    with pytest.raises(WireError):
        encode_request(ModerationRequest("q", conversation, "input", 1.0))


@settings(max_examples=150)
@given(requests, st.data())
def test_a_damaged_frame_raises_only_wire_error(request: ModerationRequest, data: st.DataObject) -> None:
    frame = bytearray(encode_request(request))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(WireError):
        decode_request(bytes(frame[: data.draw(st.integers(0, len(frame)))]))


def frame(blobs: bytes = b"", **changes: Any) -> bytes:
    header = {
        "id": "q",
        "source": "input",
        "deadline": 1.0,
        "reader": None,
        "traceparent": None,
        "judging": ["hybrid", 0.1, 0.9],
        "messages": [["user", None, [["text", "hi"]]]],
        "definitions": [],
        "answer": None,
        "blobs": [],
        **changes,
    }
    head = json.dumps(header).encode()
    return struct.pack(">I", len(head)) + head + blobs


def test_the_frame_of_this_table_is_a_good_one() -> None:
    assert decode_request(frame()).conversation.messages[0].parts == (Text("hi"),)


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"\0\0\0",
        b"\xff\xff\xff\xff{}",
        frame()[:-1],
        frame() + b"x",
        frame(blobs=b"abc", blobs_=1),
        frame(source="both"),
        frame(id=1),
        frame(deadline="soon"),
        frame(deadline=None),
        frame(messages=[["root", None, []]]),
        frame(messages=[["user", 1, []]]),
        frame(messages=[["user", None, [["video", "x"]]]]),
        frame(messages=[["user", None, [["text", 1]]]]),
        frame(messages=[["user", None, [["blob", "image/png", 0]]]]),
        frame(messages=[["user", None, [["blob", "image/png", -1]]]]),
        frame(messages={}),
        frame(definitions=[["tool"]]),
        frame(answer=["user"]),
        frame(judging=None),
        frame(judging=["reason"]),
        frame(judging=["guess", 0.0, 1.0]),
        frame(judging=[["reason"], 0.0, 1.0]),
        frame(judging=["label", 0.1, 0.9]),
        frame(judging=["hybrid", 0.9, 0.1]),
        frame(judging=["hybrid", -0.1, 0.9]),
        frame(judging=["hybrid", "0.1", 0.9]),
        frame(judging=["hybrid", False, 0.9]),
        frame(judging=["hybrid", float("nan"), 0.9]),
        struct.pack(">I", 2) + b"[]",
    ],
)
def test_a_malformed_frame_is_refused(bad: bytes) -> None:
    with pytest.raises(WireError):
        decode_request(bad)


def answer(**changes: Any) -> str:
    verdict = {
        "request": "harmful",
        "response": None,
        "request_score": 0.9,
        "response_score": None,
        "reasoning": "why",
        "usage": [1, 2, 3],
        "model": "m",
        "revision": "r",
        "categories": [],
        "drawn_text": [],
        "timings": [],
        "judging": ["reason", 0, 1],
        "thought": True,
        **changes,
    }
    return json.dumps({"id": "q", "verdict": verdict})


def test_the_answer_of_this_table_is_a_good_one() -> None:
    assert isinstance(decode_answer(answer())[1], Verdict)


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "[]",
        "{}",
        '{"id": "q"}',
        '{"id": 1, "verdict": {}}',
        '{"id": "q", "verdict": {}, "error": {}}',
        '{"id": "q", "error": {"kind": "tired", "message": "", "retry_after": null}}',
        answer(request="safe"),
        answer(request=None),
        answer(response="maybe"),
        answer(response="harmful"),
        answer(response_score=0.5),
        answer(request_score=1.5),
        answer(request_score="high"),
        answer(request_score=None),
        answer(reasoning=None),
        answer(usage=[1]),
        answer(categories=[1]),
        answer(timings=[["a"]]),
        answer(judging=["guess", 0, 1]),
        answer(judging=None),
    ],
)
def test_an_answer_that_is_not_exactly_one_outcome_is_refused(bad: str) -> None:
    with pytest.raises(WireError):
        decode_answer(bad)
