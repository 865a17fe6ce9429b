"""Request smuggling against the real server: two readers never see two requests, and every request is guarded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.support.gateway import CHAT, Gateway, Upstream, chat, eventually, scripted_worker, unique

HARMFUL = "how do I pick a lock?"


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        yield server


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("s")
    tenants = {
        "policies": {"lab": {"input": {"on_harmful": "shadow"}}},
        "tenants": {"header": "x-tenant", "match": [{"tenant": "lab", "policy": "lab"}]},
    }
    with scripted_worker(folder / "w.sock"), Gateway(folder, upstream.url, folder / "w.sock", tenants) as process:
        yield process


def body(text: str, model: str) -> bytes:
    return json.dumps(chat(text, model)).encode()


def framed(content: bytes, *headers: str, target: str = CHAT, version: str = "1.1") -> bytes:
    """A request with exactly these framing headers."""
    lines = [f"POST {target} HTTP/{version}", "host: x", "content-type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + content


def plain(content: bytes) -> bytes:
    return framed(content, f"content-length: {len(content)}", "connection: close")


def chunks(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def statuses(answer: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3})", answer)]


LENGTHS = [
    "{n}, {n}",
    "{n},0",
    "+{n}",
    "-1",
    "0x{n:x}",
    "{n}.0",
    "{n} 0",
    "{n}\x0b",
    "99999999999999999999999",
    "",
    "a",
]
CODINGS = [
    "xchunked", "chunked, identity", "chunked, xchunked", "chunked;q=1", "chunkedchunked", "\x0bchunked", "chunked\x0b",
    "'chunked'", '"chunked"', "identity", "gzip", "chunked\r\ntransfer-encoding: xchunked", "[chunked]", "",
]  # fmt: skip


@pytest.mark.parametrize("length", LENGTHS)
def test_a_length_that_is_not_one_number_is_refused(gateway: Gateway, upstream: Upstream, length: str) -> None:
    model = unique("good")
    content = body("hello", model)
    answer = gateway.raw(framed(content, f"content-length: {length.format(n=len(content))}", "connection: close"))
    assert_refused(gateway, upstream, answer, model)


@pytest.mark.parametrize("other", ["0", "{n}", "1"])
def test_two_lengths_are_refused(gateway: Gateway, upstream: Upstream, other: str) -> None:
    model = unique("good")
    content = body("hello", model)
    lengths = (f"content-length: {len(content)}", f"Content-Length: {other.format(n=len(content))}")
    for headers in (lengths, lengths[::-1]):
        assert_refused(gateway, upstream, gateway.raw(framed(content, *headers, "connection: close")), model)


@pytest.mark.parametrize("coding", CODINGS)
def test_a_transfer_coding_that_is_not_chunked_is_refused(gateway: Gateway, upstream: Upstream, coding: str) -> None:
    model = unique("good")
    content = chunks(body("hello", model))
    answer = gateway.raw(framed(content, f"transfer-encoding: {coding}", "connection: close"))
    assert_refused(gateway, upstream, answer, model)


@pytest.mark.parametrize("first", ["length", "coding"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_length_and_transfer_coding_together_are_refused(
    gateway: Gateway, upstream: Upstream, first: str, version: str
) -> None:
    """CL.TE and TE.CL: whichever a reader takes, the other's rest would be a request of its own."""
    hidden, outer = unique("good"), unique("good")
    smuggled = plain(body(HARMFUL, hidden))
    content = chunks(body("hello", outer)) + smuggled
    headers = [f"content-length: {len(content)}", "transfer-encoding: chunked"]
    if first == "coding":
        headers.reverse()
    answer = gateway.raw(framed(content, *headers, version=version))
    assert_refused(gateway, upstream, answer, outer, hidden)


@pytest.mark.parametrize(
    "headers",
    [
        ("transfer-encoding : chunked",),
        (" transfer-encoding: chunked",),
        ("x: y\r\n transfer-encoding: chunked",),
        ("x: y\rtransfer-encoding: chunked",),
        ("x: y\ntransfer-encoding: chunked",),
        ("x: y\x00\r\ntransfer-encoding: chunked",),
        ("transfer encoding: chunked",),
        ("transfer-encoding",),
        ("transfer\u00ad-encoding: chunked",),
        (": chunked",),
    ],
)
def test_headers_that_readers_could_split_otherwise_hide_no_request(
    gateway: Gateway, upstream: Upstream, headers: tuple[str, ...]
) -> None:
    hidden, outer = unique("good"), unique("good")
    content = chunks(body("hello", outer)) + plain(body(HARMFUL, hidden))
    length = len(chunks(body("hello", outer)))
    answer = gateway.raw(framed(content, f"content-length: {length}", *headers))
    assert upstream.of(hidden) == upstream.of(outer) == []
    assert 200 not in statuses(answer)


@pytest.mark.parametrize(
    "broken",
    [
        b"0x%x\r\n%b\r\n0\r\n\r\n",
        b"+%x\r\n%b\r\n0\r\n\r\n",
        b"%x \r\n%b\r\n0\r\n\r\n",
        b"%x\n%b\n0\n\n",
        b"%x\r%b\r0\r\r",
        b"%x\r\n%b\n0\r\n\r\n",
        b"%x\r\n%bXX\r\n0\r\n\r\n",
        b"%x\r\n%b0\r\n\r\n",
        b"%x;a\nb\r\n%b\r\n0\r\n\r\n",
        b"%x;a\rb\r\n%b\r\n0\r\n\r\n",
        b"1%016x\r\n%b\r\n0\r\n\r\n",
        b"-%x\r\n%b\r\n0\r\n\r\n",
        b"%x,\r\n%b\r\n0\r\n\r\n",
        b"%x\r\n%b\r\n0\n\r\n",
        b"%x\r\n%b\r\n\r\n",
        b"%x\r\n%b\r\nz\r\n\r\n",
    ],
)
def test_broken_chunks_are_refused(gateway: Gateway, upstream: Upstream, broken: bytes) -> None:
    model = unique("good")
    content = body("hello", model)
    answer = gateway.raw(framed(broken % (len(content), content), "transfer-encoding: chunked"))
    assert_refused(gateway, upstream, answer, model)


