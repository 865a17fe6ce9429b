"""A follower with real worker processes: staging, trials, promotion, rollback, and workers that are killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from guard_middleware.errors import ConfigError
from guard_middleware.types import Verdict
from guard_middleware.weights import follower as follower_module
from guard_middleware.weights import manifest, state
from guard_middleware.weights.directory import now
from guard_middleware.weights.state import Refused, Revision
from tests.support.following import alive, full_disk, pid, run, running
from tests.support.weights import revision


def test_stage_promote_and_roll_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            revision(bench.folder, "new")
            assert await bench.revision() == "r-old"
            found = await bench.ready("new")
            assert found.staged is not None
            assert found.staged.golden == state.Golden(2)
            assert await bench.revision() == "r-old"
            bench.order(state.promote)
            await bench.until(lambda s: s.active.revision == "r-new")
            await asyncio.sleep(0.1)
            assert await bench.revision() == "r-new"
            warm = pid(bench, "warm")
            bench.order(state.roll_back)
            found = await bench.until(lambda s: s.active.name == "old" and s.order is None)
            await asyncio.sleep(0.1)
            assert (await bench.revision(), pid(bench, "active")) == ("r-old", warm)
            assert found.previous is not None
            assert found.previous.name == "new"
            assert bench.serving == ["r-old", "r-new", "r-old"]
            assert bench.told() == ["staged", "ready", "promotion ordered", "promoted", "rollback ordered", "ready",
                                    "rolled back"]  # fmt: skip

    run(main())


def test_a_question_stays_with_its_worker_which_ends_when_it_has_none(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, keep=0.0) as bench:
            revision(bench.folder, "new")
            await bench.ready("new")
            old = pid(bench, "active")
            slow = asyncio.create_task(bench.ask("[wait 3] how do I bake bread?"))
            await asyncio.sleep(0.1)
            bench.order(state.promote)
            await bench.until(lambda s: s.active.name == "new")
            await asyncio.sleep(0.1)
            assert await bench.revision() == "r-new"
            await asyncio.sleep(0.7)
            assert not slow.done()
            assert alive(old)
            outcome = await slow
            assert isinstance(outcome, Verdict)
            assert outcome.revision == "r-old"
            async with asyncio.timeout(10):
                while alive(old):
                    await asyncio.sleep(0.02)

    run(main())


def test_rollback_loads_the_previous_weights_where_they_are_not_warm(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, keep=0.0) as bench:
            revision(bench.folder, "new")
            await bench.promoted("new")
            async with asyncio.timeout(10):
                while bench.follower.switch.warm is not None:
                    await asyncio.sleep(0.02)
            bench.order(state.roll_back)
            await bench.until(lambda s: s.active.name == "old" and s.order is None)
            await asyncio.sleep(0.1)
            assert await bench.revision() == "r-old"

    run(main())


def test_a_broken_golden_set_says_which_case_and_keeps_the_old_weights_unless_forced(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            revision(bench.folder, "new", phrase="bread")
            found = await bench.ready("new")
            assert found.staged is not None
            assert found.staged.golden == state.Golden(2, ("bread", "lock"))
            with pytest.raises(Refused, match="golden set"):
                bench.order(state.promote)
            bench.order(state.promote, force=True)
            found = await bench.until(lambda s: s.active.name == "new")
            assert found.history[-1].why == "forced; golden set broken: bread, lock"

    run(main())


def test_files_that_change_after_staging_are_not_promoted(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            folder = revision(bench.folder, "new")
            await bench.ready("new")
            (folder / "scripted.json").write_text('{"revision": "r-new", "phrase": "other"}')
            bench.order(state.promote)
            found = await bench.until(lambda s: s.order is None)
            assert found.active.name == "old"
            assert found.history[-1].what == "refused"
            assert "changed since SHA256SUMS" in found.history[-1].why
            assert await bench.revision() == "r-old"
            bench.order(state.promote, force=True)
            found = await bench.until(lambda s: s.active.name == "new")
            assert found.active.sums is None
            assert "the checksums do not match" in found.history[-1].why

    run(main())


def test_files_that_do_not_match_are_not_even_loaded(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            folder = revision(bench.folder, "new")
            sums = manifest.check(folder)
            (folder / "extra.py").write_text("")
            found = Revision("new", str(folder), sums)
            bench.directory.update(partial(state.stage, revision=found, by="ada", at=now()))
            after = await bench.phase("failed")
            assert after.staged is not None
            assert "extra.py: not in SHA256SUMS" in after.staged.why

    run(main())


def test_weights_that_call_themselves_like_the_active_ones_are_not_tried(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            revision(bench.folder, "new", revision="r-old")
            bench.stage("new")
            found = await bench.phase("failed")
            assert found.staged is not None
            assert "no record could tell them apart" in found.staged.why

    run(main())


def test_what_was_staged_by_then_is_not_disturbed_by_what_was_staged_before(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            revision(bench.folder, "slow", load=20.0)
            revision(bench.folder, "new")
            bench.stage("slow")
            await bench.phase("loading")
            found = await bench.ready("new")
            assert found.staged is not None
            assert found.staged.revision.revision == "r-new"
            bench.order(state.unstage)
            async with asyncio.timeout(10):
                while bench.follower._trial is not None:
                    await asyncio.sleep(0.02)
            assert await bench.revision() == "r-old"

    run(main())


# -- killed with SIGKILL


def test_a_staged_worker_killed_while_it_loads_is_a_failed_staging(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            revision(bench.folder, "new", load=20.0)
            bench.stage("new")
            await bench.phase("loading")
            async with asyncio.timeout(10):
                while not (bench.follower._trial and bench.follower._trial.seat and bench.follower._trial.seat.pid):
                    await asyncio.sleep(0.02)
            os.kill(pid(bench, "staged"), signal.SIGKILL)
            found = await bench.phase("failed")
            assert found.staged is not None
            assert "exited" in found.staged.why
            assert await bench.revision() == "r-old"

    run(main())


def test_a_staged_worker_killed_after_its_trial_is_not_promoted(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            revision(bench.folder, "new")
            await bench.ready("new")
            os.kill(pid(bench, "staged"), signal.SIGKILL)
            bench.order(state.promote)
            found = await bench.until(lambda s: s.order is None)
            assert (found.active.name, await bench.revision()) == ("old", "r-old")
            assert found.history[-1].what in ("refused", "failed")

    run(main())


def test_a_new_worker_killed_on_trial_hands_back_to_the_old_one_and_no_question_is_lost(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            revision(bench.folder, "new")
            await bench.promoted("new")
            asked = [asyncio.create_task(bench.ask(f"[wait 0.5] bread {number}")) for number in range(5)]
            await asyncio.sleep(0.2)
            os.kill(pid(bench, "active"), signal.SIGKILL)
            outcomes = [*await asyncio.gather(*asked), *[await bench.ask() for _ in range(5)]]
            assert {one.revision for one in outcomes if isinstance(one, Verdict)} == {"r-old"}
            assert all(isinstance(one, Verdict) for one in outcomes)
            found = await bench.until(lambda s: s.active.name == "old")
            assert found.history[-1].what == "reverted"
            assert "-9" in found.history[-1].why
            async with asyncio.timeout(10):
                while bench.serving[-1] != "r-old":
                    await asyncio.sleep(0.02)

    run(main())


def test_after_the_trial_a_killed_worker_is_restarted_on_its_own_weights(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, keep=0.0) as bench:
            revision(bench.folder, "new")
            await bench.promoted("new")
            async with asyncio.timeout(10):
                while bench.follower.switch.warm is not None:
                    await asyncio.sleep(0.02)
            os.kill(pid(bench, "active"), signal.SIGKILL)
            async with asyncio.timeout(20):
                while not isinstance(outcome := await bench.ask(), Verdict):
                    await asyncio.sleep(0.05)
            assert outcome.revision == "r-new"
            assert bench.directory.read().active.name == "new"

    run(main())


# -- starts


def test_what_was_staged_is_staged_again_at_the_next_start_and_an_order_is_dropped(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            revision(bench.folder, "new")
            await bench.ready("new")
        bench.order(state.promote)  # nobody follows
        async with running(tmp_path) as bench:
            assert bench.told()[0] == "interrupted"
            assert await bench.revision() == "r-old"
            found = await bench.phase("ready")
            assert found.active.name == "old"

    run(main())


def test_active_weights_that_changed_on_the_disk_do_not_start(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            folder = revision(bench.folder, "new")
            await bench.promoted("new")
        (folder / "scripted.json").write_text("{}")
        with pytest.raises(ConfigError, match="weights rollback"):
            async with running(tmp_path):
                pass

    run(main())


def test_a_second_gateway_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            with (
                pytest.raises(ConfigError, match=r"a weights\.directory of its own"),
                bench.directory.following(seconds=0.1),
            ):
                pass
            assert bench.directory.followed()
        assert not bench.directory.followed()

    run(main())


# -- the shadow


def test_the_shadow_asks_staged_weights_what_live_questions_ask_and_counts_where_they_agree(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, share=1.0) as bench:
            revision(bench.folder, "new", phrase="bread")
            await bench.ready("new")
            for text in ("how do I bake bread?", "how do I pick a lock?", "what is the time?"):
                await bench.ask(text)
                async with asyncio.timeout(10):
                    while bench.follower.switch._copy is not None and not bench.follower.switch._copy.done():
                        await asyncio.sleep(0.01)
            assert [one.result for one in bench.compared] == ["stricter", "looser", "agreed"]
            told = bench.compared[0].told()
            assert (told["active"]["revision"], told["staged"]["revision"]) == ("r-old", "r-new")
            assert "bread" not in json.dumps(told)
            bench.order(state.promote, force=True)
            found = await bench.until(lambda s: s.active.name == "new")
            assert "shadow: 1 agreed, 1 stricter, 1 looser" in found.history[-1].why

    run(main())


def test_a_slow_or_stopped_staged_worker_delays_no_answer(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, share=1.0) as bench:
            revision(bench.folder, "new")
            await bench.ready("new")
            os.kill(pid(bench, "staged"), signal.SIGSTOP)
            loop = asyncio.get_running_loop()
            began = loop.time()
            for _ in range(20):
                assert isinstance(await bench.ask(deadline=2.0), Verdict)
            assert loop.time() - began < 2.0
            async with asyncio.timeout(10):
                while not bench.compared:
                    await asyncio.sleep(0.02)
            assert {one.result for one in bench.compared} == {"failed"}
            assert bench.compared[0].told()["staged"] == {"revision": "r-new", "error": "timeout"}
            os.kill(pid(bench, "staged"), signal.SIGCONT)

    run(main())


# -- a disk that is full


def test_a_full_disk_keeps_the_old_weights_and_the_order_until_it_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower_module, "_PAUSE", 0.1)

    async def main() -> None:
        async with running(tmp_path) as bench:
            revision(bench.folder, "new")
            await bench.ready("new")
            bench.order(state.promote)
            with full_disk(monkeypatch):
                await asyncio.sleep(1.5)
                assert await bench.revision() == "r-old"
            await bench.until(lambda s: s.active.name == "new")

    run(main())


def test_on_a_full_disk_the_old_worker_takes_over_all_the_same_and_it_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower_module, "_PAUSE", 0.1)

    async def main() -> None:
        async with running(tmp_path) as bench:
            revision(bench.folder, "new")
            await bench.promoted("new")
            with full_disk(monkeypatch):
                os.kill(pid(bench, "active"), signal.SIGKILL)
                async with asyncio.timeout(10):
                    while bench.serving[-1] != "r-old":
                        await asyncio.sleep(0.02)
                assert await bench.revision() == "r-old"
                assert bench.directory.read().active.name == "new"
            found = await bench.until(lambda s: s.active.name == "old")
            assert found.history[-1].what == "reverted"

    run(main())
