"""Measures a guard as it serves: starts its worker, asks it about every row over the Unix socket, counts.

Per source, because label meanings differ between sources and one pooled number would say nothing. A guard error (no
verdict) counts as wrong on either side.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.types import Verdict
from guard_middleware.wire import CONTENT_TYPE, ModerationRequest, decode_answer, encode_request
from guard_training.corpus.conversation import conversation
from guard_training.corpus.rows import Row, read_rows
from guard_training.evaluation.stats import Rate, confusion, f1_interval, percentile

START_SECONDS = 120.0
DEADLINE_SECONDS = 120.0


class WorkerFailed(RuntimeError):
    """The worker did not start; the message holds the end of its log."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One row and what came of it. ``seconds`` is from sending to answer, the worker's queue included."""

    row: Row
    outcome: Verdict | GuardError
    seconds: float


@contextlib.contextmanager
def worker(model: str) -> Iterator[str]:
    """A worker process that serves ``model``; gives the path of its socket once it is ready."""
    with tempfile.TemporaryDirectory(prefix="guard-evaluate-") as folder:
        socket, log = f"{folder}/worker.sock", Path(folder) / "log"
        command = [sys.executable, "-m", "guard_middleware.worker", "--model", model, "--socket", socket]
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)  # noqa: S603
        try:
            _wait(process, socket, log)
            yield socket
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], socket: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(transport=httpx.HTTPTransport(uds=socket), base_url="http://worker") as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                break
            # httpx leaks a socket for each attempt at a path where nobody listens yet.
            if Path(socket).exists():
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/ready").status_code == 200:
                        return
            time.sleep(0.2)
    raise WorkerFailed(f"the worker did not start:\n{log.read_text(errors='replace')[-2000:]}")


async def ask_all(rows: Sequence[Row], socket: str, *, concurrency: int, progress: Progress) -> list[Asked]:
    """Every row's outcome, in order; at most ``concurrency`` questions under way. Overload is asked again."""
    task, slots = progress.add_task("asking the guard", total=len(rows)), asyncio.Semaphore(concurrency)
    transport = httpx.AsyncHTTPTransport(uds=socket)
    async with httpx.AsyncClient(transport=transport, base_url="http://worker", timeout=DEADLINE_SECONDS) as client:

        async def one(number: int, row: Row) -> Asked:
            source = "output" if row.response and row.response_label else "input"
            frame = encode_request(
                ModerationRequest(
                    id=str(number),
                    conversation=conversation(row),
                    source="output" if source == "output" else "input",
                    deadline=DEADLINE_SECONDS,
                )
            )
            async with slots:
                while True:
                    start = time.perf_counter()
                    answer = await client.post("/v1/moderate", content=frame, headers={"content-type": CONTENT_TYPE})
                    if answer.status_code != 503:
                        break
                    await asyncio.sleep(float(answer.headers.get("retry-after", "1")))
            seconds = time.perf_counter() - start
            progress.advance(task)
            return Asked(row, decode_answer(answer.content)[1], seconds)

        return await asyncio.gather(*(one(number, row) for number, row in enumerate(rows)))


