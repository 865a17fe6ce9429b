"""The forwarding application against a real server: what goes out, what comes back, and which error a fault is."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from guard_middleware.errors import ConfigError, UpstreamError, UpstreamErrorKind
from guard_middleware.upstream import UpstreamApp
from tests.support.gateway import CHAT, GOOD, Seen, Upstream, chat, eventually, whole


async def redirects(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(whole(b"", "302 Found", "text/plain", "location: /elsewhere", "set-cookie: a=1"))


async def hangs(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if not await reader.read(1):
        raise ConnectionResetError


async def drips(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Slower than the silence allowed in all, never in one gap."""
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 8\r\n\r\n")
    for _ in range(8):
        writer.write(b".")
        await writer.drain()
        await asyncio.sleep(0.1)


HUNG_UP = threading.Semaphore(0)


async def hangs_up(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A whole answer that promises to keep the connection, and does not."""
    writer.write(whole({"ok": True}))
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    HUNG_UP.release()


async def coded(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(whole(b"\x1f\x8b not really gzip", "200 OK", "application/json", "content-encoding: gzip"))


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    more = {"redirects": redirects, "hangs": hangs, "drips": drips, "hangs_up": hangs_up, "coded": coded}
    with Upstream(more) as server:
        yield server


def scope(method: str = "POST", path: str = CHAT, query: bytes = b"", *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "headers": [(b"host", b"gateway"), *headers],
    }


async def send(app: UpstreamApp, asked: dict[str, Any], body: bytes = b"") -> list[Any]:
    """The messages that come back; headers by name in the first."""
    pieces = [body[:5], body[5:]] if body else [b""]
    messages: list[Any] = []

    async def receive() -> Any:
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def sent(message: Any) -> None:
        messages.append(message)

    await app(asked, receive, sent)
    return messages


def ask(url: str, *requests: tuple[dict[str, Any], bytes], **options: Any) -> list[list[Any]]:
    async def run() -> list[list[Any]]:
        app = UpstreamApp(url, **options)
        try:
            return [await send(app, *request) for request in requests]
        finally:
            await app.aclose()

    return asyncio.run(run())


def body(model: str) -> bytes:
    return json.dumps(chat(model=model)).encode()


def content(messages: list[Any]) -> bytes:
    return b"".join(message.get("body", b"") for message in messages[1:])


@pytest.mark.parametrize(
    ("suffix", "target"),
    [("", CHAT), ("/", CHAT), ("/v1", CHAT), ("/v1/", CHAT), ("/api", f"/api{CHAT}"), ("/api/v1", f"/api{CHAT}")],
)
def test_a_base_with_or_without_v1_leads_to_the_same_place(upstream: Upstream, suffix: str, target: str) -> None:
    (messages,) = ask(upstream.url + suffix, (scope(), body("good")))
    assert messages[0]["status"] == 200
    assert json.loads(content(messages))["choices"][0]["message"]["content"] == GOOD
    assert messages[-1]["more_body"] is False
    assert (upstream.seen[-1].target, upstream.seen[-1].body) == (target, body("good"))


def test_the_query_goes_on_and_a_get_has_no_body(upstream: Upstream) -> None:
    (messages,) = ask(upstream.url, (scope("GET", "/v1/models", b"api-version=1"), b""))
    assert messages[0]["status"] == 200
    seen = upstream.seen[-1]
    assert (seen.method, seen.target, seen.header("content-length")) == ("GET", "/v1/models?api-version=1", [])


def test_the_host_is_the_upstreams_and_nothing_is_added(upstream: Upstream) -> None:
    ask(
        upstream.url,
        (
            scope("POST", CHAT, b"", (b"x-a", b"1"), (b"x-a", b"2"), (b"content-length", b"%d" % len(body("good")))),
            body("good"),
        ),
    )
    seen = upstream.seen[-1]
    assert seen.header("host") == [upstream.url.removeprefix("http://")]
    assert seen.header("x-a") == ["1", "2"]
    assert {name for name, _ in seen.headers} == {"host", "x-a", "content-length", "accept-encoding"}
    assert seen.header("accept-encoding") == ["identity"]


def test_the_operators_headers_replace_the_clients(upstream: Upstream) -> None:
    asked = scope(
        "POST", CHAT, b"", (b"authorization", b"Bearer client"), (b"content-length", b"%d" % len(body("good")))
    )
    ask(upstream.url, (asked, body("good")), headers={"Authorization": "Bearer operator"})
    assert upstream.seen[-1].header("authorization") == ["Bearer operator"]


def test_redirects_cookies_and_codings_are_left_as_they_are(upstream: Upstream) -> None:
    before = len(upstream.seen)
    moved, coding = ask(upstream.url, (scope(), body("redirects")), (scope(), body("coded")))
    assert moved[0]["status"] == 302
    assert len(upstream.seen) == before + 2
    assert upstream.seen[-1].header("cookie") == []
    assert content(coding) == b"\x1f\x8b not really gzip"


def test_proxy_variables_of_the_environment_do_not_lead_elsewhere(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    (messages,) = ask(upstream.url, (scope(), body("good")))
    assert messages[0]["status"] == 200


def test_a_connection_that_was_closed_while_idle_is_not_used_again(upstream: Upstream) -> None:
    async def run() -> list[int]:
        app = UpstreamApp(upstream.url)
        answers = []
        for _ in range(5):
            answers.append(await send(app, scope(), body("hangs_up")))
            assert await asyncio.to_thread(HUNG_UP.acquire, timeout=5)
        await app.aclose()
        return [answer[0]["status"] for answer in answers]

    assert asyncio.run(run()) == [200] * 5


def test_silence_is_measured_between_bytes(upstream: Upstream) -> None:
    (messages,) = ask(upstream.url, (scope(), body("drips")), silence=0.4)
    assert content(messages) == b"........"


def test_silence_is_a_timeout(upstream: Upstream) -> None:
    with pytest.raises(UpstreamError) as caught:
        ask(upstream.url, (scope(), body("hangs")), silence=0.1)
    assert caught.value.kind is UpstreamErrorKind.TIMEOUT


def test_a_server_that_does_not_read_is_a_timeout() -> None:
    """The body is larger than the sockets' buffers, so that sending it is what never ends."""

    async def run(deaf: socket.socket) -> UpstreamErrorKind:
        app = UpstreamApp(f"http://127.0.0.1:{deaf.getsockname()[1]}", silence=0.3)
        with pytest.raises(UpstreamError) as caught:
            await send(app, scope(), b" " * 16 * 1024 * 1024)
        deaf.close()
        await app.aclose()
        await asyncio.sleep(0.1)  # the transport ends when the kernel says that its peer is gone
        return caught.value.kind

    assert asyncio.run(run(socket.create_server(("127.0.0.1", 0)))) is UpstreamErrorKind.TIMEOUT


def test_a_large_body_goes_on_whole(upstream: Upstream) -> None:
    large = json.dumps(chat("x" * 3_000_000)).encode()
    (messages,) = ask(upstream.url, (scope(), large))
    assert messages[0]["status"] == 200
    seen = upstream.seen[-1]
    assert seen.body == large
    assert seen.header("content-length") == [str(len(large))]
    assert seen.header("transfer-encoding") == []


@pytest.mark.parametrize("host", ["127.0.0.1", "guard-middleware.invalid"])
def test_nobody_there_is_unreachable(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    with pytest.raises(UpstreamError) as caught:
        ask(f"http://{host}:{port}", (scope(), body("good")))
    assert caught.value.kind is UpstreamErrorKind.UNREACHABLE


def test_a_server_that_speaks_no_tls_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.recv(1)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(UpstreamError) as caught:
            ask(f"https://127.0.0.1:{server.getsockname()[1]}", (scope(), body("good")))
        thread.join()
    assert caught.value.kind is UpstreamErrorKind.UNREACHABLE


def test_cancelling_hangs_up(upstream: Upstream) -> None:
    async def run() -> None:
        app = UpstreamApp(upstream.url)
        before = len(upstream.seen)
        task = asyncio.create_task(send(app, scope(), body("hangs")))
        while len(upstream.seen) == before:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await app.aclose()

    before = upstream.abandoned.count("hangs")
    asyncio.run(run())
    eventually(lambda: upstream.abandoned.count("hangs") > before, seconds=3)


@pytest.mark.parametrize("url", ["api.example.com", "ftp://x", "http://", "http://x?y", "http://x#y", "unix:/x", ""])
def test_what_is_no_url_stops_the_start(url: str) -> None:
    with pytest.raises(ConfigError, match=r"write it like https://"):
        UpstreamApp(url)