def test_what_follows_a_broken_chunk_is_no_request(gateway: Gateway, upstream: Upstream) -> None:
    hidden, outer = unique("good"), unique("good")
    first = framed(b'5\r\n{"a":XX\r\n0\r\n\r\n', "transfer-encoding: chunked")
    answer = gateway.raw(first + plain(body("hello", hidden)))
    assert_refused(gateway, upstream, answer, hidden, outer)


@pytest.mark.parametrize(
    "opening",
    [
        b"POST /v1/chat/completions\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST  /v1/chat/completions HTTP/1.1\r\nconnection: close\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1 x\r\n\r\n",
        b"POST /v1/chat/completions HTTP/9.9\r\nhost: x\r\n\r\n",
        b"post /v1/chat/completions HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT upstream:80 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x00" * 64,
    ],
)
def test_what_is_not_http_is_refused(gateway: Gateway, upstream: Upstream, opening: bytes) -> None:
    before = len(upstream.seen)
    assert statuses(gateway.raw(opening)) in ([], [400], [404], [405], [415])
    assert len(upstream.seen) == before


def test_pipelined_requests_are_each_guarded(gateway: Gateway, upstream: Upstream) -> None:
    models = [unique("good") for _ in range(4)]
    texts = ["hello", HARMFUL, "hello", HARMFUL]
    requests = [
        framed(content, f"content-length: {len(content)}", *(["connection: close"] if model == models[-1] else []))
        for model, text in zip(models, texts, strict=True)
        for content in [body(text, model)]
    ]
    assert statuses(gateway.raw(b"".join(requests))) == [200, 400, 200, 400]
    assert [len(upstream.of(model)) for model in models] == [1, 0, 1, 0]
    assert [gateway.record(model=model)["outcome"] for model in models] == ["allowed", "blocked", "allowed", "blocked"]


def test_a_request_after_close_is_not_answered(gateway: Gateway, upstream: Upstream) -> None:
    first, second = unique("good"), unique("good")
    answer = gateway.raw(plain(body("hello", first)) + plain(body("hello", second)))
    assert statuses(answer) == [200]
    assert upstream.of(second) == []


def test_a_body_that_nobody_reads_is_no_request(gateway: Gateway, upstream: Upstream) -> None:
    """The body of a refused request is dropped, not parsed as the next one."""
    hidden = unique("good")
    inner = plain(body("hello", hidden))
    last = plain(body("hello", unique("good")))
    refused = framed(inner, f"content-length: {len(inner)}", target="/v1/files")
    assert statuses(gateway.raw(refused + last)) == [404, 200]
    assert upstream.of(hidden) == []


def test_a_body_on_a_get_does_not_go_on(gateway: Gateway, upstream: Upstream) -> None:
    hidden = unique("good")
    inner = plain(body("hello", hidden))
    head = f"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(inner)}\r\n\r\n"
    assert statuses(gateway.raw(head.encode() + inner)) == [200]
    assert (upstream.seen[-1].method, upstream.seen[-1].header("content-length")) == ("GET", [])
    assert upstream.of(hidden) == []


@pytest.mark.parametrize("trailer", ["x-tenant: lab", "content-encoding: gzip", "authorization: Bearer x", "host: y"])
def test_a_trailer_is_not_a_header(gateway: Gateway, upstream: Upstream, trailer: str) -> None:
    """RFC 9110, 6.5: an auth layer in front checks headers, so a trailer must not become one behind it."""
    model = unique("good")
    content = chunks(body(HARMFUL, model))[:-2] + f"{trailer}\r\n\r\n".encode()
    answer = gateway.raw(framed(content, "transfer-encoding: chunked", "connection: close"))
    assert statuses(answer) == [400]
    record = gateway.record(model=model)
    assert (record["outcome"], record["policy"], record["tenant"]) == ("blocked", "default", None)
    assert upstream.of(model) == []


def test_a_chunked_body_is_read_whole(gateway: Gateway, upstream: Upstream) -> None:
    model, harmful = unique("good"), unique("good")
    for name, text, expected in ((model, "hello", 200), (harmful, HARMFUL, 400)):
        content = body(text, name)
        pieces = chunks(*(content[i : i + 7] for i in range(0, len(content), 7)))
        answer = gateway.raw(framed(pieces, "Transfer-Encoding: Chunked", "connection: close"))
        assert statuses(answer) == [expected]
    (seen,) = upstream.of(model)
    assert seen.header("transfer-encoding") == []
    assert upstream.of(harmful) == []


def assert_refused(gateway: Gateway, upstream: Upstream, answer: bytes, *models: str) -> None:
    """Not one of these was answered, guarded or forwarded: they were never requests."""
    assert statuses(answer) == [400]
    assert b"content_filter" not in answer
    for model in models:
        assert upstream.of(model) == []
        assert gateway.records(model=model) == []


def test_the_log_holds_what_the_upstream_saw(gateway: Gateway, upstream: Upstream) -> None:
    """Runs last: over everything above, each request that reached the upstream has its verdict in the log."""
    called = eventually(lambda: gateway.records(upstream_called=True))
    assert len(called) == len(upstream.seen)
    assert all(record["decisions"] for record in called if record["dialect"])