def sample(rows: Sequence[Row], limit: int | None, seed: int = 0) -> list[Row]:
    """At most ``limit`` rows of each source, drawn from a fixed seed."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.source].append(row)
    rng = random.Random(seed)  # noqa: S311
    return [
        row for kept in groups.values() for row in (rng.sample(kept, limit) if limit and limit < len(kept) else kept)
    ]


def summarise(asked: Sequence[Asked], model: str) -> dict[str, Any]:
    """The figures as JSON values: one entry per source and side, and the totals that are not accuracies."""
    groups: dict[tuple[str, str], list[tuple[bool, bool | None]]] = defaultdict(list)
    for one in asked:
        verdict = one.outcome if isinstance(one.outcome, Verdict) else None
        if one.row.request:
            called = None if verdict is None else verdict.request == "harmful"
            groups[one.row.source, "request"].append((one.row.request == "harmful", called))
        if one.row.response_label and one.row.response:
            called = None if verdict is None else verdict.response == "harmful"
            groups[one.row.source, "response"].append((one.row.response_label == "harmful", called))
    verdicts = [one.outcome for one in asked if isinstance(one.outcome, Verdict)]
    errors = Counter(one.outcome.kind.value for one in asked if isinstance(one.outcome, GuardError))
    formless = errors[GuardErrorKind.UNPARSEABLE.value] + errors[GuardErrorKind.TRUNCATED.value]
    reasoning = [verdict.usage.reasoning for verdict in verdicts]
    return {
        "model": verdicts[0].model if verdicts else model,
        "revision": verdicts[0].revision if verdicts else None,
        "rows": len(asked),
        "format_compliance": _rate(Rate(len(asked) - formless, len(asked))),
        "errors": dict(errors),
        "mean_reasoning_tokens": sum(reasoning) / len(reasoning) if reasoning else None,
        "seconds": {
            name: percentile([one.seconds for one in asked], share) for name, share in (("median", 0.5), ("p95", 0.95))
        },
        "sources": [_source(source, side, pairs) for (source, side), pairs in sorted(groups.items())],
    }


def _source(source: str, side: str, pairs: Sequence[tuple[bool, bool | None]]) -> dict[str, Any]:
    counts = confusion(pairs)
    both = 0 < sum(is_ for is_, _ in pairs) < len(pairs)
    return {
        "source": source,
        "side": side,
        "rows": len(pairs),
        "harmful": sum(is_ for is_, _ in pairs),
        "errors": sum(called is None for _, called in pairs),
        "recall": _rate(counts.recall),
        "false_positive_rate": _rate(counts.false_positive_rate),
        "precision": _rate(counts.precision) if both else None,
        "f1": {"value": counts.f1, "interval": f1_interval(pairs)} if both else None,
    }


def _rate(rate: Rate) -> dict[str, Any] | None:
    return {"value": rate.value, "interval": rate.interval, "n": rate.total} if rate.total else None


def cell(rate: dict[str, Any] | None) -> str:
    """``62.1 (55.9-67.9)`` in per cent, or a dash."""
    if rate is None or rate["value"] is None:
        return "-"
    low, high = rate["interval"]
    return f"{100 * rate['value']:.1f} ({100 * low:.1f}-{100 * high:.1f})"


COLUMNS = ("source", "judged", "rows", "harmful", "recall", "false positives", "precision", "F1")


def cells(entry: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    rates = (entry["recall"], entry["false_positive_rate"], entry["precision"], entry["f1"])
    return (entry["source"], entry["side"], str(entry["rows"]), str(entry["harmful"]), *(cell(rate) for rate in rates))


def print_table(summary: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{summary['model']} {summary['revision']}: per cent, with 95 % intervals")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number < 2 else "right")
    for entry in summary["sources"]:
        table.add_row(*cells(entry))
    console.print(table)
    seconds = summary["seconds"]
    console.print(
        f"{summary['rows']} rows; format compliance {cell(summary['format_compliance'])}; "
        f"errors {summary['errors'] or 'none'}; "
        f"mean reasoning tokens {summary['mean_reasoning_tokens'] or 0:.1f}; "
        f"seconds per answer under load: median {seconds['median'] or 0:.2f}, p95 {seconds['p95'] or 0:.2f}"
    )


def evaluate(data: Path, model: str, *, limit: int | None, concurrency: int, console: Console) -> dict[str, Any]:
    """Measures ``model`` on a data file and prints the table; returns the figures."""
    rows = sample(read_rows(data), limit)
    with Progress(console=console) as progress, worker(model) as socket:
        asked = asyncio.run(ask_all(rows, socket, concurrency=concurrency, progress=progress))
    summary = {"data": data.name, "limit": limit, **summarise(asked, model)}
    print_table(summary, console)
    return summary


def write_json(summary: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
