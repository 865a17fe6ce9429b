"""Keeps one worker process alive: starts it, restarts it with exponential back-off, and ends it with this process.

The child's stdin is a pipe that is never written: with ``--exit-with-parent`` the worker leaves when the pipe
closes, which happens however this process dies. Its output is passed on line by line as events, and the last
lines of stderr are kept, so that a worker that cannot start says why. It is ready when it says so itself, on its own
stdout: whoever else listens at its socket may be anybody.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.guard.client import GuardClient

logger = logging.getLogger(__name__)

_TAIL_LINES = 30
_LINE_BYTES = 64 * 1024
#: what a worker says when it can moderate, perhaps behind what a library wrote without ending its line
_READY = "worker ready model="


@dataclass(frozen=True, slots=True)
class WorkerEvent:
    """``log`` carries a ``line`` of the worker's output; ``exited`` its ``returncode`` and the ``delay`` (seconds)
    before the next start, None if there is none."""

    kind: Literal["started", "ready", "exited", "log"]
    pid: int
    line: str = ""
    returncode: int | None = None
    delay: float | None = None


@dataclass(frozen=True, slots=True)
class Backoff:
    """Seconds: the first delay, its bound, and how long a worker must have been ready for the delay to start over."""

    first: float = 0.5
    limit: float = 30.0
    healthy: float = 60.0


def worker_command(
    model: str, socket: str | Path, *, threads: int | None = None, options: Sequence[str] = ()
) -> list[str]:
    """The command of a worker that ends with the process that starts it."""
    command = [sys.executable, "-m", "guard_middleware.worker", "--model", model, "--socket", str(socket)]
    return [*command, "--exit-with-parent", *(["--threads", str(threads)] if threads is not None else []), *options]


async def _nothing_against_it() -> str | None:
    return None


class WorkerProcess:
    """One supervised worker. ``argv`` is the whole command; ``socket`` the address that it then serves.

    A worker that was ready and then does not answer ``/health`` for ``hung_after`` seconds is killed and restarted.
    ``check`` says before each restart what speaks against it, None for nothing; it is asked again after the next delay.
    """

    def __init__(
        self,
        argv: Sequence[str],
        socket: str | Path,
        *,
        on_event: Callable[[WorkerEvent], None] | None = None,
        check: Callable[[], Awaitable[str | None]] = _nothing_against_it,
        backoff: Backoff | None = None,
        grace: float = 5.0,
        hung_after: float = 30.0,
    ) -> None:
        self._argv, self._client = list(argv), GuardClient(socket)
        self._on_event, self._check = on_event or (lambda event: None), check
        self._backoff, self._grace, self._hung_after = backoff or Backoff(), grace, hung_after
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._ready = asyncio.Event()
        self._ready_at: float | None = None
        self._exited = asyncio.Event()
        self._stopping = False
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        """The living worker's process id."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    async def start(self) -> None:
        """Starts the worker and its supervision, once; raises ``OSError`` where the command cannot be run at all."""
        if self._task is not None:
            return
        await self._spawn()
        self._task = asyncio.create_task(self._supervise(), name="guard-supervisor")

    async def wait_ready(self, seconds: float) -> None:
        """Returns once the worker can moderate.

        Raises ``GuardError(unavailable)`` with the last lines of its stderr if it exits first, or is not ready in
        ``seconds``. A worker that exited is still being restarted.
        """
        exited = asyncio.create_task(self._exited.wait())
        ready = asyncio.create_task(self._ready.wait())
        try:
            done, _ = await asyncio.wait({exited, ready}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            exited.cancel()
            ready.cancel()
        if ready in done:
            return
        what = "exited before it was ready" if done else f"was not ready within {seconds:g} s"
        last = "\n".join(f"  {line}" for line in self._tail) or "  (no output)"
        raise GuardError(GuardErrorKind.UNAVAILABLE, f"the guard worker {what}; its last output:\n{last}")

    async def stop(self) -> None:
        """Ends the worker: SIGTERM, and SIGKILL after the grace. No restart follows."""
        self._stopping = True
        if self._process is not None and self._process.returncode is None:
            await _end(self._process, self._grace)
            if self._task is not None:
                await asyncio.wait({self._task}, timeout=1.0)  # it passes on the last output
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _spawn(self) -> asyncio.subprocess.Process:
        self._process = await asyncio.create_subprocess_exec(
            *self._argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES,
            start_new_session=True,  # Ctrl-C is for this process, which ends the worker; uvloop has no process_group
        )
        self._emit(WorkerEvent("started", self._process.pid))
        return self._process

    async def _supervise(self) -> None:
        delay = self._backoff.first
        while True:
            process = self._process
            assert process is not None
            ready_for = await self._watch(process)
            if ready_for >= self._backoff.healthy:
                delay = self._backoff.first
            ended = WorkerEvent("exited", process.pid, returncode=process.returncode)
            if self._stopping:
                self._emit(ended)
                return
            self._emit(replace(ended, delay=delay))
            while True:
                await asyncio.sleep(delay)
                delay = min(delay * 2, self._backoff.limit)
                against = await self._check()
                if against is not None:
                    logger.error("the guard worker is not started again: %s; next attempt in %.1f s", against, delay)
                    self._tail.append(against)
                    continue
                try:
                    await self._spawn()
                    break
                except OSError:
                    logger.exception("the guard worker cannot be started; next attempt in %.1f s", delay)
            self.restarts += 1
            self._exited.clear()

    async def _watch(self, process: asyncio.subprocess.Process) -> float:
        """Until the process ends; the seconds for which it was ready."""
        assert process.stdout is not None
        assert process.stderr is not None
        loop = asyncio.get_running_loop()
        self._ready_at = None
        output = [
            asyncio.create_task(self._pass_on(process.pid, process.stdout, self._hear)),
            asyncio.create_task(self._pass_on(process.pid, process.stderr, lambda pid, line: self._tail.append(line))),
        ]
        probe = asyncio.create_task(self._kill_if_hung(process))
        try:
            await process.wait()
            ended = loop.time()
            await asyncio.wait(output, timeout=0.5)  # a grandchild may hold the pipes open
            return 0.0 if self._ready_at is None else ended - self._ready_at
        finally:
            self._ready.clear()
            self._exited.set()
            for task in (*output, probe):
                task.cancel()

    def _hear(self, pid: int, line: str) -> None:
        if _READY in line and self._ready_at is None:
            self._ready_at = asyncio.get_running_loop().time()
            self._ready.set()
            self._emit(WorkerEvent("ready", pid))

    async def _kill_if_hung(self, process: asyncio.subprocess.Process) -> None:
        await self._ready.wait()
        loop = asyncio.get_running_loop()
        answered = loop.time()
        while True:
            await asyncio.sleep(self._hung_after / 6)
            if await self._client.alive():
                answered = loop.time()
            elif loop.time() - answered >= self._hung_after:
                logger.error("worker %d has not answered for %.0f s and is killed", process.pid, self._hung_after)
                process.kill()
                return

    async def _pass_on(self, pid: int, stream: asyncio.StreamReader, hear: Callable[[int, str], None]) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # a line beyond the limit; readline has dropped what it held of it
                continue
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip()
            self._emit(WorkerEvent("log", pid, line=text))
            hear(pid, text)

    def _emit(self, event: WorkerEvent) -> None:
        try:
            self._on_event(event)
        except Exception:
            logger.exception("the listener to worker events failed")


async def _end(process: asyncio.subprocess.Process, grace: float) -> None:
    process.terminate()
    try:
        async with asyncio.timeout(grace):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
