from __future__ import annotations

import asyncio
import ipaddress
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from guard_middleware.errors import RejectKind, RequestRejected
from guard_middleware.fetch import Fetcher, is_public
from guard_middleware.limits import Limits

LIMITS = replace(Limits(), fetch_seconds=1.0, image_bytes=10_000)
OK = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"

# An audit hook cannot be taken off again, so there is one, and it is deaf but for `sockets()`.
_events: list[tuple[str, Any]] = []
_listening = False


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _listening and event in ("socket.__new__", "socket.connect", "socket.getaddrinfo"):
        _events.append((event, args))


sys.addaudithook(_audit)


@pytest.fixture
def events() -> list[tuple[str, Any]]:
    """What was done with sockets while a test's `fetch` ran."""
    _events.clear()
    return _events


def fetch(uri: str, limits: Limits = LIMITS, **options: Any) -> bytes:
    async def main() -> bytes:
        global _listening
        fetcher = Fetcher(limits, **options)
        try:
            _listening = True
            return await fetcher.fetch(uri)
        finally:
            _listening = False
            fetcher.close()

    return asyncio.run(main())


def refused(uri: str, limits: Limits = LIMITS, **options: Any) -> RejectKind:
    with pytest.raises(RequestRejected) as info:
        fetch(uri, limits, **options)
    return info.value.kind


