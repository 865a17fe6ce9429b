"""Measures a guard as it serves: starts its worker and asks it about every row over the Unix socket.

What it says is an ``Outcome`` per row, written down as it comes, so that a killed run goes on; ``metrics`` counts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import Progress

from guard_middleware.errors import ConfigError, GuardError
from guard_middleware.types import REASON, Judging, Verdict
from guard_middleware.wire import CONTENT_TYPE, ModerationRequest, WireError, decode_answer, encode_request
from guard_middleware.worker.weights import resolve
from guard_training.corpus.conversation import conversation
from guard_training.corpus.rows import Row
from guard_training.evaluation.outcomes import Outcome, from_json, outcome, to_json
from guard_training.journal import Journal

#: Weights of 7B from a cold disk, and vLLM's compilation, take minutes; a worker that ends is noticed at once.
START_SECONDS = 1800.0
DEADLINE_SECONDS = 120.0
_RUNNING = "unix:"


class WorkerFailed(ValueError):
    """The worker did not start; the message holds the end of its log."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One row and what came of it. ``seconds`` is from sending to answer, the worker's queue included."""

    row: Row
    outcome: Verdict | GuardError
    seconds: float


@contextlib.contextmanager
def worker(model: str, *, calibrated: bool = True) -> Iterator[str]:
    """A worker process that serves ``model``; gives the path of its socket once it is ready.

    ``calibrated`` false: with the guard's own scores. ``unix:SOCKET`` is a worker that runs already, and goes on.
    """
    if model.startswith(_RUNNING):
        if not calibrated:
            raise WorkerFailed("a worker that runs already gives the scores that it gives; name its model instead")
        yield model.removeprefix(_RUNNING)
        return
    with tempfile.TemporaryDirectory(prefix="guard-evaluate-") as folder:
        socket, log = f"{folder}/worker.sock", Path(folder) / "log"
        with log.open("wb") as out:
            # stdin is a pipe that closes when this process dies, however it does: no worker is left behind
            process = subprocess.Popen(  # noqa: S603
                _command(model, socket, calibrated), stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT
            )
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
            finally:
                if process.stdin:
                    process.stdin.close()


def _command(model: str, socket: str, calibrated: bool) -> list[str]:
    command = [sys.executable, "-m", "guard_middleware.worker", "--model", model, "--socket", socket]
    return [*command, "--exit-with-parent", "--calibration" if calibrated else "--no-calibration"]


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
    how = "ended" if process.poll() is not None else f"was not ready after {START_SECONDS:.0f} s"
    raise WorkerFailed(f"the worker did not start, it {how}:\n{log.read_text(errors='replace')[-2000:]}")


async def ask_all(
    rows: Sequence[Row],
    socket: str,
    *,
    concurrency: int,
    progress: Progress,
    done: Callable[[Asked], None] = lambda one: None,
    judging: Judging = REASON,
) -> list[Asked]:
    """Every row's outcome, in order; ``done`` is told each as it comes. At most ``concurrency`` questions under way.

    Overload is asked again. Raises ``httpx.TransportError`` where the worker goes away.
    """
    task, slots = progress.add_task("asking the guard", total=len(rows)), asyncio.Semaphore(concurrency)
    transport = httpx.AsyncHTTPTransport(uds=socket)
    async with httpx.AsyncClient(transport=transport, base_url="http://worker", timeout=DEADLINE_SECONDS) as client:

        async def one(number: int, row: Row) -> Asked:
            async with slots:
                frame = _frame(number, row, judging)
                while True:
                    start = time.perf_counter()
                    answer = await client.post("/v1/moderate", content=frame, headers={"content-type": CONTENT_TYPE})
                    if answer.status_code != 503:
                        break
                    await asyncio.sleep(float(answer.headers.get("retry-after", "1")))
            asked = Asked(row, decode_answer(answer.content)[1], time.perf_counter() - start)
            done(asked)
            progress.advance(task)
            return asked

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(number, row)) for number, row in enumerate(rows)]
        return [task.result() for task in tasks]


