from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.guard.client import GuardClient
from guard_middleware.guard.supervisor import Backoff, WorkerProcess
from guard_middleware.types import Conversation, Message, Text, Verdict
from guard_middleware.wire import ModerationRequest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTED = str(ROOT / "tests" / "support" / "scripted_worker.py")
QUICK = Backoff(first=0.1, limit=0.4, healthy=60.0)


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def question(text="how do I bake bread", deadline=5.0):
    return ModerationRequest("q", Conversation((Message("user", (Text(text),)),)), "input", deadline)


@contextlib.asynccontextmanager
async def worker_of(argv, path, **options):
    events = []
    worker = WorkerProcess(argv, path, on_event=events.append, backoff=options.pop("backoff", QUICK), **options)
    await worker.start()
    try:
        yield worker, events
    finally:
        await worker.stop()


def scripted(path):
    return [sys.executable, SCRIPTED, "--socket", str(path), "--exit-with-parent"]


def script(code):
    return [sys.executable, "-c", code]


def kinds(events):
    return [event.kind for event in events if event.kind != "log"]


async def until(condition, seconds=10.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def run(coroutine):
    asyncio.run(asyncio.wait_for(coroutine, 60))


def test_it_starts_a_worker_waits_until_it_is_ready_and_stops_it(tmp_path):
    async def main():
        path = tmp_path / "w.sock"
        async with worker_of(scripted(path), path) as (worker, events):
            await worker.wait_ready(20)
            pid = worker.pid
            assert pid is not None
            await until(lambda: any(event.line == "worker ready model=scripted" for event in events))
        assert worker.pid is None
        assert not alive(pid)
        assert kinds(events) == ["started", "ready", "exited"]
        assert events[-1].delay is None
        assert not path.exists()

    run(main())


def test_kill_9_in_mid_request_is_unavailable_at_once_and_service_resumes(tmp_path):
    async def main():
        path = tmp_path / "w.sock"
        client = GuardClient(path)
        async with worker_of(scripted(path), path) as (worker, events):
            await worker.wait_ready(20)
            first = worker.pid
            waiting = asyncio.create_task(client.moderate(question("[wait 20] hi", 25.0)))
            await asyncio.sleep(0.2)
            started = time.perf_counter()
            os.kill(first, signal.SIGKILL)
            assert (await waiting).kind is GuardErrorKind.UNAVAILABLE
            assert time.perf_counter() - started < 0.5
            assert (await client.moderate(question())).kind is GuardErrorKind.UNAVAILABLE

            await until(lambda: worker.restarts == 1)
            await worker.wait_ready(20)
            assert worker.pid != first
            outcome = None
            while not isinstance(outcome, Verdict):
                outcome = await client.moderate(question())
                await asyncio.sleep(0.05)
                assert time.perf_counter() - started < 10
            assert kinds(events) == ["started", "ready", "exited", "started", "ready"]
            exited = next(event for event in events if event.kind == "exited")
            assert (exited.returncode, exited.delay) == (-signal.SIGKILL, 0.1)
        await client.aclose()

    run(main())


def test_a_worker_that_hangs_as_a_whole_is_killed_and_replaced(tmp_path):
    async def main():
        path = tmp_path / "w.sock"
        async with worker_of(scripted(path), path, hung_after=0.6) as (worker, events):
            await worker.wait_ready(20)
            first = worker.pid
            await asyncio.sleep(1.5)
            assert worker.pid == first  # a healthy one is left alone
            os.kill(first, signal.SIGSTOP)
            await until(lambda: worker.restarts == 1, 20)
            await worker.wait_ready(20)
            assert not alive(first)
        assert kinds(events)[:4] == ["started", "ready", "exited", "started"]

    run(main())


def test_the_delay_doubles_to_its_bound_for_a_worker_that_does_not_get_well(tmp_path):
    async def main():
        async with worker_of(script("raise SystemExit(5)"), tmp_path / "w.sock") as (_, events):
            await until(lambda: kinds(events).count("exited") == 4)
        exited = [event for event in events if event.kind == "exited"][:4]
        assert [event.delay for event in exited] == [0.1, 0.2, 0.4, 0.4]
        assert {event.returncode for event in exited} == {5}

    run(main())


def test_the_delay_starts_over_after_a_worker_was_well_for_long_enough(tmp_path):
    async def main():
        path = tmp_path / "w.sock"
        backoff = Backoff(first=0.1, limit=5.0, healthy=0.3)
        async with worker_of(scripted(path), path, backoff=backoff) as (worker, events):
            for _ in range(3):
                seen = kinds(events).count("exited")
                await worker.wait_ready(20)
                await asyncio.sleep(0.4)
                os.kill(worker.pid, signal.SIGKILL)
                await until(lambda seen=seen: kinds(events).count("exited") > seen)
                await until(lambda seen=seen: worker.restarts > seen)
        assert [event.delay for event in events if event.kind == "exited"][:3] == [0.1, 0.1, 0.1]

    run(main())


def test_a_worker_that_cannot_start_says_why(tmp_path):
    async def main():
        code = "import sys; sys.stderr.write('loading\\nweights are missing\\n'); sys.exit(3)"
        async with worker_of(script(code), tmp_path / "w.sock") as (worker, _):
            with pytest.raises(GuardError, match=r"(?s)exited before.*weights are missing") as caught:
                await worker.wait_ready(20)
            assert caught.value.kind is GuardErrorKind.UNAVAILABLE

    run(main())


def test_a_worker_of_somebody_else_at_its_socket_is_not_taken_for_ours(tmp_path):
    async def main():
        path = tmp_path / "w.sock"
        async with worker_of(scripted(path), path) as (theirs, _):
            await theirs.wait_ready(20)
            async with worker_of(scripted(path), path) as (ours, events):
                with pytest.raises(GuardError, match="exited before it was ready"):
                    await ours.wait_ready(20)
                await until(lambda: kinds(events).count("exited") == 2)
            assert "ready" not in kinds(events)

    run(main())


def test_it_is_ready_though_a_library_left_a_line_open_before_it_said_so(tmp_path):
    async def main():
        code = "print('loading 100 %', end=' '); print('worker ready model=x', flush=True); input()"
        async with worker_of(script(code), tmp_path / "w.sock") as (worker, _):
            await worker.wait_ready(20)

    run(main())


def test_a_worker_is_not_started_again_while_something_speaks_against_it(tmp_path):
    async def main():
        against, asked = ["its files have changed"], []

        async def check():
            asked.append(against[0])
            return against[0]

        path = tmp_path / "w.sock"
        async with worker_of(scripted(path), path, check=check) as (worker, events):
            await worker.wait_ready(20)
            assert asked == []
            os.kill(worker.pid, signal.SIGKILL)
            await until(lambda: len(asked) == 2)
            assert kinds(events) == ["started", "ready", "exited"]
            with pytest.raises(GuardError, match="its files have changed"):
                await worker.wait_ready(5)
            against[0] = None
            await until(lambda: worker.restarts == 1)
            await worker.wait_ready(20)

    run(main())


def test_a_worker_that_takes_too_long_says_how_far_it_came(tmp_path):
    async def main():
        code = "import sys, time; print('fetching weights', file=sys.stderr, flush=True); time.sleep(60)"
        async with worker_of(script(code), tmp_path / "w.sock") as (worker, _):
            with pytest.raises(GuardError, match=r"(?s)not ready within 1 s.*fetching weights"):
                await worker.wait_ready(1)

    run(main())


def test_a_command_that_does_not_exist_fails_at_the_start(tmp_path):
    async def main():
        with pytest.raises(FileNotFoundError):
            await WorkerProcess(["/nonexistent/worker"], tmp_path / "w.sock").start()

    run(main())


def test_a_worker_that_ignores_sigterm_is_killed(tmp_path):
    async def main():
        code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
        async with worker_of(script(code), tmp_path / "w.sock", grace=0.3) as (worker, events):
            await until(lambda: any(event.line == "up" for event in events))
            pid = worker.pid
        assert not alive(pid)
        assert events[-1].returncode == -signal.SIGKILL

    run(main())


def test_a_flood_of_output_and_an_endless_line_do_not_block_the_worker(tmp_path):
    async def main():
        code = "import sys; sys.stderr.write('x' * 5_000_000 + '\\n' + 'line\\n' * 50_000 + 'last\\n'); sys.exit(7)"
        async with worker_of(script(code), tmp_path / "w.sock") as (worker, _):
            with pytest.raises(GuardError, match=r"(?s)exited before.*last"):
                await worker.wait_ready(20)

    run(main())


def test_a_listener_that_fails_does_not_stop_the_supervision(tmp_path):
    async def main():
        def fail(event):
            raise RuntimeError("listener")

        path = tmp_path / "w.sock"
        worker = WorkerProcess(scripted(path), path, on_event=fail, backoff=QUICK)
        await worker.start()
        await worker.wait_ready(20)
        await worker.stop()

    run(main())


def test_the_worker_dies_with_its_parent_even_if_that_is_killed(tmp_path):
    path = tmp_path / "w.sock"
    code = f"""
import asyncio
from guard_middleware.guard.supervisor import WorkerProcess
async def main():
    worker = WorkerProcess({scripted(path)!r}, {str(path)!r})
    await worker.start()
    await worker.wait_ready(20)
    print(worker.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    deadline = time.monotonic() + 8
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
