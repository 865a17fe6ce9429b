"""The bundled guard and a copy of it under another revision, as they are served: loaded, tried, promoted, killed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

from guard_middleware.guard.supervisor import worker_command
from guard_middleware.types import Conversation, Message, Text, Verdict
from guard_middleware.weights import golden, manifest, state
from guard_middleware.weights.directory import WeightsDirectory, now
from guard_middleware.weights.follower import Follower, Trials
from guard_middleware.weights.state import Golden, Revision, State
from guard_middleware.wire import ModerationRequest
from guard_middleware.worker.weights import load
from guard_training.update.revision import write_sums

pytestmark = pytest.mark.slow
NANO = Path(golden.__file__).parents[1] / "models" / "nano"


def test_nano_and_a_copy_of_it_change_places(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    copy = tmp_path / "weights" / "copy"
    shutil.copytree(NANO, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "note": "another revision"}))
    calibration = json.loads((copy / "calibration.json").read_text())
    revision = load(copy, name="copy").facts.revision
    (copy / "calibration.json").write_text(json.dumps({**calibration, "revision": revision}))
    write_sums(copy)
    directory = WeightsDirectory(tmp_path / "weights", "nano")
    cases = golden.load(golden.BUNDLED)
    follower = Follower(
        directory,
        Trials(cases, share=1.0, keep=300.0),
        lambda model, socket: worker_command(model, socket, threads=1),
    )
    serving: list[str] = []
    follower.on_serving = lambda model, revision: serving.append(revision)

    async def until(condition: object, seconds: float = 240.0) -> State:
        async with asyncio.timeout(seconds):
            while not condition(found := directory.read()):  # type: ignore[operator]
                await asyncio.sleep(0.1)
        return found

    async def ask() -> Verdict:
        question = Conversation((Message("user", (Text("What is the capital of France?"),)),))
        outcome = await follower.moderate(ModerationRequest("q", question, "input", 60.0))
        assert isinstance(outcome, Verdict), outcome
        return outcome

    async def main() -> None:
        await follower.start()
        try:
            await follower.wait_ready()
            first = await ask()
            sums = manifest.check(copy)
            directory.update(partial(state.stage, revision=Revision("copy", str(copy), sums), by="ada", at=now()))
            found = await until(lambda s: s.staged.phase in ("ready", "failed"))
            assert found.staged is not None
            assert found.staged.golden == Golden(len(cases)), found.staged
            assert (await ask()).revision == first.revision
            directory.update(partial(state.promote, by="ada", at=now()))
            await until(lambda s: s.active.name == "copy" and len(serving) == 2)
            second = await ask()
            assert second.revision not in ("", first.revision)
            assert (second.request, second.request_score) == (first.request, first.request_score)
            seat = follower.switch.active
            assert seat is not None
            assert seat.pid is not None
            os.kill(seat.pid, signal.SIGKILL)
            assert (await ask()).revision == first.revision
            await until(lambda s: s.active.name == "nano" and s.history[-1].what == "reverted")
        finally:
            await follower.aclose()

    asyncio.run(asyncio.wait_for(main(), 290))
