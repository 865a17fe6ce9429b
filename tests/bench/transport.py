"""What one question to the guard costs by transport, against the scripted worker, all in one interleaved run.

    PYTHONPATH=. python tests/bench/transport.py [--rounds 40] [--calls 50]

Prints milliseconds per call (median and p99), one call after another and 16 at a time. ``websocket`` is the
gateway's own client; ``stream`` is the floor: length-prefixed frames on a bare asyncio Unix socket, answered by
the same rule without any HTTP server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx

from guard_middleware.guard.client import GuardClient
from guard_middleware.types import Blob, Conversation, Message, Text, Verdict
from guard_middleware.wire import CONTENT_TYPE, ModerationRequest, decode_answer, encode_answer, encode_request
from guard_middleware.wire import decode_request as decode

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests" / "support" / "scripted_worker.py"
LENGTH = struct.Struct(">I")
IDS = itertools.count()
TEXT = "How do I bake bread without yeast? " * 20

Call = Callable[[ModerationRequest], Awaitable[object]]


def question(image: bytes) -> ModerationRequest:
    parts = (Text(TEXT), Blob("image/png", image)) if image else (Text(TEXT),)
    return ModerationRequest(str(next(IDS)), Conversation((Message("user", parts),)), "input", 10.0)


class Post:
    """One HTTP request per question on kept-alive connections, as httpx does it."""

    def __init__(self, socket: str) -> None:
        self._client = httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=socket), base_url="http://worker")

    async def __call__(self, request: ModerationRequest) -> object:
        headers = {"content-type": CONTENT_TYPE}
        response = await self._client.post("/v1/moderate", content=encode_request(request), headers=headers)
        return decode_answer(response.content)[1]


class RawPost:
    """The least an HTTP/1.1 client can do: one request at a time on each of a few kept-alive connections."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __call__(self, request: ModerationRequest) -> object:
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_unix_connection(self._socket)
        body = encode_request(request)
        head = f"POST /v1/moderate HTTP/1.1\r\nhost: w\r\ncontent-type: {CONTENT_TYPE}\r\ncontent-length: {len(body)}"
        writer.write(head.encode() + b"\r\n\r\n" + body)
        headers = (await reader.readuntil(b"\r\n\r\n")).lower()
        size = int(headers.partition(b"content-length:")[2].partition(b"\r\n")[0])
        answer = await reader.readexactly(size)
        self._idle.append((reader, writer))
        return decode_answer(answer)[1]


class Stream:
    """Length-prefixed frames, multiplexed."""

    def __init__(self, socket: str) -> None:
        self._socket, self._pending = socket, dict[str, asyncio.Future[object]]()
        self._writer: asyncio.StreamWriter | None = None

    async def __call__(self, request: ModerationRequest) -> object:
        if self._writer is None:
            reader, self._writer = await asyncio.open_unix_connection(self._socket)
            self._task = asyncio.create_task(self._read(reader))
        future = self._pending[request.id] = asyncio.get_running_loop().create_future()
        frame = encode_request(request)
        self._writer.write(LENGTH.pack(len(frame)) + frame)
        return await future

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while True:
            (size,) = LENGTH.unpack(await reader.readexactly(4))
            id, outcome = decode_answer(await reader.readexactly(size))
            self._pending.pop(id).set_result(outcome)


def serve_stream(socket: str) -> None:
    """The stream's server, in its own process."""
    import runpy

    import uvloop

    guard = runpy.run_path(str(WORKER))["ScriptedGuard"]()

    async def session(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def answer(request: ModerationRequest) -> None:
            body = encode_answer(request.id, await guard.moderate(request, 0.0))
            writer.write(LENGTH.pack(len(body)) + body)

        async with asyncio.TaskGroup() as tasks:
            with contextlib.suppress(asyncio.IncompleteReadError):
                while True:
                    (size,) = LENGTH.unpack(await reader.readexactly(4))
                    tasks.create_task(answer(decode(await reader.readexactly(size))))

    async def main() -> None:
        server = await asyncio.start_unix_server(session, socket)
        await server.serve_forever()

    uvloop.run(main())


async def timed(call: Call, calls: int, width: int, image: bytes) -> list[float]:
    async def lane() -> list[float]:
        seconds = []
        for _ in range(calls // width):
            started = time.perf_counter()
            outcome = await call(question(image))
            seconds.append(time.perf_counter() - started)
            assert isinstance(outcome, Verdict), outcome
        return seconds

    lanes = await asyncio.gather(*(lane() for _ in range(width)))
    return [second for lane_seconds in lanes for second in lane_seconds]


async def measure(sockets: dict[str, str], rounds: int, calls: int, image: bytes) -> None:
    transports: dict[str, Call] = {
        "websocket (websockets-sansio)": GuardClient(sockets["sansio"]).moderate,
        "websocket (websockets, legacy)": GuardClient(sockets["legacy"]).moderate,
        "http post, httpx": Post(sockets["sansio"]),
        "http post, raw": RawPost(sockets["sansio"]),
        "stream": Stream(sockets["stream"]),
    }
    samples: dict[tuple[str, int], list[float]] = {(name, width): [] for name in transports for width in (1, 16)}
    for call in transports.values():
        await timed(call, 1, 1, image)
        await timed(call, 64, 16, image)
    for _ in range(rounds):
        for (name, width), seconds in samples.items():
            seconds += await timed(transports[name], max(calls, width), width, image)
    print(f"\n{'transport':34}{'1: median':>11}{'p99':>8}{'16: median':>13}{'p99':>8}   (ms per call)")
    for name in transports:
        cells = []
        for width in (1, 16):
            ordered = sorted(samples[name, width])
            cells += [statistics.median(ordered) * 1e3, ordered[int(len(ordered) * 0.99)] * 1e3]
        print(f"{name:34}{cells[0]:11.2f}{cells[1]:8.2f}{cells[2]:13.2f}{cells[3]:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=48, help="calls per transport and round")
    parser.add_argument("--image-kib", type=int, default=300, help="size of the image in the second table")
    parser.add_argument("--serve-stream", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_stream:
        serve_stream(options.serve_stream)
        return
    import uvloop

    with tempfile.TemporaryDirectory() as folder:
        sockets = {name: f"{folder}/{name}.sock" for name in ("sansio", "legacy", "stream")}
        command = [sys.executable, "-W", "ignore"]
        processes = [
            subprocess.Popen([*command, str(WORKER), "--socket", sockets["sansio"]]),
            subprocess.Popen([*command, str(WORKER), "--socket", sockets["legacy"], "--ws", "websockets"]),
            subprocess.Popen([*command, __file__, "--serve-stream", sockets["stream"]]),
        ]
        try:
            while not all(os.path.exists(socket) for socket in sockets.values()):
                time.sleep(0.1)
            time.sleep(0.5)
            print(f"text of {len(TEXT)} characters", end="")
            uvloop.run(measure(sockets, options.rounds, options.calls, b""))
            print(f"\nwith an image of {options.image_kib} KiB", end="")
            uvloop.run(
                measure(sockets, max(1, options.rounds // 4), options.calls, os.urandom(options.image_kib * 1024))
            )
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
                process.wait()


if __name__ == "__main__":
    main()
