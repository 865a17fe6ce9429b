"""What is read of a request, by hand; what a client gets for it is in test_middleware.py."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from guard_middleware.dialects import CHAT_COMPLETIONS
from guard_middleware.dialects.base import Headers, Options, ParsedRequest
from guard_middleware.errors import RejectKind, RequestRejected
from guard_middleware.limits import Limits
from guard_middleware.reading import ClientGone, path_of, query_of, read_body, with_media
from guard_middleware.types import Blob

JSON = (b"content-type", b"application/json")
LIMITS = Limits(body_bytes=10, body_seconds=0.05)
GONE = {"type": "http.disconnect"}


def piece(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def body(*messages: Any, headers: Headers = (JSON,)) -> bytes:
    """What comes of these messages; after the last one the client is silent."""
    waiting = list(messages)

    async def receive() -> Any:
        return waiting.pop(0) if waiting else await asyncio.Event().wait()

    return asyncio.run(read_body(headers, receive, LIMITS))


def refused(*messages: Any, headers: Headers = (JSON,)) -> RejectKind:
    with pytest.raises(RequestRejected) as caught:
        body(*messages, headers=headers)
    return caught.value.kind


def test_a_body_is_read_to_its_end_and_no_further() -> None:
    assert body(piece(b"12345", more=True), piece(b""), piece(b"more")) == b"12345"
    assert body(piece(b"1234567890")) == b"1234567890"


def test_a_client_that_leaves_before_its_body_is_whole_is_no_request() -> None:
    with pytest.raises(ClientGone):
        body(piece(b"12345", more=True), GONE)


def test_a_body_past_its_bounds_is_refused() -> None:
    assert refused(piece(b"12345", more=True), piece(b"678901", more=True)) is RejectKind.BODY_TOO_LARGE
    assert refused(piece(b"12345", more=True)) is RejectKind.BODY_TIMEOUT


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ([(b"content-length", b"11")], RejectKind.BODY_TOO_LARGE),
        ([(b"content-length", b"-1")], RejectKind.BODY_TOO_LARGE),
        ([(b"content-length", b"9" * 5000)], RejectKind.BODY_TOO_LARGE),
        ([(b"content-length", b"2"), (b"content-length", b"2")], RejectKind.INVALID_REQUEST),
        ([(b"content-encoding", b"br")], RejectKind.UNSUPPORTED_ENCODING),
        ([JSON], RejectKind.INVALID_REQUEST),
    ],
)
def test_headers_that_decide_are_read_before_any_body(extra: list[tuple[bytes, bytes]], kind: RejectKind) -> None:
    assert refused(headers=(JSON, *extra)) is kind


@pytest.mark.parametrize(
    "value", [b"application/json", b"Application/JSON ; charset=UTF-8", b'application/json;charset="utf-8"']
)
def test_json_in_utf_8_is_taken_however_it_is_written(value: bytes) -> None:
    assert body(piece(b"{}"), headers=((b"content-type", value), (b"content-encoding", b"Identity"))) == b"{}"


@pytest.mark.parametrize(
    ("query", "kept"),
    [
        (b"", b""),
        (b"api-version=2025-01-01-preview", b"api-version=2025-01-01-preview"),
        (b"model=other&api-version=1&api-version=2", b"api-version=1"),
        (b"api-version=%2e&api_version=1", b""),
        (b"api-version=" + b"1" * 41, b""),
        (b"xapi-version=1", b""),
    ],
)
def test_of_a_query_only_a_plain_api_version_passes(query: bytes, kept: bytes) -> None:
    assert query_of({"query_string": query}) == kept


def test_a_path_is_the_one_that_came_below_the_mount() -> None:
    assert path_of({"path": "/a b", "raw_path": b"/a%20b", "root_path": ""}) == b"/a%20b"
    assert path_of({"path": "/llm/v1", "root_path": "/llm"}) == b"/v1"
    assert path_of({"path": "/llmx/v1", "root_path": "/llm"}) == b"/llmx/v1"


def pictured(*urls: str) -> ParsedRequest:
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    value: Any = {"model": "m", "messages": [{"role": "user", "content": content}]}
    return CHAT_COMPLETIONS.parse_request(value, Limits(), Options())


def test_each_image_is_read_once_and_stands_wherever_it_is_named() -> None:
    asked: list[str] = []

    async def image(uri: str) -> Blob:
        asked.append(uri)
        return Blob("image/png", uri.encode())

    parsed = asyncio.run(with_media(pictured("http://a/1", "http://a/2", "http://a/1"), image, Limits()))
    assert sorted(asked) == ["http://a/1", "http://a/2"]
    assert [blob.data for blob in parsed.conversation.blobs()] == [b"http://a/1", b"http://a/2", b"http://a/1"]


def test_one_image_that_is_refused_refuses_the_request_and_ends_the_others() -> None:
    ended: list[str] = []

    async def image(uri: str) -> Blob:
        if uri.endswith("bad"):
            raise RequestRejected(RejectKind.INVALID_IMAGE, "broken")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append(uri)
            raise
        raise AssertionError

    with pytest.raises(RequestRejected) as caught:
        asyncio.run(with_media(pictured("http://a/1", "http://a/bad"), image, Limits()))
    assert caught.value.kind is RejectKind.INVALID_IMAGE
    assert ended == ["http://a/1"]


def test_more_images_than_the_limit_are_not_even_asked_for() -> None:
    async def image(uri: str) -> Blob:
        raise AssertionError

    with pytest.raises(RequestRejected) as caught:
        asyncio.run(with_media(pictured("http://a/1", "http://a/1"), image, Limits(images=1)))
    assert caught.value.kind is RejectKind.TOO_MANY_IMAGES
