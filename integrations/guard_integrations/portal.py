"""An event loop in a thread of its own, for hosts that call the guard without having one."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class PortalClosed(RuntimeError):
    """The portal was closed before the call, or during it."""


class Portal:
    """Runs coroutines for other threads, from the first call until ``close``, or until the process exits.

    ``finish`` is awaited on the loop at its end; what still runs then is cancelled. The thread is a daemon, so a
    program that never closes ends all the same, and ``finish`` is awaited then too.
    """

    def __init__(self, finish: Callable[[], Awaitable[None]]) -> None:
        self._finish = finish
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._pid = 0
        self._closed = self._exiting = False

    def call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of ``work``, which is cancelled where the caller is interrupted.

        Raises ``PortalClosed``, and ``RuntimeError`` in a process forked from the one that called first.
        """
        try:
            self._start()
        except BaseException:
            work.close()
            raise
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise PortalClosed("this guard was closed while a request was under way") from None
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """As ``close``, without waiting: of use in a finaliser, which may run in any thread."""
        self._closed = True
        if self._thread is not None and self._pid == os.getpid() and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop has ended in between
                self._loop.call_soon_threadsafe(self._ending.set)

    def close(self) -> None:
        """Ends the loop and the thread. Safe to call twice."""
        self.stop()
        if self._thread is not None and self._pid == os.getpid() and self._thread is not threading.current_thread():
            self._thread.join()
            atexit.unregister(self._exit)

    def _exit(self) -> None:
        self._exiting = True
        self.close()

    def _start(self) -> None:
        with self._lock:
            if self._closed:
                raise PortalClosed("this guard is closed; make another")
            if self._thread is None:
                running = threading.Event()
                self._pid = os.getpid()
                self._thread = threading.Thread(
                    target=asyncio.run, args=(self._run(running),), name="guard-portal", daemon=True
                )
                self._thread.start()
                running.wait()
                atexit.register(self._exit)
            if self._pid != os.getpid():
                raise RuntimeError("a guard that was used does not outlive a fork; make it in the child")

    async def _run(self, running: threading.Event) -> None:
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        running.set()
        await self._ending.wait()
        try:
            await self._finish()
        except RuntimeError:  # no executor takes work at the interpreter's exit; what needs one has a hook of its own
            if not self._exiting:
                raise
