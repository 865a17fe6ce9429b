"""Which of the configured guards are ours to start, and where they listen."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from guard_middleware.config import Worker
from guard_middleware.errors import GuardError
from guard_middleware.guard import workers as module
from guard_middleware.guard.balanced import BalancedGuardClient
from guard_middleware.guard.workers import Workers
from tests.support.gateway import scripted_worker


def test_workers_without_a_place_get_sockets_of_their_own_that_only_we_can_reach() -> None:
    workers = Workers({"worker": Worker(), "large": Worker(model="nano", threads=3)})
    commands = {name: process._argv for name, process in workers.processes.items()}
    sockets = {name: Path(argv[argv.index("--socket") + 1]) for name, argv in commands.items()}
    assert list(sockets) == ["worker", "large"]
    assert sockets["worker"] != sockets["large"]
    (folder,) = {socket.parent for socket in sockets.values()}
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert commands["large"][-2:] == ["--threads", "3"]
    asyncio.run(workers.aclose())
    assert not folder.exists()


def test_a_start_that_failed_does_not_start_the_same_worker_twice() -> None:
    async def work() -> None:
        workers = Workers({"first": Worker(), "second": Worker()})
        first, second = workers.processes.values()
        first._argv, second._argv = ["/bin/sleep", "30"], ["/nowhere/guard"]
        pids = []
        for _ in range(2):
            with pytest.raises(OSError, match="nowhere"):
                await workers.start()
            pids.append(first.pid)
        await workers.aclose()
        assert pids[0] == pids[1]
        with pytest.raises(ProcessLookupError):
            os.kill(pids[0] or 0, 0)

    asyncio.run(work())


def test_workers_elsewhere_are_asked_and_not_started() -> None:
    workers = Workers(
        {
            "near": Worker(socket="/run/guard.sock", manage=False),
            "far": Worker(url="http://127.0.0.1:1"),
            "many": Worker(url="http://127.0.0.1:2", balanced=True),
        }
    )
    assert not workers.processes
    assert [type(client) is BalancedGuardClient for client in workers.clients.values()] == [False, False, True]


def test_the_start_waits_for_every_worker_and_names_the_one_that_does_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, gone = tmp_path / "here.sock", tmp_path / "gone.sock"

    async def work() -> None:
        there = Workers({"worker": Worker(socket=str(here), manage=False)})
        await there.start()
        await there.wait_ready()
        assert await there.ready()
        await there.aclose()
        monkeypatch.setattr(module, "READY_SECONDS", 0.3)
        both = Workers({name: Worker(socket=str(at), manage=False) for name, at in {"a": here, "b": gone}.items()})
        with pytest.raises(GuardError, match=r"gone\.sock"):
            await both.wait_ready()
        assert not await both.ready()
        await both.aclose()

    with scripted_worker(here):
        asyncio.run(work())
