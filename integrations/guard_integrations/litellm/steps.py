"""One way to write what synchronous and asynchronous callers of the guard both do.

A guarded call is written once, as a generator of steps. ``run`` takes them for a synchronous caller, ``arun`` for one
in an event loop: an ``OnGuard`` step runs on the guard's loop, a ``Host`` step is LiteLLM's own work and stays in the
caller's thread and loop, where its clients and its context belong.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from guard_integrations.portal import Portal

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class OnGuard:
    """Work for the guard's loop."""

    work: Coroutine[Any, Any, Any]


@dataclass(frozen=True, slots=True)
class Host:
    """Work for the caller: what it returns is awaited where the caller is asynchronous."""

    work: Callable[[], Any]


Step = OnGuard | Host
Steps = Generator[Step, Any, _T]


class GuardLoop(Portal):
    """The guard's loop, in a thread of its own, for callers of both kinds."""

    async def acall(self, work: Coroutine[Any, Any, _T]) -> _T:
        """As ``call`` without blocking the caller's loop; the caller's cancellation cancels ``work``."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def begin(self, work: Coroutine[Any, Any, Any]) -> None:
        """Starts ``work`` and waits for nothing: safe in a finaliser, of no effect once the loop has ended."""
        with contextlib.suppress(RuntimeError):
            asyncio.run_coroutine_threadsafe(work, self._loop)
            return
        work.close()

    def run(self, steps: Steps[_T]) -> _T:
        """Takes every step in this thread."""
        advance = _sent(steps, None)
        while True:
            try:
                step = advance()
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            try:
                done = self.call(step.work) if isinstance(step, OnGuard) else step.work()
            except BaseException as error:
                advance = _thrown(steps, error)
            else:
                advance = _sent(steps, done)

    async def arun(self, steps: Steps[_T]) -> _T:
        """Takes every step in this task."""
        advance = _sent(steps, None)
        while True:
            try:
                step = advance()
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            try:
                done = await (self.acall(step.work) if isinstance(step, OnGuard) else step.work())
            except BaseException as error:
                advance = _thrown(steps, error)
            else:
                advance = _sent(steps, done)


def _thrown(steps: Steps[Any], error: BaseException) -> Callable[[], Step]:
    return lambda: steps.throw(error)


def _sent(steps: Steps[Any], value: Any) -> Callable[[], Step]:
    return lambda: steps.send(value)
