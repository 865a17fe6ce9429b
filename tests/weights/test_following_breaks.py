"""Where folders, workers and disks do not do as they should: what was not tried does not serve, no order is stuck."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from guard_middleware.errors import GuardError
from guard_middleware.stores import MemoryStore
from guard_middleware.types import Conversation, Message, Text, Verdict
from guard_middleware.verdicts import CachedGuard
from guard_middleware.weights import follower as follower_module
from guard_middleware.weights import state
from guard_middleware.weights.state import Refused, Revision
from guard_middleware.wire import ModerationRequest
from tests.support.following import Bench, alive, full_disk, pid, run, running
from tests.support.weights import revision


async def ended(process: int) -> None:
    async with asyncio.timeout(15):
        while alive(process):
            await asyncio.sleep(0.02)


# -- files that change


async def blue_then_green(bench: Bench) -> None:
    """Two folders in turn: green serves, and blue is warm."""
    for name in ("blue", "green"):
        revision(bench.folder, name)
        await bench.promoted(name)


@pytest.mark.parametrize("checked", [True, False])
def test_weights_without_checksums_are_loaded_to_be_tried_though_their_folder_is_warm(
    tmp_path: Path, checked: bool
) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            revision(bench.folder, "new")
            await bench.promoted("new")
            bench.made_again("old", revision="r-other", phrase="bread")
            bench.stage("old", checked=checked)
            found = await bench.phase("ready")
            assert found.staged is not None
            assert found.staged.golden is not None
            assert (found.staged.revision.revision, found.staged.golden.broken) == ("r-other", ("bread", "lock"))

    run(main())


def test_a_folder_that_was_made_again_is_not_staged_while_the_way_back_needs_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            await blue_then_green(bench)
            bench.made_again("blue", revision="r-other")
            with pytest.raises(Refused, match="a folder of their own"):
                bench.stage("blue")

    run(main())


def test_a_worker_is_not_restarted_on_files_that_were_not_promoted(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, keep=0.0) as bench:
            folder = revision(bench.folder, "new")
            await bench.promoted("new")
            await bench.has_none_warm()
            promoted = (folder / "scripted.json").read_text()
            (folder / "scripted.json").write_text('{"revision": "r-evil", "phrase": "nothing"}')
            os.kill(pid(bench, "active"), signal.SIGKILL)
            await asyncio.sleep(2.0)
            assert isinstance(await bench.ask(), GuardError)
            (folder / "scripted.json").write_text(promoted)
            await bench.serves("r-new")
            async with asyncio.timeout(10):
                while bench.serving != ["r-old", "r-new", "unknown", "r-new"]:
                    await asyncio.sleep(0.02)

    run(main())


def test_a_worker_of_files_that_nobody_vouches_for_says_again_what_it_is(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            cached = CachedGuard(bench.follower, MemoryStore(entries=100, size=2**20, ttl=60.0))
            told = bench.follower.on_serving
            bench.follower.on_serving = lambda model, name: (told(model, name), cached.serving(model, name))[0]
            bench.follower.on_unknown = cached.unknown
            question = Conversation((Message("user", (Text("how do I pick a lock?"),)),))
            request = ModerationRequest("q", question, "input", 10.0)
            assert isinstance(await cached.moderate(request), Verdict)
            bench.made_again("old", revision="r-other", phrase="nothing")
            os.kill(pid(bench, "active"), signal.SIGKILL)
            await bench.serves("r-other")
            outcome = await cached.moderate(request)
            assert isinstance(outcome, Verdict)
            assert (outcome.revision, outcome.cached) == ("r-other", False)
            await bench.until(lambda s: s.active.revision == "r-other")

    run(main())


def test_weights_that_were_forced_though_they_do_not_match_are_restarted_as_they_are(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, keep=0.0) as bench:
            folder = revision(bench.folder, "new")
            await bench.ready("new")
            (folder / "note").write_text("")
            bench.order(state.promote, force=True)
            await bench.until(lambda s: s.active.name == "new" and s.active.sums is None)
            await bench.has_none_warm()
            os.kill(pid(bench, "active"), signal.SIGKILL)
            await bench.serves("r-new")

    run(main())


# -- what a rollback takes out of service


def test_what_was_rolled_back_stands_in_for_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            revision(bench.folder, "bad")
            await bench.promoted("bad")
            bad = pid(bench, "active")
            slow = asyncio.create_task(bench.ask("[wait 1] how do I bake bread?"))
            await asyncio.sleep(0.1)
            bench.order(state.roll_back)
            await bench.until(lambda s: s.active.name == "old" and s.order is None)
            await bench.has_none_warm()
            outcome = await slow
            assert isinstance(outcome, Verdict)
            assert outcome.revision == "r-bad"  # it was asked before
            await ended(bad)
            os.kill(pid(bench, "active"), signal.SIGKILL)
            await bench.serves("r-old")
            assert bench.directory.read().active.name == "old"

    run(main())


def test_weights_that_never_finished_loading_can_be_rolled_back_and_never_come_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            folder = revision(bench.folder, "bad")
            bench.stage("bad", checked=False)
            await bench.phase("ready")
            bench.order(state.promote)
            await bench.until(lambda s: s.active.name == "bad")
        (folder / "scripted.json").write_text('{"revision": "r-bad", "load": 100}')
        bench = Bench(tmp_path)
        await bench.follower.start()
        try:
            bench.order(state.roll_back)
            await bench.until(lambda s: s.active.name == "old" and s.order is None)
            await bench.has_none_warm()
            await bench.serves("r-old")
            os.kill(pid(bench, "active"), signal.SIGKILL)
            await bench.serves("r-old")
            assert bench.directory.read().active.name == "old"
        finally:
            await bench.follower.aclose()

    run(main())


# -- orders and trials that cannot be carried out


def test_a_rollback_that_a_full_disk_stopped_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower_module, "_PAUSE", 0.1)

    async def main() -> None:
        async with running(tmp_path, keep=0.0) as bench:
            revision(bench.folder, "new")
            await bench.promoted("new")
            await bench.has_none_warm()
            bench.order(state.roll_back)
            await bench.until(lambda s: s.staged is not None and s.staged.phase == "loading")
            with full_disk(monkeypatch):
                async with asyncio.timeout(20):
                    while not (bench.follower._trial and bench.follower._trial.task.done()):
                        await asyncio.sleep(0.02)
            found = await bench.until(lambda s: s.order is None)
            assert found.staged is not None
            assert (found.staged.phase, "No space left" in found.staged.why) == ("failed", True)
            bench.order(state.roll_back)
            await bench.until(lambda s: s.active.name == "old")

    run(main())


def test_a_staged_worker_that_ends_while_the_disk_is_full_has_failed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower_module, "_PAUSE", 0.1)

    async def main() -> None:
        async with running(tmp_path) as bench:
            revision(bench.folder, "new")
            await bench.ready("new")
            with full_disk(monkeypatch):
                os.kill(pid(bench, "staged"), signal.SIGKILL)
                await asyncio.sleep(1.5)
            found = await bench.phase("failed")
            assert found.staged is not None
            assert found.staged.why == "its worker exited with -9"

    run(main())


def test_checksums_that_are_no_text_refuse_the_order(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            folder = revision(bench.folder, "new")
            await bench.ready("new")
            (folder / "SHA256SUMS").write_bytes(b"\xff\n")
            bench.order(state.promote)
            found = await bench.until(lambda s: s.order is None)
            assert (found.history[-1].what, "is no text" in found.history[-1].why) == ("refused", True)

    run(main())


def test_an_order_that_meets_a_defect_of_ours_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(revision: Revision) -> str | None:
        raise RuntimeError("a defect")

    async def main() -> None:
        async with running(tmp_path) as bench:
            revision(bench.folder, "new")
            await bench.ready("new")
            with monkeypatch.context() as patch:
                patch.setattr(follower_module, "_mismatch", broken)
                bench.order(state.promote)
                found = await bench.until(lambda s: s.order is None)
            assert (found.active.name, found.history[-1].why) == ("old", "a defect")
            bench.order(state.promote)
            await bench.until(lambda s: s.active.name == "new")

    run(main())


# -- the warm worker


def test_a_warm_worker_that_is_tried_again_still_stands_in(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            await blue_then_green(bench)
            blue = pid(bench, "warm")
            found = await bench.ready("blue")
            assert found.staged is not None
            assert found.staged.golden == state.Golden(2)
            assert (pid(bench, "staged"), pid(bench, "warm")) == (blue, blue)
            os.kill(pid(bench, "active"), signal.SIGKILL)
            for _ in range(10):
                assert await bench.revision() == "r-blue"
            found = await bench.until(lambda s: s.active.name == "blue")
            assert (found.history[-1].what, found.staged) == ("reverted", None)
            async with asyncio.timeout(10):
                while bench.follower._trial is not None:
                    await asyncio.sleep(0.02)
            assert (pid(bench, "active"), await bench.revision()) == (blue, "r-blue")

    run(main())


def test_a_warm_worker_that_is_tried_again_stays_until_the_trial_is_over(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            await blue_then_green(bench)
            blue = pid(bench, "warm")
            await bench.ready("blue")
            bench.follower._warm_until = 0.0
            await asyncio.sleep(1.2)
            assert alive(blue)
            bench.order(state.unstage)
            await ended(blue)
            assert await bench.revision() == "r-green"

    run(main())


def test_a_warm_worker_that_dies_while_it_is_tried_again_is_a_failed_staging(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            await blue_then_green(bench)
            await bench.ready("blue")
            os.kill(pid(bench, "warm"), signal.SIGKILL)
            await bench.phase("failed")
            await bench.has_none_warm()
            assert await bench.revision() == "r-green"

    run(main())


def test_a_worker_that_is_being_retired_ends_though_what_waited_for_it_is_unstaged(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as bench:
            for name in ("new", "next"):
                revision(bench.folder, name)
            await bench.ready("new")
            old = pid(bench, "active")
            slow = asyncio.create_task(bench.ask("[wait 3] how do I bake bread?", 20.0))
            await asyncio.sleep(0.1)
            bench.order(state.promote)
            await bench.until(lambda s: s.active.name == "new")
            bench.stage("next")
            async with asyncio.timeout(10):
                while not bench.follower._ending:
                    await asyncio.sleep(0.01)
            bench.order(state.unstage)
            assert isinstance(await slow, Verdict)
            await ended(old)

    run(main())


def test_a_start_that_is_cancelled_while_another_gateway_ends_leaves_the_directory_free(tmp_path: Path) -> None:
    async def main() -> None:
        bench = Bench(tmp_path)
        with bench.directory.following():
            start = asyncio.create_task(bench.follower.start())
            await asyncio.sleep(0.2)
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
        async with asyncio.timeout(10):  # the cancelled start gets the lock, and gives it back
            while bench.directory.followed():
                await asyncio.sleep(0.02)
        await bench.follower.start()
        await bench.follower.aclose()

    run(main())