def _frame(number: int, row: Row, judging: Judging) -> bytes:
    """Made when its turn comes: the frames of all rows at once would hold every image in memory."""
    answered = bool(row.response and row.response_label)
    return encode_request(
        ModerationRequest(
            id=str(number),
            conversation=conversation(row),
            source="output" if answered else "input",
            deadline=DEADLINE_SECONDS,
            judging=judging,
        )
    )


def identity(model: str) -> tuple[str, str]:
    """Name and revision of what ``--model`` names, without loading it; raises ``WorkerFailed`` with the remedy."""
    if model.startswith(_RUNNING):
        return _running(model.removeprefix(_RUNNING))
    try:
        facts = resolve(model).facts
    except ConfigError as error:
        raise WorkerFailed(str(error)) from None
    return facts.name, facts.revision


def _running(socket: str) -> tuple[str, str]:
    try:
        if not Path(socket).exists():  # httpx leaks a socket where nobody listens
            raise LookupError
        with httpx.Client(transport=httpx.HTTPTransport(uds=socket), base_url="http://worker") as client:
            said = client.get("/ready").json()
        if said["ready"]:
            return str(said["model"]), str(said["revision"])
        why = said["why"]
    except (httpx.TransportError, ValueError, LookupError, TypeError) as error:
        why = str(error) or "nobody listens"
    raise WorkerFailed(f"no worker is ready at {socket} ({why}); start one with python -m guard_middleware.worker")


def measure(
    rows: Sequence[Row],
    model: str,
    *,
    concurrency: int,
    console: Console,
    journal: Path | None = None,
    judging: Judging = REASON,
    calibrated: bool = True,
) -> list[Outcome]:
    """What ``model`` says about every row, in order, by ``judging``; ``calibrated`` false: with its own scores.

    With ``journal`` each answer is written down at once, and one that is there, for the same row and revision, is not
    asked for again: a killed run goes on. Raises ``WorkerFailed`` where the worker does not start or goes away.
    """
    name, revision = identity(model)
    asked = revision if judging == REASON and calibrated else f"{revision}/{judging}/{calibrated}"
    with contextlib.ExitStack() as stack:
        book = stack.enter_context(Journal(journal)) if journal else None
        known = {line["id"]: from_json(line["outcome"]) for line in book} if book else {}
        due = [row for row in rows if _key(row, asked) not in known]
        if len(due) < len(rows):
            told = f"{len(rows) - len(due)} of {len(rows)} rows are in {journal}; {len(due)} are left to ask"
            console.print(told, markup=False)

        def done(one: Asked) -> None:
            said = outcome(one.row, one.outcome, seconds=one.seconds, model=name, revision=revision)
            known[_key(one.row, asked)] = said
            if book:
                book.append({"id": _key(one.row, asked), "outcome": to_json(said)})

        if due:
            progress = stack.enter_context(Progress(console=console))
            socket = stack.enter_context(worker(model, calibrated=calibrated))
            try:
                asyncio.run(
                    ask_all(due, socket, concurrency=concurrency, progress=progress, done=done, judging=judging)
                )
            except ExceptionGroup as group:
                error = group.exceptions[0]
                if not isinstance(error, httpx.TransportError | WireError):
                    raise
                answered = sum(_key(row, asked) in known for row in rows)
                raise WorkerFailed(_gone(answered, len(rows), error, journal)) from None
    return [known[_key(row, asked)] for row in rows]


def _key(row: Row, revision: str) -> str:
    """Row id, what the guard is shown of the row, and the revision (and how it was asked, where not as usual)."""
    image = _digest(row.image) if row.image else None
    shown = json.dumps([row.source, row.prompt, row.request, row.response, row.response_label, image])
    return f"{row.id}@{revision}#{hashlib.sha256(shown.encode()).hexdigest()[:16]}"


@functools.lru_cache(maxsize=16384)
def _digest(image: Path) -> str:
    return hashlib.sha256(image.read_bytes()).hexdigest()


def _gone(answered: int, total: int, error: BaseException, journal: Path | None) -> str:
    remedy = f"; the same command goes on from {journal}" if journal else ""
    return f"the worker went away after {answered} of {total} rows ({type(error).__name__}){remedy}"
