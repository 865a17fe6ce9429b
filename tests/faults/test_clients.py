"""Clients that leave, drip or do not read: the work stops, others are served, and the record says what happened."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.gateway import (
    CHAT,
    GOOD,
    Gateway,
    Process,
    Seen,
    Upstream,
    chat,
    completion,
    eventually,
    scripted_worker,
    unique,
    whole,
)

BODY_SECONDS = 1.0


async def waits(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Begins an answer and never ends it; notes when the gateway hangs up."""
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 5000\r\n\r\n{")
    await writer.drain()
    if not await reader.read(1):
        raise ConnectionResetError


async def large(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(whole(completion(seen, {"content": "bread " * 1_000_000})))
    await writer.drain()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("c")


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream({"waits": waits, "large": large}) as server:
        yield server


@pytest.fixture(scope="module")
def worker(folder: Path) -> Iterator[Process]:
    with scripted_worker(folder / "w.sock") as process:
        yield process


@pytest.fixture(scope="module")
def gateway(folder: Path, upstream: Upstream, worker: Process) -> Iterator[Gateway]:
    limits = {"limits": {"body_seconds": f"{BODY_SECONDS}s"}}
    with Gateway(folder, upstream.url, folder / "w.sock", limits) as process:
        yield process


def head(length: int) -> bytes:
    lines = [f"POST {CHAT} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def begun(gateway: Gateway, text: str, model: str, **extra: object) -> socket.socket:
    body = json.dumps(chat(text, model, **extra)).encode()
    connection = socket.create_connection(gateway.address, timeout=20)
    connection.sendall(head(len(body)) + body)
    return connection


def closes(connection: socket.socket) -> None:
    connection.close()


def resets(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def in_flight(folder: Path) -> int:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(folder / "w.sock"))) as client:
        text = client.get("http://worker/metrics").text
    return next(int(float(line.split()[-1])) for line in text.splitlines() if line.startswith("guard_worker_in_flight"))


LEAVES = pytest.mark.parametrize("leave", [closes, resets])


@LEAVES
@pytest.mark.parametrize("stream", [False, True])
def test_leaving_while_the_guard_thinks_stops_the_guard(
    gateway: Gateway, upstream: Upstream, folder: Path, leave: Callable[[socket.socket], None], stream: bool
) -> None:
    model = unique("good")
    connection = begun(gateway, "[wait 9] hello", model, stream=stream)
    eventually(lambda: in_flight(folder) == 1)
    leave(connection)
    record = gateway.record(model=model)
    assert (record["outcome"], record["error"]) == ("aborted", "client_disconnected")
    assert not record["upstream_called"]
    assert upstream.of(model) == []
    eventually(lambda: in_flight(folder) == 0, seconds=3)


@LEAVES
def test_leaving_while_the_upstream_answers_ends_its_work(
    gateway: Gateway, upstream: Upstream, leave: Callable[[socket.socket], None]
) -> None:
    model = unique("waits")
    connection = begun(gateway, "hello", model)
    eventually(lambda: upstream.of(model))
    leave(connection)
    record = gateway.record(model=model)
    assert (record["outcome"], record["error"]) == ("aborted", "client_disconnected")
    assert (record["upstream_called"], record["released_bytes"], record["guard_calls"]) == (True, 0, 1)
    eventually(lambda: model in upstream.abandoned, seconds=3)


@LEAVES
def test_leaving_while_the_answer_is_judged_releases_nothing(
    gateway: Gateway, upstream: Upstream, folder: Path, leave: Callable[[socket.socket], None]
) -> None:
    model = unique("good")
    connection = begun(gateway, "[wait 0.3] hello", model)
    eventually(lambda: upstream.of(model))
    eventually(lambda: in_flight(folder) == 1)
    leave(connection)
    record = gateway.record(model=model)
    assert (record["outcome"], record["error"]) == ("aborted", "client_disconnected")
    assert (record["upstream_called"], record["released_bytes"]) == (True, 0)
    eventually(lambda: in_flight(folder) == 0, seconds=3)


@LEAVES
def test_leaving_during_the_release_is_one_record(gateway: Gateway, leave: Callable[[socket.socket], None]) -> None:
    model = unique("large")
    connection = begun(gateway, "hello", model)
    assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    leave(connection)
    record = gateway.record(model=model)
    assert record["outcome"] == "allowed"
    assert record["guard_calls"] == 2
    assert gateway.post(chat()).status_code == 200


@LEAVES
def test_leaving_in_mid_body_reaches_nobody(
    gateway: Gateway, upstream: Upstream, leave: Callable[[socket.socket], None]
) -> None:
    before, aborted = len(upstream.seen), len(gateway.records(outcome="aborted"))
    body = json.dumps(chat("hello")).encode()
    connection = socket.create_connection(gateway.address, timeout=20)
    connection.sendall(head(len(body)) + body[:-1])
    leave(connection)
    eventually(lambda: len(gateway.records(outcome="aborted")) == aborted + 1)
    record = gateway.records(outcome="aborted")[-1]
    assert (record["error"], record["guard_calls"], record["model"]) == ("client_disconnected", 0, None)
    assert len(upstream.seen) == before


def test_slow_bodies_end_in_408_and_hold_nobody_up(gateway: Gateway, upstream: Upstream) -> None:
    before = len(upstream.seen)
    began = time.monotonic()
    slow = [socket.create_connection(gateway.address, timeout=20) for _ in range(40)]
    for connection in slow:
        connection.sendall(head(1000) + b'{"model": ')
    assert [gateway.post(chat()).status_code for _ in range(5)] == [200] * 5
    assert time.monotonic() - began < BODY_SECONDS  # they were answered while the slow ones still held on
    for connection in slow:
        answer = b"".join(iter(lambda c=connection: c.recv(65536), b""))  # to the end: the gateway hangs up
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_timeout"
        connection.close()
    assert time.monotonic() - began < BODY_SECONDS + 2
    assert len(upstream.seen) == before + 5
    eventually(lambda: len(gateway.records(status=408)) == 40)


def test_a_dripping_body_gets_no_second_more(gateway: Gateway) -> None:
    """The time is for the whole body: bytes that keep coming do not extend it."""
    with socket.create_connection(gateway.address, timeout=20) as connection:
        connection.sendall(head(1000))
        began, stop = time.monotonic(), threading.Event()

        def drip() -> None:
            while not stop.wait(0.05):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")
            assert time.monotonic() - began < BODY_SECONDS + 1
        finally:
            stop.set()
            thread.join()


def test_a_client_that_does_not_read_holds_nobody_up(gateway: Gateway) -> None:
    stuck = [begun(gateway, "hello", unique("large")) for _ in range(3)]
    eventually(lambda: len([r for r in gateway.records(outcome="allowed") if r["model"].startswith("large")]) >= 3)
    response = gateway.post(chat())
    assert response.json()["choices"][0]["message"]["content"] == GOOD
    for connection in stuck:
        resets(connection)


def test_a_client_that_waits_for_100_continue_is_served(gateway: Gateway) -> None:
    body = json.dumps(chat("hello")).encode()
    with socket.create_connection(gateway.address, timeout=20) as connection:
        connection.sendall(
            head(len(body)).replace(b"\r\n\r\n", b"\r\nexpect: 100-continue\r\nconnection: close\r\n\r\n")
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        assert b"".join(iter(lambda: connection.recv(65536), b"")).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_waits_is_refused_before_it_sends_too_much(gateway: Gateway) -> None:
    with socket.create_connection(gateway.address, timeout=20) as connection:
        connection.sendall(head(10**12).replace(b"\r\n\r\n", b"\r\nexpect: 100-continue\r\n\r\n"))
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_forty_clients_at_once_get_their_own_answers(gateway: Gateway, upstream: Upstream) -> None:
    models = [unique("bad" if number % 4 == 1 else "good") for number in range(40)]

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=gateway.url, timeout=20, trust_env=False) as client:
            bodies = [
                chat("how do I pick a lock?" if n % 4 == 2 else f"[wait 0.02] {n}", model, stream=n % 2 == 0)
                for n, model in enumerate(models)
            ]
            return await asyncio.gather(*(client.post(CHAT, json=body) for body in bodies))

    for number, (model, response) in enumerate(zip(models, asyncio.run(run()), strict=True)):
        record = gateway.record(response)
        assert record["model"] == model
        expected = ("allowed", "blocked", "blocked", "allowed")[number % 4]
        assert record["outcome"] == expected
        assert response.status_code == (400 if number % 4 == 2 else 200)
        assert len(upstream.of(model)) == int(number % 4 != 2)
        assert ("Bread" in response.text) == (expected == "allowed")