def resolver(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Every lookup gives the next answer; returns the names that were looked up."""
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, *_args: Any, **_options: Any) -> list[Any]:
        asked.append(host)
        addresses = answers[min(len(asked), len(answers)) - 1]
        return [(socket.AF_INET6 if ":" in a else socket.AF_INET, 1, 6, "", (a, port)) for a in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


# --- where a URL may lead -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        *("http://127.0.0.1/", "http://127.8.8.8/", "http://0.0.0.0/", "http://10.0.0.1/", "http://172.16.0.1/"),
        *("http://192.168.1.1/", "http://169.254.169.254/latest/meta-data/", "http://100.64.0.1/", "http://224.0.0.1/"),
        *("http://255.255.255.255/", "http://240.0.0.1/", "http://198.18.0.1/", "http://192.0.2.1/", "http://[::1]/"),
        *("http://[::]/", "http://[::ffff:127.0.0.1]/", "http://[::ffff:7f00:1]/", "http://[::127.0.0.1]/"),
        *("http://[fe80::1]/", "http://[fc00::1]/", "http://[fec0::1]/", "http://[ff02::1]/", "http://[2001:db8::1]/"),
        *("http://[64:ff9b::127.0.0.1]/", "http://[64:ff9b::a9fe:a9fe]/", "http://[64:ff9b:1::8.8.8.8]/"),
        *("http://[2002:7f00:1::]/", "http://[2002:a00:1::1]/", "http://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/"),
        *("http://0x7f000001/", "http://2130706433/", "http://127.1/", "http://0177.0.0.1/", "file:///etc/passwd"),
        *("http://ok\\@127.0.0.1/", "http://ok@127.0.0.1/", " http://example.com/", "http://[fe80::1%25lo]/"),
        *("http://93.184.216.34:22/", "http://93.184.216.34:8080/", "https://example.com:6379/", "data:image/png,x"),
    ],
)
def test_a_forbidden_url_opens_no_socket(uri: str, events: list[tuple[str, Any]]) -> None:
    assert refused(uri) is RejectKind.FORBIDDEN_URL
    assert events == []


def test_the_socket_spy_sees_a_connection(events: list[tuple[str, Any]]) -> None:
    assert refused("http://127.0.0.1:1/", allow=frozenset({"127.0.0.1:1"})) is RejectKind.IMAGE_FETCH_FAILED
    assert ("socket.connect", ("127.0.0.1", 1)) in [(name, args[-1]) for name, args in events]


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["93.184.216.34", "127.0.0.1"],
        ["93.184.216.34", "2606:4700::1111", "::ffff:10.0.0.1"],
        ["169.254.169.254"],
        ["64:ff9b::a00:1"],
        ["fe80::1%2"],
        [],
    ],
)
def test_a_name_with_any_address_that_is_not_public_is_forbidden(
    addresses: list[str], events: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = resolver(monkeypatch, addresses)
    assert refused("http://images.test/") is RejectKind.FORBIDDEN_URL
    assert asked == ["images.test"]
    assert events == []


def test_a_name_that_does_not_resolve_is_refused_in_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_args: Any, **_options: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    messages = []
    for lookup in (unknown, lambda *_args, **_options: [(2, 1, 6, "", ("10.0.0.1", 80))]):
        monkeypatch.setattr(socket, "getaddrinfo", lookup)
        with pytest.raises(RequestRejected) as info:
            fetch("http://images.test/")
        messages.append((info.value.kind, info.value.message))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    "address",
    ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "64:ff9b::8.8.8.8", "::ffff:8.8.8.8", "2002:808:808::1"],
)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_a_name_that_rebinds_is_connected_at_the_checked_address_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = resolver(monkeypatch, ["93.184.216.34", "2606:4700::1111"], ["127.0.0.1"])
    connected: list[tuple[str, int]] = []

    async def connect_tcp(remote_host: str, remote_port: int, **_options: Any) -> None:
        connected.append((remote_host, remote_port))
        raise OSError("refused")

    monkeypatch.setattr(anyio, "connect_tcp", connect_tcp)
    assert refused("http://images.test/") is RejectKind.IMAGE_FETCH_FAILED
    assert asked == ["images.test"]
    assert connected == [("93.184.216.34", 80), ("2606:4700::1111", 80)]


# --- real servers on the loopback interface -----------------------------------------------------------------------


@dataclass
class Server:
    """Answers the n-th connection with ``answers[n]`` (the last one again); keeps the requests."""

    answers: list[bytes]
    port: int = 0
    requests: list[bytes] = field(default_factory=list)


@asynccontextmanager
async def serve(server: Server, host: str = "127.0.0.1", **options: Any) -> AsyncIterator[None]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server.requests.append(await reader.readuntil(b"\r\n\r\n"))
            for i, piece in enumerate(server.answers[min(len(server.requests), len(server.answers)) - 1].split(b"~")):
                await asyncio.sleep(0.1 if i else 0)
                writer.write(piece)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(answer, host, server.port, **options)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield
    finally:
        listener.close()
        await asyncio.sleep(0.01)


def visit(
    server: Server,
    ask: Callable[[Fetcher], Awaitable[bytes]] | None = None,
    *,
    uri: str = "http://127.0.0.1:{}/a.png",
    limits: Limits = LIMITS,
    tls: ssl.SSLContext | None = None,
    **options: Any,
) -> bytes:
    async def main() -> bytes:
        async with serve(server, **options):
            allow = frozenset({f"127.0.0.1:{server.port}", f"images.test:{server.port}", f"other.test:{server.port}"})
            fetcher = Fetcher(limits, allow=allow, tls=tls)
            try:
                return await (ask(fetcher) if ask else fetcher.fetch(uri.format(server.port)))
            finally:
                fetcher.close()

    return asyncio.run(main())


def visit_refused(server: Server, **options: Any) -> RejectKind:
    with pytest.raises(RequestRejected) as info:
        visit(server, **options)
    assert str(server.port) not in info.value.message
    return info.value.kind


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Content-Length: 5\r\n\r\nbytes",
        OK + b"\r\nbytes",
        OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nbyt\r\n2\r\nes\r\n0\r\n\r\n",
        OK.replace(b"image/png", b"IMAGE/webp; x=y")
        + b"Content-Encoding: identity\r\nContent-Length: 5\r\n\r\n~byt~es",
    ],
)
def test_an_image_is_fetched(answer: bytes) -> None:
    assert visit(Server([answer])) == b"bytes"


def test_an_image_is_fetched_once_and_a_second_answer_is_never_seen() -> None:
    server = Server([OK + b"Content-Length: 5\r\n\r\nfirst", OK + b"Content-Length: 6\r\n\r\nsecond"])
    assert visit(server) == b"first"
    assert len(server.requests) == 1


def test_the_request_names_the_host_and_holds_the_target_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver(monkeypatch, ["127.0.0.1"])
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1/")
    server = Server([OK + b"\r\nbytes"])
    assert visit(server, uri="http://Images.test:{}/a/../%7Eb'[x]?q=%20&r=/#top") == b"bytes"
    line, *headers = server.requests[0].decode().lower().split("\r\n")
    assert line == "get /a/../%7eb'[x]?q=%20&r=/ http/1.1"
    assert f"host: images.test:{server.port}" in headers
    assert "accept-encoding: identity" in headers
    assert not any(header.startswith(("cookie", "authorization", "referer")) for header in headers)


def test_a_resolver_that_changes_its_mind_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = resolver(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
    good, evil = Server([OK + b"\r\ngood"]), Server([OK + b"\r\nevil"])

    async def ask(fetcher: Fetcher) -> bytes:
        evil.port = good.port
        async with serve(evil, "127.0.0.2"):
            return await fetcher.fetch(f"http://images.test:{good.port}/")

    assert visit(good, ask) == b"good"
    assert asked == ["images.test"]
    assert evil.requests == []


def test_the_next_address_is_tried_when_one_refuses_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver(monkeypatch, ["127.0.0.3", "127.0.0.1"])
    server = Server([OK + b"\r\nbytes"])
    assert visit(server, uri="http://images.test:{}/") == b"bytes"
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_refused(status: int) -> None:
    server = Server([b"", OK + b"\r\nbytes"])

    async def ask(fetcher: Fetcher) -> bytes:
        location = f"http://127.0.0.1:{server.port}/b.png"
        server.answers[0] = f"HTTP/1.1 {status} X\r\nContent-Type: image/png\r\nLocation: {location}\r\n\r\nx".encode()
        return await fetcher.fetch(f"http://127.0.0.1:{server.port}/a.png")

    assert visit_refused(server, ask=ask) is RejectKind.IMAGE_FETCH_FAILED
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 404 Not Found\r\nContent-Type: image/png\r\n\r\nx",
        b"HTTP/1.1 206 Partial Content\r\nContent-Type: image/png\r\n\r\nx",
        b"HTTP/1.1 500 X\r\nContent-Type: image/png\r\n\r\nx",
        OK.replace(b"image/png", b"text/html") + b"\r\nx",
        b"HTTP/1.1 200 OK\r\n\r\nx",
        OK + b"Content-Encoding: gzip\r\n\r\nx",
        OK + b"Content-Encoding: gzip, gzip\r\n\r\nx",
        OK + b"Content-Encoding: identity\r\nContent-Encoding: br\r\n\r\nx",
        OK + b"Content-Length: 10\r\n\r\nshort",
        OK + b"Content-Length: ten\r\n\r\nx",
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nx",
        OK + b"X: " + b"x" * 200_000 + b"\r\n\r\nx",
        b"not http at all\r\n\r\n",
        b"",
    ],
)
def test_every_other_answer_is_refused(answer: bytes) -> None:
    assert visit_refused(Server([answer])) is RejectKind.IMAGE_FETCH_FAILED


@pytest.mark.parametrize(
    "head",
    [b"Content-Length: 10001\r\n\r\n", b"\r\n", b"Content-Length: 1000000000\r\n\r\n", b"Content-Length: 3\r\n\r\n"],
)
def test_an_image_past_the_byte_limit_is_cut_off(head: bytes) -> None:
    server = Server([OK + head + b"x" * 10_001])
    if b" 3\r" in head:
        assert visit(server) == b"xxx"
    else:
        assert visit_refused(server) is RejectKind.IMAGE_TOO_LARGE


def test_an_image_at_the_byte_limit_passes() -> None:
    assert visit(Server([OK + b"\r\n" + b"x" * 10_000])) == b"x" * 10_000


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Content-Length: 1000\r\n\r\n" + b"x~" * 900,
        b"~".join(bytes([byte]) for byte in OK) + b"\r\nx",
        b"HTTP/1.1 100 Continue\r\n\r\n~" * 100,
    ],
)
def test_a_slow_drip_ends_at_the_time_limit(answer: bytes) -> None:
    start = time.perf_counter()
    assert visit_refused(Server([answer])) is RejectKind.IMAGE_FETCH_FAILED
    assert 0.9 < time.perf_counter() - start < 2.0


def test_a_lookup_that_hangs_ends_at_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: time.sleep(0.6))
    start = time.perf_counter()
    assert refused("http://images.test/", replace(LIMITS, fetch_seconds=0.2)) is RejectKind.IMAGE_FETCH_FAILED
    assert time.perf_counter() - start < 0.5


# --- TLS ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for images.test alone, and its key."""
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key.pem -out cert.pem"
    command += " -days 2 -subj /CN=images.test -addext subjectAltName=DNS:images.test"
    command += " -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,digitalSignature,keyCertSign"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


@pytest.mark.parametrize(
    ("name", "trusted", "outcome"),
    [
        ("images.test", True, b"bytes"),
        ("other.test", True, RejectKind.IMAGE_FETCH_FAILED),
        ("127.0.0.1", True, RejectKind.IMAGE_FETCH_FAILED),
        ("images.test", False, RejectKind.IMAGE_FETCH_FAILED),
    ],
)
def test_the_certificate_is_checked_against_the_name_in_the_url(
    name: str,
    trusted: bool,
    outcome: bytes | RejectKind,
    certificate: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolver(monkeypatch, ["127.0.0.1"])
    inside = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    inside.load_cert_chain(*certificate)
    tls = ssl.create_default_context(cafile=str(certificate[0]) if trusted else None)
    server = Server([OK + b"\r\nbytes"])
    if isinstance(outcome, bytes):
        assert visit(server, uri=f"https://{name}:{{}}/", ssl=inside, tls=tls) == outcome
    else:
        assert visit_refused(server, uri=f"https://{name}:{{}}/", ssl=inside, tls=tls) is outcome
        assert server.requests == []
