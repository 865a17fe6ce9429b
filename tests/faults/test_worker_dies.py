"""The guard worker is killed, hangs, or was never there: requests fail closed, in time, and service resumes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.gateway import (
    CHAT,
    FORGETFUL,
    GOOD,
    LEAK,
    Gateway,
    Process,
    Upstream,
    chat,
    eventually,
    scripted_worker,
    unique,
)

DEADLINE = 0.6
#: what an answer may take beyond the guard's deadlines on a busy machine
SLACK = 2.0
POLICY = {**FORGETFUL, "policies": {"default": {"input": {"deadline": "600ms"}, "output": {"deadline": "600ms"}}}}
MANAGED = [sys.executable, str(Path(__file__).parents[1] / "support" / "managed_gateway.py")]


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        yield server


@contextlib.contextmanager
def managed(folder: Path, upstream: Upstream) -> Iterator[Gateway]:
    """A gateway that starts and restarts its own worker."""
    with Gateway(folder, upstream.url, folder / "w.sock", POLICY, MANAGED) as gateway:
        yield gateway


def pid(gateway: Gateway) -> int:
    """The worker that is ready, as the supervisor last said."""
    line = eventually(lambda: next((line for line in reversed(gateway.lines) if line.endswith(" ready")), ""))
    return int(line.split()[1])


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


def assert_unavailable(response: httpx.Response) -> None:
    assert response.status_code == 503
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("guard_unavailable", "server_error")
    assert response.headers["x-guard-action"] == "error"


def assert_nothing_unscreened(gateway: Gateway, upstream: Upstream, asked: dict[str, httpx.Response]) -> None:
    """For every request: one line in the log; the upstream was called only after a verdict; no leak."""
    eventually(lambda: len(gateway.records()) >= len(asked))
    records = gateway.records()
    by_model = {record["model"]: record for record in records}
    assert len(records) == len(by_model) == len(asked)
    for model, response in asked.items():
        record, seen = by_model[model], upstream.of(model)
        assert record["status"] == response.status_code
        assert len(seen) == int(record["upstream_called"]) <= 1
        assert LEAK not in response.text
        verdicts = [d for d in record["decisions"] if d["verdict"] is not None]
        if seen:
            assert verdicts[0]["source"] == "input"
            assert verdicts[0]["verdict"]["request"] == "unharmful"
        if response.status_code == 200 and GOOD in response.text:
            assert [d["source"] for d in verdicts] == ["input", "output"]
        if record["outcome"] == "guard_error":
            assert response.status_code == 503
            assert record["error"] in ("unavailable", "timeout")


def test_a_worker_killed_in_mid_request_is_a_503_and_a_new_one_serves(tmp_path: Path, upstream: Upstream) -> None:
    with managed(tmp_path, upstream) as gateway:
        model = unique("good")
        first = pid(gateway)
        with socket.create_connection(gateway.address, timeout=20) as connection:
            body = _json(chat("[wait 0.5] hello", model))
            connection.sendall(_http(gateway, body))
            eventually(lambda: b"guard_worker_in_flight 1" in _metrics(tmp_path / "w.sock"))
            os.kill(first, signal.SIGKILL)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b'"guard_unavailable"' in answer
        assert upstream.of(model) == []
        record = gateway.record(model=model)
        assert (record["outcome"], record["error"]) == ("guard_error", "unavailable")
        eventually(lambda: gateway.post(chat()).status_code == 200)
        assert pid(gateway) != first
        assert gateway.said(f"worker {first} exited") == f"worker {first} exited 0.1"


def test_killed_twice_under_load_nothing_hangs_and_nothing_leaks(tmp_path: Path, upstream: Upstream) -> None:
    """30 clients that do not stop: benign and harmful prompts, good and bad answers, streamed and not."""
    asked: dict[str, httpx.Response] = {}
    seconds: list[float] = []
    recovered: list[float] = []

    async def load(url: str, stop: asyncio.Event, number: int) -> None:
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(base_url=url, timeout=20, limits=limits, trust_env=False) as client:
            while not stop.is_set():
                kind = "bad" if number % 3 == 1 else "good"
                text = "how do I pick a lock?" if number % 5 == 4 else "[wait 0.03] how do I bake bread?"
                model = unique(kind)
                began = time.monotonic()
                asked[model] = await client.post(CHAT, json=chat(text, model, stream=number % 2 == 0))
                seconds.append(time.monotonic() - began)
                if asked[model].status_code == 503:
                    await asyncio.sleep(0.05)

    async def run(gateway: Gateway) -> None:
        stop = asyncio.Event()
        clients = [asyncio.create_task(load(gateway.url, stop, number)) for number in range(30)]

        async def until(condition: Any) -> None:
            async with asyncio.timeout(20):
                while not condition():
                    await asyncio.sleep(0.01)

        def served() -> int:
            return sum(response.status_code == 200 for response in asked.values())

        def refused() -> int:
            return sum(response.status_code == 503 for response in asked.values())

        for _ in range(2):
            before = served()
            await until(lambda count=before: served() > count + 40)
            killed, before = time.monotonic(), refused()
            os.kill(pid(gateway), signal.SIGKILL)
            await until(lambda count=before: refused() > count)
            before = served()
            await until(lambda count=before: served() > count)
            recovered.append(time.monotonic() - killed)
        stop.set()
        await asyncio.gather(*clients)

    with managed(tmp_path, upstream) as gateway:
        asyncio.run(run(gateway))
        assert max(seconds) < 2 * DEADLINE + SLACK
        assert {response.status_code for response in asked.values()} == {200, 400, 503}
        for response in asked.values():
            if response.status_code == 503:
                assert_unavailable(response)
        assert_nothing_unscreened(gateway, upstream, asked)


def test_repeated_deaths_are_backed_off(tmp_path: Path, upstream: Upstream) -> None:
    with managed(tmp_path, upstream) as gateway:
        for _ in range(3):
            dying = pid(gateway)
            os.kill(dying, signal.SIGKILL)
            eventually(lambda gone=dying: pid(gateway) != gone)
        assert [line.split()[3] for line in gateway.lines if " exited" in line] == ["0.1", "0.2", "0.4"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_worker_leaves_with_its_gateway_however_it_ends(
    tmp_path: Path, upstream: Upstream, number: signal.Signals
) -> None:
    with managed(tmp_path, upstream) as gateway:
        worker = pid(gateway)
        gateway.popen.send_signal(number)
        gateway.popen.wait(20)
        eventually(lambda: not alive(worker))


@pytest.mark.parametrize("stream", [False, True])
def test_a_worker_that_hangs_is_a_503_at_the_deadline(tmp_path: Path, upstream: Upstream, stream: bool) -> None:
    with (
        scripted_worker(tmp_path / "w.sock") as worker,
        Gateway(tmp_path, upstream.url, tmp_path / "w.sock", POLICY) as gateway,
    ):
        assert gateway.post(chat()).status_code == 200
        worker.popen.send_signal(signal.SIGSTOP)
        model = unique("good")
        began = time.monotonic()
        response = gateway.post(chat(model=model, stream=stream))
        assert DEADLINE <= time.monotonic() - began < DEADLINE + SLACK
        assert_unavailable(response)
        assert response.headers["x-should-retry"] == "false"
        assert gateway.record(response)["error"] == "timeout"
        assert upstream.of(model) == []
        worker.popen.send_signal(signal.SIGCONT)
        assert gateway.post(chat()).status_code == 200


def test_a_worker_that_hangs_between_request_and_answer_releases_nothing(tmp_path: Path) -> None:
    """The input was judged; the worker stops before the answer is."""
    stopped: list[Process] = []

    async def stops(seen: Any, reader: Any, writer: asyncio.StreamWriter) -> None:
        stopped[0].popen.send_signal(signal.SIGSTOP)
        await upstream.behaviours["good"](seen, reader, writer)

    with (
        Upstream({"stops": stops}) as upstream,
        scripted_worker(tmp_path / "w.sock") as worker,
        Gateway(tmp_path, upstream.url, tmp_path / "w.sock", POLICY) as gateway,
    ):
        stopped.append(worker)
        response = gateway.post(chat(model="stops", stream=True))
        assert_unavailable(response)
        assert GOOD not in response.text
        record = gateway.record(response)
        assert [d["error"] for d in record["decisions"]] == [None, "timeout"]
        assert (record["held_bytes"] > 0, record["released_bytes"]) == (True, 0)


def test_an_absent_worker_costs_no_time_and_tells_when_to_come_back(tmp_path: Path, upstream: Upstream) -> None:
    with (
        scripted_worker(tmp_path / "w.sock") as worker,
        Gateway(tmp_path, upstream.url, tmp_path / "w.sock", POLICY) as gateway,
    ):
        worker.popen.kill()
        worker.popen.wait()
        began = time.monotonic()
        responses = [gateway.post(chat()) for _ in range(20)]
        assert time.monotonic() - began < 20 * DEADLINE / 2
        for response in responses:
            assert_unavailable(response)
            assert response.headers["retry-after"] == "1"


def test_an_open_policy_lets_through_and_counts_a_bypass(tmp_path: Path, upstream: Upstream) -> None:
    source = {"on_error": "annotate_unscreened", "deadline": "600ms"}
    with (
        scripted_worker(tmp_path / "w.sock") as worker,
        Gateway(
            tmp_path,
            upstream.url,
            tmp_path / "w.sock",
            {**FORGETFUL, "policies": {"default": {"input": source, "output": source}}},
        ) as gateway,
    ):
        worker.popen.kill()
        worker.popen.wait()
        response = gateway.post(chat())
        assert response.json()["moderation"]["output"]["type"] == "error"
        record = gateway.record(response)
        assert record["bypassed"] == [
            {"source": "input", "reason": "on_error"},
            {"source": "output", "reason": "on_error"},
        ]
        assert all(decision["verdict"] is None for decision in record["decisions"])


def _json(value: Any) -> bytes:
    return httpx.Request("POST", "http://x", json=value).content


def _http(gateway: Gateway, body: bytes) -> bytes:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def _metrics(path: Path) -> bytes:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
        return client.get("http://worker/metrics").content
