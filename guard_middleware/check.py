"""``guard-gateway check``: rows in, one verdict per row out, from the same worker that the gateway uses."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from guard_middleware.errors import ConfigError, GuardError, GuardErrorKind, RequestRejected
from guard_middleware.guard.client import GuardClient
from guard_middleware.guard.supervisor import WorkerProcess, worker_command
from guard_middleware.limits import Limits
from guard_middleware.media import canonicalise
from guard_middleware.strictjson import StrictJSONError, loads
from guard_middleware.types import Blob, Conversation, Message, Part, Source, Text, Verdict
from guard_middleware.wire import ModerationRequest

#: rows in flight: enough to fill the worker's batches
_CONCURRENCY = 16
_START_SECONDS = 300.0
#: the operator's own pictures: larger than what a stranger may send
_LIMITS = Limits(image_bytes=64 * 1024 * 1024, image_pixels=100_000_000)


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


def rows(lines: Iterable[bytes], name: str) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file; raises ``ConfigError`` with the line of a row that is not one.

    A row without an ``id`` gets the number of its line.
    """
    remedy = 'a row looks like {"id": "1", "prompt": "...", "response": null, "image": "picture.png"}'
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = loads(line)
        except StrictJSONError:
            raise ConfigError(
                "not JSON (in UTF-8, without NaN, each key once)", path=name, line=number, remedy=remedy
            ) from None
        text = ("prompt", "response", "image")
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str | None) for key in text):
            raise ConfigError("not a row of strings", path=name, line=number, remedy=remedy)
        if not (row.get("prompt") or row.get("image")):
            raise ConfigError("a row without prompt and image", path=name, line=number, remedy=remedy)
        id = number if row.get("id") is None else row["id"]
        if not isinstance(id, str | int):
            raise ConfigError("an id that is neither text nor a number", path=name, line=number, remedy=remedy)
        yield {**row, "id": str(id)}


async def judge(client: GuardClient, row: dict[str, Any], *, base: Path, deadline: float) -> Verdict | GuardError:
    """The verdict on one row; a picture that cannot be read is a ``GuardError(media)`` of that row."""
    try:
        parts: list[Part] = []
        if row.get("image"):
            parts.append(await asyncio.to_thread(_picture, row["image"], base))
        if row.get("prompt"):
            parts.append(Text(row["prompt"]))
    except (OSError, RequestRejected) as error:
        return GuardError(GuardErrorKind.MEDIA, getattr(error, "message", None) or type(error).__name__)
    answer = None if row.get("response") is None else Message("assistant", (Text(row["response"]),))
    conversation = Conversation((Message("user", tuple(parts)),), answer=answer)
    source: Source = "input" if answer is None else "output"
    return await client.moderate(ModerationRequest(row["id"], conversation, source, deadline))


def _picture(path: str, base: Path) -> Blob:
    """A path is relative to the file of rows, or else to the current directory."""
    beside = base / path
    return canonicalise((beside if beside.exists() else Path(path)).read_bytes(), _LIMITS)


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
