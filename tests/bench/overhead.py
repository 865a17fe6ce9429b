"""What the gateway itself adds to a request: direct, through the gateway and through a naive proxy, interleaved.

    python tests/bench/overhead.py [--rounds 1500] [--json]

Starts, each as a process of its own on loopback: the scripted upstream, the scripted worker (the real worker app
and socket, answers at once), ``guard-gateway serve`` with its decision log on, and ``naive_proxy.py``. One client
with kept-alive connections sends the same body of about 1.3 kB to all three in turn, so that whatever else the
machine does hits all alike: absolute figures drift with its load, the ratio holds. ``added`` is the difference of
two medians (or two p99), to the same client going straight to the same upstream. ``ratio`` is what the gateway adds
over what the naive proxy adds. A second part keeps 16 requests in flight per target. The targets of the project:
added median <= 4 ms, added p99 <= 15 ms, ratio <= 0.6, for ``1 at a time``. Takes about a minute on 2 cores and
exits 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import naive_proxy
import orjson
import uvloop

from guard_middleware.scripted import ScriptedUpstream

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 200
LANES, LANE_CALLS = 16, 4
ADDED_MEDIAN_MS, ADDED_P99_MS, RATIO = 4.0, 15.0, 0.6
TARGETS = ("direct", "gateway", "naive")


def body(stream: bool) -> bytes:
    """A chat of three turns, about 1.3 kB."""
    recipe = "Mix flour, water and salt, let the dough rest for an hour, fold it twice, then bake it on a hot stone. "
    value = {
        "model": "scripted-helpful",
        "messages": [
            {"role": "system", "content": "You are a patient baker who answers in a few plain sentences. " * 3},
            {"role": "user", "content": "How do I bake bread without yeast? I have flour, salt and a hot oven."},
            {"role": "assistant", "content": recipe * 5},
            {"role": "user", "content": "And what changes when I use rye flour, and bake two loaves at once? " * 4},
        ],
        "temperature": 0.7,
        "max_tokens": 256,
        "stream": stream,
    }
    return orjson.dumps(value)


class Client:
    """One kept-alive HTTP/1.1 connection, with as little of HTTP as the three targets need."""

    def __init__(self, url: str) -> None:
        self._host, self._port = urlsplit(url).hostname, urlsplit(url).port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, body: bytes) -> bytes:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {self._host}:{self._port}\r\n"
            "user-agent: OpenAI/Python 3.52.0\r\naccept: application/json\r\n"
            "authorization: Bearer sk-0123456789abcdef0123456789abcdef\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        assert answer.startswith(b"http/1.1 200 "), answer
        if b"transfer-encoding: chunked" not in answer:
            return await reader.readexactly(int(answer.partition(b"content-length:")[2].partition(b"\r\n")[0]))
        chunks = bytearray()
        while size := int(await reader.readuntil(b"\r\n"), 16):
            chunks += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
        return bytes(chunks)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


async def timed(client: Client, body: bytes) -> float:
    started = time.perf_counter()
    answer = await client.post(body)
    seconds = time.perf_counter() - started
    assert b"scripted" in answer, answer
    return seconds


async def measure(urls: dict[str, str], rounds: int) -> dict[tuple[str, str, str], list[float]]:
    """Seconds by (part, mode, target)."""
    samples: dict[tuple[str, str, str], list[float]] = {}
    modes = {"whole": body(False), "streamed": body(True)}
    clients = {target: [Client(url) for _ in range(LANES)] for target, url in urls.items()}

    async def lane(client: Client, content: bytes) -> list[float]:
        return [await timed(client, content) for _ in range(LANE_CALLS)]

    for number in range(-WARM_UP, rounds):
        shift = number % len(TARGETS)
        for mode, content in modes.items():
            for target in (*TARGETS[shift:], *TARGETS[:shift]):
                seconds = await timed(clients[target][0], content)
                if number >= 0:
                    samples.setdefault(("1 at a time", mode, target), []).append(seconds)
    for number in range(-1, max(2, rounds // 60)):
        for mode, content in modes.items():
            for target in TARGETS:
                lanes = await asyncio.gather(*(lane(client, content) for client in clients[target]))
                if number >= 0:
                    samples.setdefault((f"{LANES} at a time", mode, target), []).extend(s for one in lanes for s in one)
    for client in (one for some in clients.values() for one in some):
        client.close()
    return samples


def table(samples: dict[tuple[str, str, str], list[float]]) -> list[dict[str, str | int | float]]:
    """One row per (part, mode, target), in milliseconds."""
    rows: list[dict[str, str | int | float]] = []
    for part, mode in dict.fromkeys((part, mode) for part, mode, _ in samples):
        figures = {}
        for target in TARGETS:
            ordered = sorted(second * 1e3 for second in samples[part, mode, target])
            p90, p99 = (ordered[int(len(ordered) * share)] for share in (0.90, 0.99))
            figures[target] = (len(ordered), statistics.median(ordered), p90, p99)
        _, base, _, base_p99 = figures["direct"]
        for target, (count, median, p90, p99) in figures.items():
            row: dict[str, str | int | float] = {"part": part, "mode": mode, "target": target, "requests": count}
            row |= {"median_ms": median, "p90_ms": p90, "p99_ms": p99}
            if target != "direct":
                row |= {"added_median_ms": median - base, "added_p99_ms": p99 - base_p99}
            if target == "gateway":
                row["ratio"] = (median - base) / (figures["naive"][1] - base)
            rows.append(row)
    return rows


def show(rows: list[dict[str, str | int | float]]) -> None:
    columns = ("median_ms", "p90_ms", "p99_ms", "added_median_ms", "added_p99_ms", "ratio")
    print(f"{'':12} {'':9} {'':8} {'requests':>9}" + "".join(f"{name:>17}" for name in columns))
    for row in rows:
        cells = "".join(f"{row[name]:17.2f}" if name in row else f"{'-':>17}" for name in columns)
        print(f"{row['part']:12} {row['mode']:9} {row['target']:8} {row['requests']:9}{cells}")


def missed(rows: list[dict[str, str | int | float]]) -> list[str]:
    bounds = {"added_median_ms": ADDED_MEDIAN_MS, "added_p99_ms": ADDED_P99_MS, "ratio": RATIO}
    return [
        f"{row['mode']}: {name} is {row[name]:.2f}, more than {bound:g}"
        for row in rows
        if row["target"] == "gateway" and row["part"] == "1 at a time"
        for name, bound in bounds.items()
        if float(row[name]) > bound
    ]


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[str]:
    """A Python process that says ``ready [URL]`` in a line; yields that line's last word, and stops it at the end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    started = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    assert started.stdout is not None
    try:
        line = started.stdout.readline()
        if "ready" not in line:
            raise SystemExit(f"{arguments} did not start")
        yield line.split()[-1]
    finally:
        started.send_signal(signal.SIGTERM)
        try:
            started.wait(10)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
        started.stdout.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1500, help="requests per target and mode (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="rows instead of the table")
    parser.add_argument("--serve-upstream", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_upstream:
        naive_proxy.serve(ScriptedUpstream().app)
        return 0

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="guard-bench-")))
        socket, settings = folder / "worker.sock", folder / "guard.yaml"
        settings.write_text(
            f"worker: {{socket: {socket}, manage: false}}\naudit: {{path: {folder / 'decisions.jsonl'}}}\n"
            "cache: {verdicts: {entries: 0}}\n"  # every round asks anew
        )
        direct = stack.enter_context(process(str(ROOT / "tests/bench/overhead.py"), "--serve-upstream"))
        stack.enter_context(process(str(ROOT / "tests/support/scripted_worker.py"), "--socket", str(socket)))
        gateway = stack.enter_context(
            process(
                "-m", "guard_middleware.cli", "serve", "--config", str(settings), "--upstream", direct, "--port", "0"
            )
        )
        naive = stack.enter_context(
            process(str(ROOT / "tests/bench/naive_proxy.py"), "--upstream", direct, "--worker", str(socket))
        )
        rows = table(uvloop.run(measure({"direct": direct, "gateway": gateway, "naive": naive}, options.rounds)))
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        show(rows)
    for miss in missed(rows):
        print(f"missed: {miss}", file=sys.stderr)
    return int(bool(missed(rows)))


if __name__ == "__main__":
    sys.exit(main())
