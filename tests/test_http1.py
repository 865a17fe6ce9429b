"""The upstream's end of HTTP/1.1, against servers that are scripted byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import subprocess
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from guard_middleware.errors import UpstreamError, UpstreamErrorKind
from guard_middleware.http1 import Pool

Answer = tuple[int, list[tuple[bytes, bytes]], bytes]
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nbread"


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
_chosen = {"loop": asyncio.new_event_loop}


@pytest.fixture(autouse=True, params=LOOPS)
def loop_factory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_chosen, "loop", LOOPS[request.param])


def on_loop(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=_chosen["loop"]) as runner:
        runner.run(work)


async def request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    size = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
    return head + await reader.readexactly(size)


class Server:
    """Answers the n-th request of any connection with the n-th of ``answers``, piece by piece; then closes or stays."""

    def __init__(self, *answers: list[bytes], stay: bool = True) -> None:
        self.answers, self.stay = list(answers), stay
        self.connections = 0
        self.requests: list[bytes] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while self.answers:
                self.requests.append(await request(reader))
                for piece in self.answers.pop(0):
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.005)
                if not self.stay:
                    break
            else:
                await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


async def exchange(pool: Pool, body: bytes = b"{}", method: str = "POST") -> Answer:
    connection = await pool.acquire()
    try:
        await connection.send(method, b"/v1/x", [(b"host", b"upstream")], body)
        status, headers = await connection.head()
        answer = bytearray()
        while chunk := await connection.read():
            answer += chunk
        return status, headers, bytes(answer)
    finally:
        pool.release(connection)


def with_server(serve: Serve, use: Callable[[Pool], Awaitable[None]], silence: float = 5.0) -> None:
    tasks = []

    async def tracked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        await serve(reader, writer)
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def run() -> None:
        server = await asyncio.start_server(tracked, "127.0.0.1", 0)
        pool = Pool("127.0.0.1", server.sockets[0].getsockname()[1], silence=silence)
        await use(pool)
        pool.close()
        server.close()
        await asyncio.gather(*tasks)

    on_loop(run())


def answer_of(*pieces: bytes, stay: bool = True) -> Answer:
    found = []

    async def use(pool: Pool) -> None:
        found.append(await exchange(pool))

    with_server(Server(list(pieces), stay=stay), use)
    return found[0]


def error_of(*pieces: bytes, stay: bool = True, silence: float = 5.0) -> UpstreamErrorKind:
    server, kinds = Server(list(pieces), [OK], stay=stay), []

    async def use(pool: Pool) -> None:
        with pytest.raises(UpstreamError) as caught:
            await exchange(pool)
        kinds.append(caught.value.kind)
        await exchange(pool)  # by another connection

    with_server(server, use, silence)
    assert server.connections == 2
    return kinds[0]


@pytest.mark.parametrize(
    ("pieces", "stay"),
    [
        ([OK], True),
        ([OK[i : i + 1] for i in range(len(OK))], True),
        ([b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nbr\r\n", b"3;x=y\r\nead\r\n0\r\n\r\n"], True),
        ([b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nbread\r\n0\r\nx-late: 1\r\n\r\n"], True),
        ([b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK], True),
        ([b"HTTP/1.1 200 OK\r\n\r\nbr", b"ead"], False),
        ([b"HTTP/1.0 200 OK\r\n\r\nbread"], False),
    ],
    ids=["length", "by single bytes", "chunked", "trailers", "interim answers", "until the end", "HTTP/1.0"],
)
def test_reads_an_answer_however_it_is_framed(pieces: list[bytes], stay: bool) -> None:
    status, headers, body = answer_of(*pieces, stay=stay)
    assert (status, body) == (200, b"bread")
    assert {name for name, _ in headers} <= {b"content-length", b"transfer-encoding"}


def test_header_names_are_lower_case_and_repeated_ones_kept() -> None:
    _, headers, _ = answer_of(b"HTTP/1.1 204 Gone\r\nX-A: 1\r\nx-a:  2 \r\n\r\n")
    assert headers == [(b"x-a", b"1"), (b"x-a", b"2")]


@pytest.mark.parametrize(
    "pieces",
    [
        [b"SSH-2.0-OpenSSH_9.6\r\n"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nbread!"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n5\r\nbread\r\n0\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nbread\r\n0\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nx y: 1\r\n\r\n"],
        [OK + OK],
        [b"HTTP/1.1 200 OK\r\n" + b"x-long: " + b"a" * 70_000],
        [b"HTTP/1.1 200 OK\r\n" + b"x: " + b"a" * 1000 + b"\r\n"] * 3 + [b"y: " + b"a" * 90_000],
    ],
    ids=["no HTTP", "two lengths", "length and chunked", "bad chunk", "bad header", "two answers", "long", "long head"],
)
def test_a_malformed_answer_is_refused_and_its_connection_dropped(pieces: list[bytes]) -> None:
    assert error_of(*pieces) is UpstreamErrorKind.MALFORMED


def test_a_change_of_protocol_is_refused() -> None:
    pieces = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n"
    assert error_of(pieces) is UpstreamErrorKind.UNSUPPORTED


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [b"HTTP/1.1 200 OK\r\nconte"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nbread"],
        [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nbread\r\n"],
        [b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nbread"],
        [b"HTTP/1.1 100 Continue\r\n\r\n"],
    ],
    ids=["nothing", "half a head", "short", "no last chunk", "a coding without chunks", "interim only"],
)
def test_an_answer_that_ends_early_is_an_error(pieces: list[bytes]) -> None:
    assert error_of(*pieces, stay=False) is UpstreamErrorKind.RESET


@pytest.mark.parametrize("pieces", [[], [OK[:-2]]], ids=["before the head", "in the body"])
def test_silence_is_a_timeout(pieces: list[bytes]) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.writelines(pieces)
        await reader.read()
        writer.close()

    async def use(pool: Pool) -> None:
        with pytest.raises(UpstreamError) as caught:
            await exchange(pool)
        assert caught.value.kind is UpstreamErrorKind.TIMEOUT

    with_server(serve, use, silence=0.05)


def test_a_slow_answer_is_not_silence() -> None:
    server, found = Server([OK[i : i + 4] for i in range(0, len(OK), 4)]), []

    async def use(pool: Pool) -> None:
        found.append(await exchange(pool))

    with_server(server, use, silence=0.04)  # less than the answer takes as a whole
    assert found[0][2] == b"bread"


def test_nobody_listening_is_unreachable() -> None:
    async def run() -> None:
        server = await asyncio.start_server(Server(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        with pytest.raises(UpstreamError) as caught:
            await Pool("127.0.0.1", port).acquire()
        assert caught.value.kind is UpstreamErrorKind.UNREACHABLE

    on_loop(run())


def test_a_connection_is_used_again_after_a_complete_exchange() -> None:
    server = Server([OK], [OK], [OK])

    async def use(pool: Pool) -> None:
        for _ in range(3):
            await exchange(pool)

    with_server(server, use)
    assert server.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\nbread",
        b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\nbread",
    ],
)
def test_a_connection_that_the_upstream_will_close_is_not_used_again(answer: bytes) -> None:
    server = Server([answer], [OK])

    async def use(pool: Pool) -> None:
        await exchange(pool)
        await exchange(pool)

    with_server(server, use)
    assert server.connections == 2


@pytest.mark.parametrize("late", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil"], ids=["closed", "unasked"])
def test_an_idle_connection_that_closes_or_speaks_is_not_used_again(late: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(OK)
        await asyncio.sleep(0.02)
        writer.write(late)
        writer.close()

    async def use(pool: Pool) -> None:
        for _ in range(2):
            assert (await exchange(pool))[2] == b"bread"
            await asyncio.sleep(0.05)

    with_server(serve, use)


def test_an_answer_that_was_not_read_to_its_end_leaves_nothing_for_the_next_request() -> None:
    server = Server([b"HTTP/1.1 200 OK\r\ncontent-length: 3000000\r\n\r\n" + b"x" * 3_000_000], [OK])

    async def use(pool: Pool) -> None:
        connection = await pool.acquire()
        await connection.send("POST", b"/", [], b"{}")
        assert (await connection.head())[0] == 200
        pool.release(connection)
        assert (await exchange(pool))[2] == b"bread"

    with_server(server, use)
    assert server.connections == 2


def test_an_idle_connection_expires() -> None:
    server = Server([OK], [OK])

    async def run() -> None:
        listener = await asyncio.start_server(server, "127.0.0.1", 0)
        pool = Pool("127.0.0.1", listener.sockets[0].getsockname()[1], idle_seconds=0.01)
        await exchange(pool)
        await asyncio.sleep(0.03)
        await exchange(pool)
        pool.close()
        listener.close()

    on_loop(run())
    assert server.connections == 2


def test_a_large_exchange_waits_for_the_slower_side() -> None:
    sent, size = b"y" * 5_000_000, 8_000_000

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05)
        assert (await request(reader)).endswith(sent)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size)
        await writer.drain()
        writer.close()

    async def use(pool: Pool) -> None:
        connection = await pool.acquire()
        await connection.send("POST", b"/", [], sent)
        await connection.head()
        await asyncio.sleep(0.1)
        first = await connection.read()
        assert len(first) < 2_000_000  # the rest waits in the socket, not in memory
        total = len(first)
        while chunk := await connection.read():
            total += len(chunk)
        assert total == size
        pool.release(connection)

    with_server(serve, use)


def test_an_early_refusal_is_read_while_the_body_still_goes_out() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n")
        await asyncio.sleep(0.2)
        writer.close()

    async def use(pool: Pool) -> None:
        assert (await exchange(pool, b"x" * 20_000_000))[0] == 413

    with_server(serve, use)


def test_the_request_on_the_wire() -> None:
    server = Server([OK], [OK])

    async def use(pool: Pool) -> None:
        connection = await pool.acquire()
        headers = [(b"x-a", b"caf\xe9 1"), (b"Content-Length", b"99"), (b"transfer-encoding", b"chunked")]
        await connection.send("POST", b"/v1/x?api-version=1", headers, b"{}")
        await connection.head()
        pool.release(connection)
        await exchange(pool, b"", "GET")

    with_server(server, use)
    assert server.requests == [
        b"POST /v1/x?api-version=1 HTTP/1.1\r\nx-a: caf\xe9 1\r\ncontent-length: 2\r\n\r\n{}",
        b"GET /v1/x HTTP/1.1\r\nhost: upstream\r\n\r\n",
    ]


@pytest.mark.parametrize(
    ("method", "target", "header"),
    [
        ("POST", b"/v1/x HTTP/1.1\r\nx: y", (b"a", b"b")),
        ("POST", b"/v1/ x", (b"a", b"b")),
        ("POST", b"v1", (b"a", b"b")),
        ("PO ST", b"/", (b"a", b"b")),
        ("POST", b"/", (b"a", b"b\r\nx: y")),
        ("POST", b"/", (b"a", b"b\ny")),
        ("POST", b"/", (b"a", b"b\0")),
        ("POST", b"/", (b"a:", b"b")),
        ("POST", b"/", (b"content-length ", b"5")),
        ("POST", b"/", (b"", b"b")),
    ],
)
def test_what_could_forge_a_line_is_not_sent(method: str, target: bytes, header: tuple[bytes, bytes]) -> None:
    server = Server([OK])

    async def use(pool: Pool) -> None:
        connection = await pool.acquire()
        with pytest.raises(UpstreamError) as caught:
            await connection.send(method, target, [header], b"{}")
        assert caught.value.kind is UpstreamErrorKind.UNSUPPORTED
        pool.release(connection)
        await exchange(pool)  # the connection is as good as new

    with_server(server, use)
    assert (len(server.requests), server.connections) == (1, 1)


def test_a_cancelled_exchange_closes_its_connection() -> None:
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        await reader.read()
        closed.set()
        writer.close()

    async def use(pool: Pool) -> None:
        task = asyncio.create_task(exchange(pool))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        await asyncio.wait_for(closed.wait(), 2.0)

    with_server(serve, use)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make a certificate")
def test_tls_verifies_the_upstream(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    command += f" -addext subjectAltName=DNS:localhost -keyout {key} -out {certificate}"
    subprocess.run(command.split(), check=True, capture_output=True)
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain(certificate, key)

    async def run() -> None:
        server = await asyncio.start_server(Server([OK], [OK]), "127.0.0.1", 0, ssl=ours)
        port = server.sockets[0].getsockname()[1]
        trusting = Pool("localhost", port, tls=ssl.create_default_context(cafile=str(certificate)))
        assert (await exchange(trusting))[2] == b"bread"
        trusting.close()
        by_address = Pool("127.0.0.1", port, tls=ssl.create_default_context(cafile=str(certificate)))
        for pool in (by_address, Pool("localhost", port, tls=ssl.create_default_context())):
            with pytest.raises(UpstreamError) as caught:
                await pool.acquire()
            assert caught.value.kind is UpstreamErrorKind.UNREACHABLE
        server.close()
        await asyncio.sleep(0.05)

    on_loop(run())
