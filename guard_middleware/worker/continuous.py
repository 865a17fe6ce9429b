"""Runs planned prompts on an engine that batches by itself (vLLM): bounded admission, deadlines, cancellation.

The engine decides what runs when; this module decides what is let in. All prompts of a question are admitted or none:
beyond ``queue`` prompts (or ``queue_tokens`` of them) on top of the ``batch`` that the engine runs at once on all its
ranks, the question is ``GuardError(overloaded)`` with a ``retry_after`` from the measured rate. A prompt that nobody
waits for any more (deadline over, caller gone) is cancelled in the engine, which frees its place at once.

An engine that misses a deadline may be slow or stuck. One probe at a time, of one token, tells them apart: while it
stays unanswered the engine counts as stalled.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.worker.batching import (
    Batcher,
    BatchLimits,
    Ran,
    as_guard_error,
    drain_seconds,
    smoothed,
)
from guard_middleware.worker.engine import BatchEngine, Engine, Generation, GuardPrompt
from guard_middleware.worker.metrics import Metrics

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """What has planned prompts run: ``Batcher`` or ``ContinuousRunner``. Used from one event loop."""

    @property
    def queued(self) -> int:
        """Prompts that wait."""
        ...

    @property
    def queued_tokens(self) -> int: ...

    @property
    def running(self) -> int: ...

    def start(self) -> None: ...

    def admit(self, prompts: int, tokens: int) -> None:
        """Raises ``GuardError(overloaded)`` where so many more would not be admitted now; holds no place."""
        ...

    async def submit(
        self, prompts: Sequence[tuple[GuardPrompt, int]], deadline: float, priority: int = 0
    ) -> list[Ran[Generation]]:
        """What came of ``prompts`` ((prompt, tokens) pairs), in order, no later than ``deadline`` (loop time).

        A lower ``priority`` goes first. Raises ``GuardError(overloaded)`` where they are not admitted.
        """
        ...

    def stalled(self, now: float) -> float:
        """Seconds for which the engine has been busy with work that nobody waits for; infinite where it has died."""
        ...

    async def aclose(self) -> None: ...


def runner(engine: BatchEngine | Engine, limits: BatchLimits, metrics: Metrics) -> Runner:
    """The runner that an engine needs, started. Call it on the event loop that will use it."""
    made: Runner
    if isinstance(engine, BatchEngine):
        made = Batcher(engine.generate_batch, limits, on_batch=metrics.batch)
    else:
        made = ContinuousRunner(engine, limits, on_batch=metrics.batch)
    made.start()
    return made


class ContinuousRunner:
    """``Runner`` on an ``Engine``. ``on_batch`` is told, as each prompt ends, how many ran beside it, and how long."""

    def __init__(
        self, engine: Engine, limits: BatchLimits, *, on_batch: Callable[[int, float], None] | None = None
    ) -> None:
        self._engine, self._limits = engine, limits
        self._on_batch = on_batch or (lambda size, seconds: None)
        self._tokens: dict[asyncio.Task[Generation], int] = {}
        self._ids = itertools.count()
        self._seconds_per_prompt: float | None = None
        self._probe: asyncio.Task[None] | None = None
        self._probed_at = 0.0

    @property
    def queued(self) -> int:
        return max(0, len(self._tokens) - self._limits.batch)

    @property
    def queued_tokens(self) -> int:
        """Of the prompts that came last: which of them the engine runs is its own affair."""
        return sum(list(self._tokens.values())[self._limits.batch :])

    @property
    def running(self) -> int:
        return min(len(self._tokens), self._limits.batch)

    def start(self) -> None:
        """Nothing: the engine runs already."""

    def stalled(self, now: float) -> float:
        """See ``Runner``."""
        if self._engine.dead:
            return math.inf
        return 0.0 if self._probe is None else now - self._probed_at

    async def aclose(self) -> None:
        """Whatever runs is cancelled, and its submitter gets ``unavailable``; closes nothing of the engine."""
        tasks = [*self._tokens, *([self._probe] if self._probe else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def submit(
        self, prompts: Sequence[tuple[GuardPrompt, int]], deadline: float, priority: int = 0
    ) -> list[Ran[Generation]]:
        """See ``Runner``."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        self.admit(len(prompts), sum(tokens for _, tokens in prompts))
        tasks = [self._begin(prompt, tokens, priority, started) for prompt, tokens in prompts]
        try:
            await asyncio.wait(tasks, timeout=max(0.0, deadline - started))
        finally:
            late = [task for task in tasks if not task.done()]
            for task in late:
                task.cancel()
        if late and loop.time() >= deadline:
            self._probe_with(prompts[0][0])
        return [_ran(task, task in late, loop.time() - started) for task in tasks]

    def admit(self, prompts: int, tokens: int) -> None:
        """See ``Runner``."""
        if not self.queued:  # else a request larger than the queue could never run
            return
        if self.queued + prompts > self._limits.queue or self.queued_tokens + tokens > self._limits.queue_tokens:
            seconds = drain_seconds(self._seconds_per_prompt, len(self._tokens))
            raise GuardError(GuardErrorKind.OVERLOADED, "the guard's queue is full", retry_after=seconds)

    def _begin(self, prompt: GuardPrompt, tokens: int, priority: int, started: float) -> asyncio.Task[Generation]:
        task = asyncio.create_task(self._engine.generate(f"guard-{next(self._ids)}", prompt, priority))
        self._tokens[task] = tokens
        task.add_done_callback(lambda done: self._end(done, started))
        return task

    def _end(self, task: asyncio.Task[Generation], started: float) -> None:
        size = len(self._tokens)
        del self._tokens[task]
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not isinstance(error, GuardError):
            logger.error("the engine failed on a prompt", exc_info=error)
        seconds = asyncio.get_running_loop().time() - started
        self._seconds_per_prompt = smoothed(self._seconds_per_prompt, seconds / size)
        self._on_batch(min(size, self._limits.batch), seconds)

    def _probe_with(self, prompt: GuardPrompt) -> None:
        if self._probe is None:
            self._probed_at = asyncio.get_running_loop().time()
            self._probe = asyncio.create_task(self._ask(replace(prompt, max_new_tokens=1)), name="guard-probe")

    async def _ask(self, prompt: GuardPrompt) -> None:
        try:
            with suppress(GuardError):
                await self._engine.generate(f"probe-{next(self._ids)}", prompt, -1)
        finally:
            self._probe = None


def _ran(task: asyncio.Task[Generation], late: bool, seconds: float) -> Ran[Generation]:
    result: Generation | GuardError
    if late:
        result = GuardError(GuardErrorKind.TIMEOUT, "no verdict before the deadline; it was still in the making")
    elif task.cancelled():
        result = GuardError(GuardErrorKind.UNAVAILABLE, "the worker is stopping")
    else:
        error = task.exception()
        result = task.result() if error is None else as_guard_error(error)
    waited = 0.0 if isinstance(result, GuardError) else min(result.queue_seconds, seconds)
    return Ran(result, waited, seconds - waited)
