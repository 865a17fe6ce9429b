from __future__ import annotations

import asyncio
import threading
import time

import pytest

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.worker.batching import Batcher, BatchLimits


class StepEngine:
    """Takes ``steps`` steps for each batch, one per permission, and drops cancelled rows as a real engine does."""

    def __init__(self, steps: int = 1) -> None:
        self.steps, self.batches, self.steps_taken = steps, [], 0
        self.may_step = threading.Semaphore(0)
        self.started = threading.Event()

    def free(self) -> None:
        self.may_step.release(10_000)

    def __call__(self, prompts, cancelled):
        self.batches.append(list(prompts))
        self.started.set()
        for _ in range(self.steps):
            if all(cancelled(row) for row in range(len(prompts))):
                break
            self.may_step.acquire()
            self.steps_taken += 1
        return [ValueError("boom") if prompt == "boom" else f"{prompt}!" for prompt in prompts]


def run(engine, test, limits=None, **options):
    async def main():
        batcher = Batcher(engine, limits or BatchLimits(), **options)
        batcher.start()
        try:
            await asyncio.wait_for(test(batcher), 20)
        finally:
            engine.free()
            await batcher.aclose()

    asyncio.run(main())


async def occupy(batcher, engine, name="first"):
    """Starts a batch that runs until the engine is freed."""
    task = asyncio.create_task(batcher.submit([(name, 1)], now() + 10))
    await asyncio.to_thread(engine.started.wait, 5)
    return task


async def idle(batcher):
    while batcher.running:
        await asyncio.sleep(0.01)


def now() -> float:
    return asyncio.get_running_loop().time()


async def submit(batcher, *prompts, seconds=10.0, tokens=1):
    return [ran.result for ran in await batcher.submit([(prompt, tokens) for prompt in prompts], now() + seconds)]


def test_an_idle_engine_runs_a_prompt_at_once_and_alone():
    engine = StepEngine()
    engine.free()

    async def test(batcher):
        assert await submit(batcher, "a") == ["a!"]
        assert (batcher.queued, batcher.queued_tokens, batcher.running) == (0, 0, 0)

    run(engine, test)
    assert engine.batches == [["a"]]


def test_what_arrives_while_the_engine_is_busy_runs_together_nearest_deadline_first_up_to_the_batch_size():
    engine = StepEngine()

    async def test(batcher):
        first = await occupy(batcher, engine)
        others = [asyncio.create_task(submit(batcher, f"s{s}", seconds=s)) for s in (9, 5, 7, 6, 8)]
        await asyncio.sleep(0.02)
        assert (batcher.queued, batcher.running) == (5, 1)
        for _ in range(3):
            engine.may_step.release()
        assert await asyncio.gather(*others) == [["s9!"], ["s5!"], ["s7!"], ["s6!"], ["s8!"]]
        await first

    run(engine, test, BatchLimits(batch=3))
    assert engine.batches == [["first"], ["s5", "s6", "s7"], ["s8", "s9"]]


@pytest.mark.parametrize("limits", [BatchLimits(queue=2), BatchLimits(queue_tokens=20)])
def test_a_full_queue_refuses_at_once_and_says_when_to_come_back_by_the_measured_rate(limits):
    engine = StepEngine()

    async def test(batcher):
        first = await occupy(batcher, engine)
        waiting = [asyncio.create_task(submit(batcher, name, tokens=10)) for name in "ab"]
        await asyncio.sleep(0.02)
        started = time.perf_counter()
        with pytest.raises(GuardError) as caught:
            await submit(batcher, "c", tokens=10)
        assert time.perf_counter() - started < 0.05
        assert caught.value.kind is GuardErrorKind.OVERLOADED
        assert caught.value.retry_after == 3.0  # three prompts at a second each, nothing measured yet
        engine.free()
        await asyncio.gather(first, *waiting)

    run(engine, test, limits)


def test_retry_after_follows_the_service_rate_that_was_measured():
    engine = StepEngine()

    async def test(batcher):
        first = await occupy(batcher, engine)
        asyncio.get_running_loop().call_later(1.0, engine.may_step.release)
        await first  # one prompt took a second
        engine.started.clear()
        second = await occupy(batcher, engine, "second")
        waiting = asyncio.create_task(submit(batcher, "a"))
        await asyncio.sleep(0.01)
        with pytest.raises(GuardError) as caught:
            await submit(batcher, "b")
        assert caught.value.retry_after == pytest.approx(2.0, abs=0.3)
        engine.may_step.release(10)
        await asyncio.gather(second, waiting)

    run(engine, test, BatchLimits(queue=1))


