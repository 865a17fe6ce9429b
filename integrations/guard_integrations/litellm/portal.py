"""The guard's own event loop, for callers that have none or another, and one way to write what both kinds do.

A guarded call is written once, as a generator of steps. ``run`` takes them for a synchronous caller, ``arun`` for one
in an event loop: an ``OnGuard`` step runs on the guard's loop, a ``Host`` step is LiteLLM's own work and stays in the
caller's thread and loop, where its clients and its context belong.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class OnGuard:
    """Work for the guard's loop."""

    work: Coroutine[Any, Any, Any]


@dataclass(frozen=True, slots=True)
class Host:
    """Work for the caller: what it returns is awaited where the caller is asynchronous."""

    work: Callable[[], Any]


Steps = Generator[OnGuard | Host, Any, _T]


class Portal:
    """A loop in a daemon thread of its own, from the first call until ``close``."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="guard-portal", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the loop; what still runs on it is dropped."""
        if self._loop.is_running():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        if not self._loop.is_closed():
            self._loop.close()

    def start(self, work: Coroutine[Any, Any, Any]) -> None:
        """Begins ``work`` for nobody: safe in a finaliser, and of no effect once the loop has ended."""
        if self._loop.is_running():
            asyncio.run_coroutine_threadsafe(work, self._loop)
        else:
            work.close()

    def call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of ``work``, which ends where the caller is interrupted."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def acall(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The same without blocking the caller's loop; its cancellation cancels ``work``."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def run(self, steps: Steps[_T]) -> _T:
        """Takes every step in this thread."""
        advance: Callable[[], OnGuard | Host] = lambda: next(steps)  # noqa: E731
        try:
            while True:
                step = advance()
                try:
                    done = self.call(step.work) if isinstance(step, OnGuard) else step.work()
                except BaseException as error:
                    advance = _thrown(steps, error)
                else:
                    advance = _sent(steps, done)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    async def arun(self, steps: Steps[_T]) -> _T:
        """Takes every step in this task."""
        advance: Callable[[], OnGuard | Host] = lambda: next(steps)  # noqa: E731
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


def _thrown(steps: Steps[Any], error: BaseException) -> Callable[[], OnGuard | Host]:
    return lambda: steps.throw(error)


def _sent(steps: Steps[Any], value: Any) -> Callable[[], OnGuard | Host]:
    return lambda: steps.send(value)
