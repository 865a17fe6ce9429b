"""Dynamic batching of guard questions onto an engine that runs one batch at a time.

A bounded queue (prompts and tokens) feeds batches of at most ``max_batch``. A batch is formed greedily
whenever the engine becomes free, lowest priority number first and among equals nearest deadline, so an idle
worker answers at once and a busy one fills its batches by itself; no timer waits for company. Prompts that
nobody waits for any more (deadline over, caller gone) leave the queue unrun, and in a running batch are
flagged, so that the engine drops them at its next step.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from guard_middleware.errors import GuardError, GuardErrorKind

logger = logging.getLogger(__name__)

P = TypeVar("P")
R = TypeVar("R")
P_in = TypeVar("P_in", contravariant=True)
R_out = TypeVar("R_out", covariant=True)

#: ``retry_after`` stays within these seconds, whatever the estimate says
_RETRY_MIN, _RETRY_MAX = 0.5, 60.0
#: weight of the newest batch in the measured service time
_SMOOTHING = 0.3


class RunBatch(Protocol[P_in, R_out]):
    """What the engine thread does with a batch: one result or exception per prompt, in order.

    ``cancelled(i)`` may be asked at any time from that thread; true means that prompt ``i`` is not worth
    another step.
    """

    def __call__(
        self, prompts: Sequence[P_in], cancelled: Callable[[int], bool], /
    ) -> Sequence[R_out | BaseException]: ...


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """``queue_tokens`` bounds the prompt tokens waiting, ``queue`` the prompts waiting (running ones excluded);
    ``batch`` is how many run at once, on all ranks of an engine together."""

    batch: int = 8
    queue: int = 64
    queue_tokens: int = 262_144


@dataclass(slots=True, eq=False)
class _Job(Generic[P, R]):
    prompt: P
    tokens: int
    deadline: float
    future: asyncio.Future[R | GuardError]
    queued_at: float
    priority: int = 0
    started_at: float | None = None
    abandoned: bool = field(default=False)  # written by the loop, read by the engine thread


@dataclass(frozen=True, slots=True)
class Ran(Generic[R]):
    """What came of one prompt, and the seconds that it waited and ran."""

    result: R | GuardError
    queue_seconds: float
    run_seconds: float


class Batcher(Generic[P, R]):
    """Owns the queue and the one engine thread. Use from one event loop: ``start``, ``submit``..., ``aclose``."""

    def __init__(
        self, run: RunBatch[P, R], limits: BatchLimits, *, on_batch: Callable[[int, float], None] | None = None
    ) -> None:
        self._run, self._limits = run, limits
        self._on_batch = on_batch or (lambda size, seconds: None)
        self._waiting: dict[_Job[P, R], None] = {}  # in order of arrival; an abandoned job leaves at once
        self._queued_tokens = 0
        self._running: list[_Job[P, R]] = []
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="guard-engine")
        self._task: asyncio.Task[None] | None = None
        self._seconds_per_prompt: float | None = None
        self._busy_until = 0.0

    @property
    def queued(self) -> int:
        """Prompts that wait."""
        return len(self._waiting)

    @property
    def queued_tokens(self) -> int:
        return self._queued_tokens

    @property
    def running(self) -> int:
        """Prompts in the batch that the engine runs now."""
        return len(self._running)

    def stalled(self, now: float) -> float:
        """Seconds since the running batch's last deadline passed; 0 while it may still be of use to somebody.

        An engine that honours ``cancelled`` ends such a batch within a step, so a large value means that it hangs.
        """
        return max(0.0, now - self._busy_until) if self._running else 0.0

    def start(self) -> None:
        self._task = asyncio.create_task(self._loop(), name="guard-batcher")

    async def aclose(self) -> None:
        """Fails whatever waits or runs with ``unavailable``. Does not wait for a hung engine."""
        jobs = [*self._running, *self._waiting]
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for job in jobs:
            job.abandoned = True
            if not job.future.done():
                job.future.set_result(GuardError(GuardErrorKind.UNAVAILABLE, "the worker is stopping"))
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def submit(self, prompts: Sequence[tuple[P, int]], deadline: float, priority: int = 0) -> list[Ran[R]]:
        """What came of ``prompts`` ((prompt, tokens) pairs), in order, no later than ``deadline`` (loop time).

        A lower ``priority`` leaves the queue first, and among equals the nearer deadline.
        All are admitted, or ``GuardError(overloaded)`` is raised, with a ``retry_after`` measured from the recent
        service rate. A prompt that is not done at the deadline is a ``timeout``. Cancelling the caller abandons its
        prompts.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        self.admit(len(prompts), sum(tokens for _, tokens in prompts))
        jobs = [_Job(prompt, tokens, deadline, loop.create_future(), now, priority) for prompt, tokens in prompts]
        for job in jobs:
            self._waiting[job] = None
            self._queued_tokens += job.tokens
        self._wake.set()
        try:
            await asyncio.wait([job.future for job in jobs], timeout=max(0.0, deadline - now))
        finally:
            for job in jobs:
                self._abandon(job)
        done = loop.time()
        return [_ran(job, done) for job in jobs]

    def admit(self, prompts: int, tokens: int) -> None:
        """Raises ``GuardError(overloaded)`` where so many more cannot wait now; holds no place."""
        if not self._waiting:  # else a request larger than the queue could never run
            return
        if self.queued + prompts > self._limits.queue or self._queued_tokens + tokens > self._limits.queue_tokens:
            seconds = drain_seconds(self._seconds_per_prompt, self.queued + self.running)
            raise GuardError(GuardErrorKind.OVERLOADED, "the guard's queue is full", retry_after=seconds)

    def _abandon(self, job: _Job[P, R]) -> None:
        """Nobody waits for ``job`` any more."""
        job.abandoned = True
        job.future.cancel()
        self._leave_queue(job)
        if self._running and all(other.abandoned for other in self._running):
            self._busy_until = min(self._busy_until, asyncio.get_running_loop().time())

    def _leave_queue(self, job: _Job[P, R]) -> None:
        if job in self._waiting:
            del self._waiting[job]
            self._queued_tokens -= job.tokens

    def _next_batch(self, now: float) -> list[_Job[P, R]]:
        live = [job for job in self._waiting if job.deadline > now]  # a late one is answered by its submitter's timer
        batch = heapq.nsmallest(self._limits.batch, live, key=lambda job: (job.priority, job.deadline))
        for job in batch:
            job.started_at = now
            self._leave_queue(job)
        return batch

    async def _loop(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = self._next_batch(loop.time())
            if not batch:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._running, self._busy_until = batch, max(job.deadline for job in batch)
            started = loop.time()
            try:
                await self._run_batch(batch)
            finally:
                seconds = loop.time() - started
                self._running = []
            self._measure(len(batch), seconds)

    async def _run_batch(self, batch: list[_Job[P, R]]) -> None:
        results: Sequence[R | BaseException]
        try:
            results = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._run, [job.prompt for job in batch], lambda i: batch[i].abandoned
            )
            if len(results) != len(batch):
                raise RuntimeError(f"the engine answered {len(results)} of {len(batch)} prompts")
        except Exception as error:
            if not isinstance(error, GuardError):
                logger.exception("the engine failed on a batch of %d", len(batch))
            results = [error] * len(batch)
        for job, result in zip(batch, results, strict=True):
            if not job.future.done():
                job.future.set_result(as_guard_error(result) if isinstance(result, BaseException) else result)

    def _measure(self, size: int, seconds: float) -> None:
        self._seconds_per_prompt = smoothed(self._seconds_per_prompt, seconds / size)
        self._on_batch(size, seconds)


def _ran(job: _Job[P, R], done: float) -> Ran[R]:
    started = done if job.started_at is None else job.started_at
    result: R | GuardError
    if job.future.cancelled():
        where = "in the queue" if job.started_at is None else "in the making"
        result = GuardError(GuardErrorKind.TIMEOUT, f"no verdict before the deadline; it was still {where}")
    else:
        result = job.future.result()
    return Ran(result, started - job.queued_at, done - started)


def smoothed(old: float | None, new: float) -> float:
    """A running mean of service times that forgets; ``old`` None is the beginning."""
    return new if old is None else old + _SMOOTHING * (new - old)


def drain_seconds(per_prompt: float | None, prompts: int) -> float:
    """``retry_after`` for ``prompts`` ahead at the measured seconds each, or a second where nothing was measured."""
    return round(min(max(prompts * (1.0 if per_prompt is None else per_prompt), _RETRY_MIN), _RETRY_MAX), 3)


def as_guard_error(error: BaseException) -> GuardError:
    """What came of a prompt on which the engine raised."""
    if isinstance(error, GuardError):
        return error
    return GuardError(GuardErrorKind.INTERNAL, f"the engine failed ({type(error).__name__})")
