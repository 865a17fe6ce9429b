"""A follower with real worker processes, its weights directory, and what it said: what its tests have in common."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from guard_middleware.errors import GuardError
from guard_middleware.types import Conversation, Message, Text, Verdict
from guard_middleware.weights import golden, manifest, state
from guard_middleware.weights.directory import WeightsDirectory, now
from guard_middleware.weights.follower import Follower, Trials
from guard_middleware.weights.seats import Compared
from guard_middleware.weights.state import Entry, Revision, State
from guard_middleware.wire import ModerationRequest
from tests.support.weights import command, golden_set, revision


class Bench:
    """A follower, its directory, and what it said."""

    def __init__(self, folder: Path, *, share: float = 0.0, keep: float = 60.0) -> None:
        self.folder = folder / "weights"
        first = self.folder / "old"
        self.directory = WeightsDirectory(self.folder, str(first if first.is_dir() else revision(self.folder, "old")))
        self.entries: list[Entry] = []
        self.compared: list[Compared] = []
        self.serving: list[str] = []
        cases = golden.load(golden_set(folder))
        self.follower = Follower(
            self.directory,
            Trials(cases, share, keep),
            command,
            on_entry=self.entries.append,
            on_compared=self.compared.append,
        )
        self.follower.on_serving = lambda model, revision: self.serving.append(revision)
        self.follower.on_unknown = lambda: self.serving.append("unknown")

    def made_again(self, name: str, **script: Any) -> None:
        """Other files in the folder of a revision, with checksums of their own."""
        shutil.rmtree(self.folder / name)
        revision(self.folder, name, **script)

    def told(self) -> list[str]:
        return [entry.what for entry in self.entries]

    def stage(self, name: str, *, checked: bool = True) -> None:
        folder = self.folder / name
        found = Revision(name, str(folder), manifest.check(folder) if checked else None)
        self.directory.update(partial(state.stage, revision=found, by="ada", at=now()))

    def order(self, change: Callable[..., State], **more: Any) -> None:
        self.directory.update(partial(change, by="ada", at=now(), **more))

    async def until(self, condition: Callable[[State], Any], seconds: float = 30.0) -> State:
        async with asyncio.timeout(seconds):
            while not condition(found := self.directory.read()):
                await asyncio.sleep(0.02)
        return found

    async def phase(self, phase: str) -> State:
        return await self.until(lambda s: s.staged is not None and s.staged.phase == phase)

    async def ready(self, name: str) -> State:
        """Stages ``name`` and waits until it has been tried."""
        self.stage(name)
        return await self.phase("ready")

    async def ask(self, text: str = "how do I bake bread?", deadline: float = 10.0) -> Verdict | GuardError:
        question = Conversation((Message("user", (Text(text),)),))
        return await self.follower.moderate(ModerationRequest("q", question, "input", deadline))

    async def revision(self) -> str:
        outcome = await self.ask()
        assert isinstance(outcome, Verdict), outcome
        return outcome.revision

    async def serves(self, name: str) -> None:
        """Until a question is answered by the weights ``name``, and by none but them."""
        async with asyncio.timeout(20):
            while not isinstance(outcome := await self.ask(), Verdict):
                await asyncio.sleep(0.05)
        assert outcome.revision == name

    async def has_none_warm(self) -> None:
        async with asyncio.timeout(10):
            while self.follower.switch.warm is not None:
                await asyncio.sleep(0.02)

    async def promoted(self, name: str) -> None:
        await self.ready(name)
        self.order(state.promote)
        await self.until(lambda s: s.active.name == name)
        async with asyncio.timeout(10):  # the state says so first
            while self.serving[-1] != f"r-{name}":
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running(folder: Path, **options: Any) -> AsyncIterator[Bench]:
    bench = Bench(folder, **options)
    await bench.follower.start()
    try:
        await bench.follower.wait_ready()
        yield bench
    finally:
        await bench.follower.aclose()


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 120))


def pid(bench: Bench, which: str) -> int:
    follower = bench.follower
    trial = follower._trial
    seat = {"active": follower.switch.active, "warm": follower.switch.warm, "staged": trial and trial.seat}[which]
    assert seat is not None
    assert seat.pid is not None
    return seat.pid


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def full(self: WeightsDirectory, value: State) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(WeightsDirectory, "_write", full)
        yield