def test_a_request_of_several_prompts_is_admitted_whole_or_not_at_all():
    engine = StepEngine()

    async def test(batcher):
        first = await occupy(batcher, engine)
        one = asyncio.create_task(submit(batcher, "one"))
        await asyncio.sleep(0.01)
        with pytest.raises(GuardError, match="queue is full"):
            await submit(batcher, "a", "b", "c")
        assert batcher.queued == 1
        engine.may_step.release(10)
        await asyncio.gather(first, one)

    run(engine, test, BatchLimits(queue=3))
    assert engine.batches == [["first"], ["one"]]


def test_a_request_larger_than_the_queue_still_runs_when_nothing_waits():
    engine = StepEngine()
    engine.free()

    async def test(batcher):
        assert await submit(batcher, "a", "b", "c", tokens=100) == ["a!", "b!", "c!"]

    run(engine, test, BatchLimits(batch=2, queue=1, queue_tokens=10))
    assert engine.batches == [["a", "b"], ["c"]]


def test_an_expired_prompt_is_answered_at_its_deadline_and_never_run():
    engine = StepEngine()

    async def test(batcher):
        first = await occupy(batcher, engine)
        started = time.perf_counter()
        (outcome,) = await submit(batcher, "late", seconds=0.1)
        assert 0.09 < time.perf_counter() - started < 0.3
        assert outcome.kind is GuardErrorKind.TIMEOUT
        assert "queue" in outcome.message
        assert batcher.queued == 0
        engine.may_step.release(10)
        await first
        assert await submit(batcher, "next") == ["next!"]

    run(engine, test)
    assert engine.batches == [["first"], ["next"]]


def test_a_cancelled_caller_takes_its_prompt_out_of_the_queue():
    engine = StepEngine()

    async def test(batcher):
        first = await occupy(batcher, engine)
        gone = asyncio.create_task(submit(batcher, "gone", tokens=7))
        await asyncio.sleep(0.01)
        assert batcher.queued_tokens == 7
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert (batcher.queued, batcher.queued_tokens) == (0, 0)
        engine.may_step.release(10)
        await first

    run(engine, test)
    assert engine.batches == [["first"]]


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
def test_a_running_batch_that_nobody_waits_for_stops_at_its_next_step(how):
    engine = StepEngine(steps=1000)

    async def test(batcher):
        task = asyncio.create_task(submit(batcher, "a", seconds=10.0 if how == "cancelled" else 0.2))
        await asyncio.to_thread(engine.started.wait, 5)
        engine.may_step.release(3)
        await asyncio.sleep(0.05)
        if how == "cancelled":
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        engine.may_step.release(1000)
        await idle(batcher)

    run(engine, test)
    assert engine.steps_taken in (3, 4)


def test_one_failing_prompt_fails_alone_and_a_failing_engine_fails_its_batch_only():
    engine = StepEngine()
    engine.free()

    async def test(batcher):
        good, bad = await submit(batcher, "good", "boom")
        assert good == "good!"
        assert bad.kind is GuardErrorKind.INTERNAL
        assert "boom" not in bad.message

    run(engine, test)

    class Broken(StepEngine):
        def __call__(self, prompts, cancelled):
            if prompts == ["die"]:
                raise RuntimeError("out of memory")
            if prompts == ["short"]:
                return []
            return list(prompts)

    async def survive(batcher):
        for name in ("die", "short"):
            (outcome,) = await submit(batcher, name)
            assert outcome.kind is GuardErrorKind.INTERNAL
        assert await submit(batcher, "fine") == ["fine"]

    run(Broken(), survive)


def test_closing_fails_what_waits_and_what_runs():
    engine = StepEngine()

    async def test(batcher):
        first = await occupy(batcher, engine)
        waiting = asyncio.create_task(submit(batcher, "a"))
        await asyncio.sleep(0.01)
        await batcher.aclose()
        engine.may_step.release(10)
        assert (await first)[0].result.kind is GuardErrorKind.UNAVAILABLE
        assert (await waiting)[0].kind is GuardErrorKind.UNAVAILABLE

    run(engine, test)


def test_a_stuck_engine_is_seen_once_nobody_waits_for_it():
    engine = StepEngine()

    async def test(batcher):
        assert batcher.stalled(now()) == 0.0
        task = asyncio.create_task(submit(batcher, "a", seconds=0.1))
        await asyncio.to_thread(engine.started.wait, 5)
        assert batcher.stalled(now()) == 0.0
        await task
        await asyncio.sleep(0.1)
        assert 0.05 < batcher.stalled(now()) < 1.0
        engine.may_step.release(10)
        await idle(batcher)
        assert batcher.stalled(now()) == 0.0

    run(engine, test)


def test_batch_sizes_and_times_are_reported():
    engine, seen = StepEngine(), []
    engine.free()

    async def test(batcher):
        (ran,) = await batcher.submit([("a", 1)], now() + 5)
        assert ran.queue_seconds >= 0.0
        assert ran.run_seconds >= 0.0
        await submit(batcher, "b", "c")

    run(engine, test, on_batch=lambda size, seconds: seen.append(size))
    assert seen == [1, 2]
