"""The guard workers of one configuration, by name: where each is, which of them are ours to start, and all their ends.

A worker without a URL and without a socket of its own gets one in a folder that only this user can enter.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

from guard_middleware.config import Worker
from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.guard.balanced import BalancedGuardClient
from guard_middleware.guard.client import GuardClient
from guard_middleware.guard.supervisor import WorkerEvent, WorkerProcess, worker_command

logger = logging.getLogger(__name__)

#: how long a host's start waits for the workers, its own or another's; past it the start fails
READY_SECONDS = 300.0


class Workers:
    """A client for each of ``sections``, and a process for each that is ours. ``processes`` may be replaced by name
    before the start."""

    def __init__(self, sections: Mapping[str, Worker]) -> None:
        self.clients: dict[str, GuardClient] = {}
        self.processes: dict[str, WorkerProcess] = {}
        self._sections = dict(sections)
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._started = not sections
        self._starting = asyncio.Lock()
        for name, section in sections.items():
            address = self._address(name, section)
            self.clients[name] = BalancedGuardClient(address) if section.balanced else GuardClient(address)
            if section.managed:
                argv = worker_command(section.model, address, threads=section.threads, options=section.options)
                self.processes[name] = WorkerProcess(argv, address, on_event=_log)

    async def start(self) -> None:
        """Starts those that are ours, once; raises ``OSError`` for a command that cannot be run."""
        if self._started:
            return
        async with self._starting:
            if not self._started:
                for process in self.processes.values():
                    await process.start()
                self._started = True

    async def wait_ready(self) -> None:
        """Returns when every one can moderate; raises ``GuardError``."""
        waits = [asyncio.create_task(self._wait(name)) for name in self._sections]
        try:
            await asyncio.gather(*waits)
        finally:
            for wait in waits:
                wait.cancel()

    async def ready(self) -> bool:
        """Whether every one could moderate now."""
        return all(await asyncio.gather(*(client.ready() for client in self.clients.values())))

    async def aclose(self) -> None:
        for client in self.clients.values():
            await client.aclose()
        await asyncio.gather(*(process.stop() for process in self.processes.values()))
        if self._directory is not None:
            self._directory.cleanup()

    def _address(self, name: str, section: Worker) -> str:
        if section.url is not None:
            return section.url
        if section.socket is not None:
            return section.socket
        if self._directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix="guard-")  # mode 0700
        return str(Path(self._directory.name) / f"{name}.sock")

    async def _wait(self, name: str) -> None:
        if name in self.processes:
            await self.processes[name].wait_ready(READY_SECONDS)
            return
        client, section, pause = self.clients[name], self._sections[name], 0.05
        where = section.url or section.socket
        try:
            async with asyncio.timeout(READY_SECONDS):
                while not await client.ready():
                    if pause == 0.05:
                        logger.warning("waiting for the guard worker at %s", where)
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, 1.0)
        except TimeoutError:
            raise GuardError(
                GuardErrorKind.UNAVAILABLE,
                f"no guard worker was ready at {where} within {READY_SECONDS:g} s; start `guard-gateway worker` there",
            ) from None


def _log(event: WorkerEvent) -> None:
    if event.kind == "log":
        logger.info("worker %d: %s", event.pid, event.line)
    elif event.kind == "exited" and event.delay is not None:
        logger.error("worker %d exited with %s, restarted in %g s", event.pid, event.returncode, event.delay)
    else:
        logger.info("worker %d %s", event.pid, event.kind)
