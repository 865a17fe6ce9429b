from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guard_middleware.sse import Decoder, Event, SSEError, comment, encode

PIECES = st.sampled_from(
    [
        *(b"data: a", b"data:", b"data", b"event: x", b"id: 7", b"id: a\0b", b": c", b"foo: bar", b"\r", b"\n"),
        *("é😀\u2028\u0085".encode(), b"\xef\xbb\xbf", b"\xff", b" ", b":", b"retry: 3", b"\r\n", b"\n\n", b"x" * 30),
    ]
)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=30)


def decode(*chunks: bytes, limit: int = 1000) -> list[Event]:
    decoder = Decoder(max_event_bytes=limit)
    return [event for chunk in chunks for event in decoder.feed(chunk)]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\n", [Event("", "a")]),
        (b"data: a\r\rdata: b\r\r", [Event("", "a"), Event("", "b")]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [Event("", "a"), Event("", "b")]),
        (b"data: a\n\r\ndata: b\r\n\r", [Event("", "a"), Event("", "b")]),
        (b"data: a\ndata: b\ndata\n\n", [Event("", "a\nb\n")]),
        (b"data:a\n\ndata:  a\n\ndata:\ta\n\n", [Event("", "a"), Event("", " a"), Event("", "\ta")]),
        (b"data\n\n", [Event("", "")]),
        (b"data:\n\n", [Event("", "")]),
        (b"data: a: b\n\n", [Event("", "a: b")]),
        (b"event: x\ndata: a\n\ndata: b\n\n", [Event("x", "a"), Event("", "b")]),
        (b"event: x\n\ndata: b\n\n", [Event("", "b")]),
        (b"id: 1\ndata: a\n\ndata: b\n\nid\ndata: c\n\n", [Event("", "a", "1"), Event("", "b", "1"), Event("", "c")]),
        (b"id: 1\nid: 2\0\ndata: a\n\n", [Event("", "a", "1")]),
        (b": keep-alive\n\n: more\ndata: a\n\n", [Event("", "a")]),
        (b"retry: 10\nunknown: bad\nDATA: bad\n data: bad\ndata: a\n\n", [Event("", "a")]),
        (b"\xef\xbb\xbfdata: a\n\n", [Event("", "a")]),
        (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\ndata: b\n\n", [Event("", "b")]),
        (b"\n\xef\xbb\xbfdata: a\n\n", []),
        ("data: a\u2028b\u2029c\u0085d\x0b\x0c\x1ce\n\n".encode(), [Event("", "a\u2028b\u2029c\u0085d\x0b\x0c\x1ce")]),
        (b"data: [DONE]\n\ndata: late\n\n", [Event("", "[DONE]"), Event("", "late")]),
        (b"", []),
        (b"\n\n\n", []),
    ],
)
def test_streams_are_read_as_the_standard_says(stream: bytes, events: list[Event]) -> None:
    assert decode(stream) == events
    assert decode(*(stream[i : i + 1] for i in range(len(stream)))) == events


@pytest.mark.parametrize("rest", [b"data: b\n", b"data: b", b"event: x\n", b"da", b"data: \xc3", b": bye"])
def test_an_event_without_its_blank_line_never_comes_out(rest: bytes) -> None:
    assert decode(b"data: a\n\n" + rest) == [Event("", "a")]
    assert decode(rest) == decode(b"\xef\xbb") == []


def test_a_cr_dispatches_without_waiting_for_the_next_chunk() -> None:
    decoder = Decoder()
    assert decoder.feed(b"data: a\r\r") == [Event("", "a")]
    assert decoder.feed(b"\ndata: b\n") == []
    assert decoder.feed(b"") == []
    assert decoder.feed(b"\n") == [Event("", "b")]


@pytest.mark.parametrize("stream", [b"data: \xff\n\n", b"data: \xed\xa0\x80\n", b": \xc3\n", b"data: \xc3\n\xa9\n\n"])
def test_invalid_utf8_is_refused_and_the_decoder_stays_broken(stream: bytes) -> None:
    decoder = Decoder()
    with pytest.raises(SSEError):
        decoder.feed(stream)
    with pytest.raises(SSEError):
        decoder.feed(b"data: fine\n\n")


@pytest.mark.parametrize(
    "stream", [b"data: " + b"x" * 95, b"data: xxxx\n" * 11, b": " + b"x" * 99, b"event: " + b"x" * 50 + b"\ndata:" * 9]
)
def test_an_event_past_the_size_limit_is_refused(stream: bytes) -> None:
    with pytest.raises(SSEError, match="size"):
        decode(stream, limit=100)


def test_the_size_limit_is_per_event_and_ignores_comments_between_them() -> None:
    stream = (b": " + b"x" * 90 + b"\n") * 50 + b"data: " + b"x" * 94 + b"\n\n"
    assert decode(stream * 3, limit=100) == [Event("", "x" * 94)] * 3


def test_one_byte_chunks_of_a_long_line_cost_linear_time() -> None:
    decoder = Decoder()
    start = time.perf_counter()
    for _ in range(200_000):
        decoder.feed(b"x")
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("data", "event"),
    [("a\rb", None), (b"a\r\n", None), ("a", "x\ny"), ("a", "x\ry"), ("\ud800", None), (b"\xff", None)],
)
def test_what_would_forge_a_line_is_not_encoded(data: str | bytes, event: str | None) -> None:
    with pytest.raises(SSEError):
        encode(data, event)


def test_comments_are_one_line_and_invisible() -> None:
    assert decode(comment("guard pending"), encode("a")) == [Event("", "a")]
    for text in ("a\ndata: x", "a\rdata: x"):
        with pytest.raises(SSEError):
            comment(text)


def test_encoding_gives_the_lines_that_clients_expect() -> None:
    assert encode(b'{"a":1}') == b'data: {"a":1}\n\n'
    assert encode("a\nb", "message_start") == b"event: message_start\ndata: a\ndata: b\n\n"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT.filter(lambda name: "\n" not in name)), max_size=5))
def test_encoding_then_decoding_is_the_identity(pairs: list[tuple[str, str]]) -> None:
    stream = b"".join(encode(data, event) for data, event in pairs)
    assert decode(stream) == [Event(event, data) for data, event in pairs]


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=14).map(b"".join), st.lists(st.integers(0, 120), max_size=8))
@example(b"data: a\r\n\r\n", [8, 10])
def test_how_a_stream_is_cut_never_changes_its_events(stream: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    assert outcome([stream]) == outcome([stream[a:b] for a, b in pairwise(edges)])


def outcome(chunks: list[bytes]) -> list[Event] | str:
    try:
        return decode(*chunks, limit=60)
    except SSEError as error:
        return str(error)
