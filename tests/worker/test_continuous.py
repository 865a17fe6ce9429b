"""The runner for engines that batch by themselves, on one whose steps the test permits."""

from __future__ import annotations

import asyncio
import math
import time

import pytest

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.worker.batching import BatchLimits
from guard_middleware.worker.continuous import ContinuousRunner
from guard_middleware.worker.engine import Generation, GuardPrompt


class Gated:
    """Generates when the gate is open. Remembers what it was asked and what was cancelled."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.gate, self.seconds, self.dead = asyncio.Event(), seconds, False
        self.asked: list[tuple[int, int, int]] = []
        self.cancelled: list[int] = []
        self.hangs = False

    async def generate(self, id, prompt, priority=0):
        name = prompt.ids[0]
        self.asked.append((name, prompt.max_new_tokens, priority))
        try:
            while self.hangs:
                await asyncio.sleep(0.01)
            await self.gate.wait()
            await asyncio.sleep(60 if name == 15 else self.seconds)
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise
        if name == 13:
            raise ValueError("boom")
        if name == 14:
            raise GuardError(GuardErrorKind.MEDIA, "no image")
        return Generation(f"{name}!", 1, 1, 0, None, None, "stop", queue_seconds=0.001)


def run(test, limits=None, **options):
    async def main():
        engine = Gated(**options)
        runner = ContinuousRunner(engine, limits or BatchLimits())
        runner.start()
        try:
            await asyncio.wait_for(test(runner, engine), 20)
        finally:
            await runner.aclose()

    asyncio.run(main())


def now():
    return asyncio.get_running_loop().time()


async def submit(runner, *names, seconds=10.0, tokens=1, priority=0):
    prompts = [(GuardPrompt((name,), (), False, 64), tokens) for name in names]
    return [ran.result for ran in await runner.submit(prompts, now() + seconds, priority)]


def test_prompts_run_at_once_and_their_results_come_in_order():
    async def test(runner, engine):
        engine.gate.set()
        results = await submit(runner, 1, 2, 3, priority=1)
        assert [result.text for result in results] == ["1!", "2!", "3!"]
        assert engine.asked == [(1, 64, 1), (2, 64, 1), (3, 64, 1)]
        assert (runner.queued, runner.queued_tokens, runner.running) == (0, 0, 0)

    run(test)


def test_a_prompt_that_fails_leaves_the_others_alone_and_a_defect_says_no_more_than_its_kind():
    async def test(runner, engine):
        engine.gate.set()
        defect, refusal, fine = await submit(runner, 13, 14, 1)
        assert (defect.kind, refusal.kind) == (GuardErrorKind.INTERNAL, GuardErrorKind.MEDIA)
        assert "boom" not in str(defect)
        assert fine.text == "1!"

    run(test)


@pytest.mark.parametrize("limits", [BatchLimits(2, queue=2), BatchLimits(2, queue_tokens=20)])
def test_beyond_batch_and_queue_a_question_is_refused_at_once_with_the_time_to_come_back(limits):
    async def test(runner, engine):
        running = [asyncio.create_task(submit(runner, name, tokens=10)) for name in (1, 2, 3, 4)]
        await asyncio.sleep(0.02)
        assert (runner.running, runner.queued, runner.queued_tokens) == (2, 2, 20)
        with pytest.raises(GuardError) as caught:
            await submit(runner, 5, tokens=10)
        assert caught.value.kind is GuardErrorKind.OVERLOADED
        assert caught.value.retry_after == 4.0  # four prompts at a second each, nothing measured yet
        assert len(engine.asked) == 4
        engine.gate.set()
        await asyncio.gather(*running)
        assert (await submit(runner, 5, tokens=10))[0].text == "5!"

    run(test, limits)


def test_the_time_to_come_back_follows_the_measured_rate():
    async def test(runner, engine):
        engine.gate.set()
        await submit(runner, 1)  # 0.8 s
        engine.gate.clear()
        waiting = [asyncio.create_task(submit(runner, name)) for name in (2, 3)]
        await asyncio.sleep(0.01)
        with pytest.raises(GuardError) as caught:
            await submit(runner, 4)
        assert caught.value.retry_after == pytest.approx(1.6, abs=0.4)
        engine.gate.set()
        await asyncio.gather(*waiting)

    run(test, BatchLimits(1, queue=1), seconds=0.8)


def test_a_question_larger_than_the_queue_runs_when_nothing_waits():
    async def test(runner, engine):
        engine.gate.set()
        assert len(await submit(runner, 1, 2, 3, 4, tokens=100)) == 4

    run(test, BatchLimits(1, queue=1, queue_tokens=10))


def test_at_the_deadline_a_prompt_is_a_timeout_and_leaves_the_engine():
    async def test(runner, engine):
        started = time.perf_counter()
        (late,) = await submit(runner, 1, seconds=0.1)
        assert 0.09 < time.perf_counter() - started < 0.4
        assert late.kind is GuardErrorKind.TIMEOUT
        await asyncio.sleep(0.02)
        assert engine.cancelled == [1]
        assert runner.running == 0

    run(test)


def test_what_is_done_at_the_deadline_counts():
    async def test(runner, engine):
        engine.gate.set()
        done, late = await submit(runner, 1, 15, seconds=0.3)
        assert done.text == "1!"
        assert late.kind is GuardErrorKind.TIMEOUT

    run(test)


def test_a_caller_that_goes_away_takes_its_prompts_out_of_the_engine():
    async def test(runner, engine):
        asking = asyncio.create_task(submit(runner, 1, 2))
        await asyncio.sleep(0.02)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await asyncio.sleep(0.02)
        assert sorted(engine.cancelled) == [1, 2]
        assert runner.running == 0
        assert runner.stalled(now()) == 0.0

    run(test)


def test_an_engine_that_misses_deadlines_yet_answers_a_probe_is_slow_and_not_stuck():
    async def test(runner, engine):
        await submit(runner, 1, 2, seconds=0.05)
        await asyncio.sleep(0.02)
        assert engine.asked[2:] == [(1, 1, -1)]  # one probe of one token, ahead of all
        assert runner.stalled(now()) > 0
        engine.gate.set()
        await asyncio.sleep(0.02)
        assert runner.stalled(now()) == 0.0

    run(test)


def test_an_engine_that_answers_no_probe_is_stuck_for_as_long_and_gets_one_probe():
    async def test(runner, engine):
        engine.hangs = True
        await submit(runner, 1, seconds=0.05)
        await submit(runner, 2, seconds=0.2)
        assert 0.15 < runner.stalled(now()) < 1.0
        assert [name for name, budget, _ in engine.asked if budget == 1] == [1]

    run(test)


def test_a_dead_engine_is_stuck_for_ever():
    async def test(runner, engine):
        engine.dead = True
        assert runner.stalled(now()) == math.inf

    run(test)


def test_closing_answers_whoever_waits():
    async def test(runner, engine):
        asking = asyncio.create_task(submit(runner, 1))
        await asyncio.sleep(0.02)
        await runner.aclose()
        ((found,),) = await asyncio.gather(asking)
        assert found.kind is GuardErrorKind.UNAVAILABLE

    run(test)


def test_waiting_and_running_times_add_up():
    async def test(runner, engine):
        engine.gate.set()
        (ran,) = await runner.submit([(GuardPrompt((1,), (), False, 64), 1)], now() + 5)
        assert ran.queue_seconds == 0.001
        assert ran.run_seconds > 0.0

    run(test, seconds=0.01)
