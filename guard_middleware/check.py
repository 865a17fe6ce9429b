"""``guard-gateway check``: rows in, one verdict per row out, from the same worker that the gateway uses."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from guard_middleware.cases import judge
from guard_middleware.errors import GuardError
from guard_middleware.guard.client import GuardClient
from guard_middleware.guard.supervisor import WorkerProcess, worker_command
from guard_middleware.types import Verdict

#: rows in flight: enough to fill the worker's batches
_CONCURRENCY = 16
_START_SECONDS = 300.0


@asynccontextmanager
async def worker(model: str, *, url: str | None = None, threads: int | None = None) -> AsyncIterator[GuardClient]:
    """A client of a worker of ``model`` that lives as long as the context, or of the one that runs at ``url``."""
    if url is not None:
        client = GuardClient(url)
        try:
            yield client
        finally:
            await client.aclose()
        return
    with tempfile.TemporaryDirectory(prefix="guard-") as folder:
        socket = str(Path(folder) / "worker.sock")
        process, client = WorkerProcess(worker_command(model, socket, threads=threads), socket), GuardClient(socket)
        try:
            await process.start()
            await process.wait_ready(_START_SECONDS)
            yield client
        finally:
            await client.aclose()
            await process.stop()


def line(id: str, outcome: Verdict | GuardError) -> dict[str, Any]:
    """The output row: labels and scores are null exactly where ``error`` is not."""
    if isinstance(outcome, GuardError):
        labels = dict.fromkeys(
            ("request", "response", "request_score", "response_score", "reasoning", "tokens", "model")
        )
        return {"id": id, **labels, "error": {"kind": outcome.kind.value, "message": outcome.message}}
    return {
        "id": id,
        "request": outcome.request,
        "response": outcome.response,
        "request_score": outcome.request_score,
        "response_score": outcome.response_score,
        "reasoning": outcome.reasoning,
        "tokens": outcome.usage.completion,
        "model": f"{outcome.model}@{outcome.revision}",
        "error": None,
    }


async def check_rows(
    source: list[dict[str, Any]],
    out: TextIO,
    *,
    base: Path,
    model: str,
    url: str | None,
    threads: int | None,
    deadline: float,
) -> int:
    """Writes one line per row, in the rows' order; returns the number of rows without a verdict."""
    errors = 0
    async with worker(model, url=url, threads=threads) as client:
        slots = asyncio.Semaphore(_CONCURRENCY)

        async def one(row: dict[str, Any]) -> Verdict | GuardError:
            async with slots:
                return await judge(client, row, base=base, deadline=deadline)

        columns = (TextColumn("judging"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("judging", total=len(source))
            tasks = [asyncio.create_task(one(row)) for row in source]
            for row, task in zip(source, tasks, strict=True):
                outcome = await task
                errors += isinstance(outcome, GuardError)
                out.write(json.dumps(line(row["id"], outcome)) + "\n")
                out.flush()
                progress.advance(bar)
    return errors


def show(console: Console, outcome: Verdict | GuardError) -> None:
    """One case for a human."""
    if isinstance(outcome, GuardError):
        console.print(f"no verdict: {outcome.kind.value}", style="bold red", highlight=False)
        console.print(outcome.message, markup=False)
        return
    for name, label, score in (
        ("request", outcome.request, outcome.request_score),
        ("response", outcome.response, outcome.response_score),
    ):
        if label is not None:
            style = "bold red" if label == "harmful" else "green"
            console.print(f"{name:<9} [{style}]{label}[/] (score {score:.3f})", highlight=False)
    for number, text in enumerate(outcome.drawn_text, start=1):
        console.print(f"text drawn in image {number}: {text or '(none)'}", markup=False, style="dim")
    console.print(outcome.reasoning, markup=False)
    seconds = ", ".join(f"{stage} {value:.2f} s" for stage, value in outcome.timings)
    console.print(f"{outcome.usage.completion} tokens, {seconds}; {outcome.model}@{outcome.revision}", style="dim")
