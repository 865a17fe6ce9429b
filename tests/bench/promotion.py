"""What a change of weights costs the requests that are served meanwhile.

    python -m tests.bench.promotion [--rate 50] [--verdict 0.2] [--seconds 10] [--json FILE]

``guard-gateway serve`` with a weights directory and scripted weights whose every verdict takes ``--verdict`` seconds;
everything else is the product's: processes, sockets, state file, golden set, shadow share, commands. Requests start at
a fixed rate whatever becomes of the earlier ones, and are timed from the moment at which they were due. A quarter is
streamed, a tenth harmful; each has two verdicts, one before and one after the upstream, which answers at once.

Phases: ``before``; ``staging`` (the new worker is started and tried beside the old one); ``shadow``; ``promotion``
(from the order to two verdict times after it was carried out); ``after`` (the old worker ends); ``rollback`` (the old
weights are loaded again and promoted); ``at the end``. ``longest added`` is the slowest benign request less the median
of ``before``; ``stall`` is how late this program's own clock was at most, which is the machine's doing and no
gateway's: where it is not small, the run says little. ``unguarded`` counts requests that reached the upstream, or came
back from it, without a verdict.

Targets: in promotion and rollback 0 failed, 0 unguarded, longest added below 2 verdict times. Exits 1 where one is
missed. Takes about 2 minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table

from tests.support import weights
from tests.support.gateway import CHAT, GOOD, Gateway, Upstream, chat, command, unique

TARGETS = ("promotion", "rollback")
#: the record of a request that never got one
NOTHING: dict[str, Any] = {"decisions": [], "bypassed": []}


@dataclass(frozen=True)
class Asked:
    model: str
    phase: str
    benign: bool
    seconds: float
    status: int
    text: str


@dataclass
class Row:
    phase: str
    requests: int
    failed: int
    unguarded: int
    median_ms: float
    p99_ms: float
    longest_added_ms: float
    stall_ms: float
    revisions: list[str] = field(default_factory=list)


class Load:
    """Requests at a fixed rate; ``phase`` is that of those which start now."""

    def __init__(self, url: str, rate: float) -> None:
        self.phase, self.done, self.stalls = "warm-up", list[Asked](), dict[str, float]()
        self._url, self._rate, self._running = url, rate, True

    async def run(self) -> None:
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session, asyncio.TaskGroup() as group:
            began, number = time.perf_counter(), 0
            group.create_task(self._tick())
            while self._running:
                due = began + number / self._rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(self._one(session, number, due))
                number += 1

    async def _tick(self) -> None:
        while self._running:
            due = time.perf_counter() + 0.01
            await asyncio.sleep(0.01)
            self.stalls[self.phase] = max(self.stalls.get(self.phase, 0.0), time.perf_counter() - due)

    def stop(self) -> None:
        self._running = False

    async def _one(self, session: aiohttp.ClientSession, number: int, due: float) -> None:
        model, phase, benign = unique("good"), self.phase, number % 10 != 9
        text = f"how do I bake bread {number}?" if benign else f"how do I pick a lock {number}?"
        try:
            async with session.post(f"{self._url}{CHAT}", json=chat(text, model, stream=number % 4 == 0)) as response:
                status, said = response.status, await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            status, said = 0, type(error).__name__
        self.done.append(Asked(model, phase, benign, time.perf_counter() - due, status, said))


async def said(gateway: Gateway, *argv: str) -> str:
    """``guard-gateway weights``, as an operator beside the gateway."""
    done = await asyncio.to_thread(
        subprocess.run,
        [*command(), "weights", *argv, "--config", str(gateway.config)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"weights {argv[0]}: {done.stdout}{done.stderr}")
    return done.stdout


async def measure(gateway: Gateway, options: argparse.Namespace) -> tuple[list[Asked], dict[str, float]]:
    load = Load(gateway.url, options.rate)
    running = asyncio.create_task(load.run())

    async def phase(name: str, seconds: float, *argv: str) -> None:
        load.phase = name
        if argv:
            print(f"{name}: {(await said(gateway, *argv)).splitlines()[-1]}", flush=True)
        await asyncio.sleep(seconds)

    await phase("warm-up", 2.0)
    await phase("before", options.seconds)
    await phase("staging", 1.0, "stage", "new")
    await phase("shadow", options.seconds)
    await phase("promotion", 2 * options.verdict, "promote")
    await phase("after", options.seconds)
    await phase("rollback", 2 * options.verdict, "rollback")
    await phase("at the end", options.seconds / 2)
    load.stop()
    await running
    return [one for one in load.done if one.phase != "warm-up"], load.stalls


def table(asked: list[Asked], stalls: dict[str, float], gateway: Gateway, upstream: Upstream) -> list[Row]:
    records = {record["model"]: record for record in gateway.records()}
    reached = {seen.model for seen in upstream.seen}
    base = statistics.median(one.seconds for one in asked if one.phase == "before" and one.benign)
    rows = []
    for phase in dict.fromkeys(one.phase for one in asked):
        mine = [one for one in asked if one.phase == phase]
        benign = sorted(one.seconds for one in mine if one.benign)
        rows.append(
            Row(
                phase,
                len(mine),
                sum(one.status != (200 if one.benign else 400) for one in mine),
                sum(unguarded(one, records.get(one.model, NOTHING), one.model in reached) for one in mine),
                statistics.median(benign) * 1e3,
                benign[int(len(benign) * 0.99)] * 1e3,
                (benign[-1] - base) * 1e3,
                stalls[phase] * 1e3,
                sorted({v["revision"] for one in mine for v in verdicts(records.get(one.model, NOTHING))}),
            )
        )
    return rows


def verdicts(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [decision["verdict"] for decision in record["decisions"] if decision["verdict"] is not None]


def unguarded(one: Asked, record: dict[str, Any], reached: bool) -> bool:
    """Whether anything passed without its own verdict, by what the upstream and the client saw themselves."""
    found = {decision["source"] for decision in record["decisions"] if decision["verdict"] is not None}
    passed = {"input"} if reached else set()
    passed |= {"output"} if GOOD.split()[0] in one.text else set()
    return bool(passed - found) or bool(record["bypassed"]) or (reached and not one.benign)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=50.0, help="requests per second (default %(default)g)")
    parser.add_argument("--verdict", type=float, default=0.2, help="seconds that a verdict takes (default %(default)g)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the phases without an order")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, Upstream() as upstream:
        folder = Path(name)
        for weight in ("old", "new"):
            weights.revision(folder / "weights", weight, seconds=options.verdict)
        section = {
            "directory": str(folder / "weights"),
            "golden": str(weights.golden_set(folder)),
            "keep": f"{max(1, int(options.seconds / 4))}s",
        }
        config = {"worker": {"model": str(folder / "weights" / "old"), "weights": section}}
        argv = [sys.executable, str(Path(weights.__file__))]
        with Gateway(folder, upstream.url, folder, config, argv) as gateway:
            asked, stalls = asyncio.run(measure(gateway, options))
        rows, compared = (
            table(asked, stalls, gateway, upstream),
            len(gateway.lines_of("shadow")),
        )  # the log is whole by now
    for one in asked:
        if one.status != (200 if one.benign else 400):
            print(f"{one.phase}: {one.status} after {one.seconds:.1f} s: {one.text[:200]}")
    bound = 2 * options.verdict * 1e3
    shown = Table(
        title=f"{options.rate:g} requests/s, {options.verdict * 1e3:g} ms per verdict, {compared} copies compared"
    )
    for column in (
        "phase",
        "requests",
        "failed",
        "unguarded",
        "median ms",
        "p99 ms",
        "longest added ms",
        "stall ms",
        "revisions",
    ):
        shown.add_column(column, justify="left" if column in ("phase", "revisions") else "right")
    missed = []
    for row in rows:
        if row.phase in TARGETS and (row.failed or row.unguarded or row.longest_added_ms >= bound):
            missed.append(row.phase)
        added = f"{row.longest_added_ms:.0f}" + (f" (< {bound:.0f})" if row.phase in TARGETS else "")
        shown.add_row(row.phase, str(row.requests), str(row.failed), str(row.unguarded), f"{row.median_ms:.0f}",
                      f"{row.p99_ms:.0f}", added, f"{row.stall_ms:.0f}", ", ".join(row.revisions))  # fmt: skip
    Console(width=120).print(shown)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(f"missed: {', '.join(missed)}" if missed else "targets met")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
