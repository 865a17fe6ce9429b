"""What is kept while weights change: no verdict of other weights answers, kept or on its way."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any

import pytest

from guard_middleware.errors import GuardError
from guard_middleware.guard.client import GuardClient
from guard_middleware.stores import MemoryStore
from guard_middleware.turns import TurnBounds
from guard_middleware.types import Conversation, Message, Text, Verdict
from guard_middleware.verdicts import CachedGuard
from guard_middleware.wire import ModerationRequest
from tests.support.scripted_worker import ScriptedGuard

STORE = {"entries": 100, "size": 2**20, "ttl": 60.0}


class Changing:
    """Answers as the weights ``revision`` of the moment at which it was asked; waits for ``gate``."""

    def __init__(self) -> None:
        self.revision, self.asked = "old", list[ModerationRequest]()
        self.gate = asyncio.Event()
        self.gate.set()

    async def moderate(self, request: ModerationRequest) -> Verdict | GuardError:
        self.asked.append(request)
        revision = self.revision
        await self.gate.wait()
        return replace(await ScriptedGuard("m").moderate(request, 1.0), revision=revision)


class SlowStore(MemoryStore):
    def __init__(self) -> None:
        super().__init__(**STORE)
        self.gate = asyncio.Event()
        self.gate.set()

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        found = await super().get(keys)
        await self.gate.wait()
        return found


def question(*texts: str) -> ModerationRequest:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[n % 2], (Text(text),)) for n, text in enumerate(texts))
    return ModerationRequest("q", Conversation(messages), "input", 5.0)


async def revision(cached: CachedGuard, *texts: str) -> tuple[str, bool]:
    outcome = await cached.moderate(question(*texts or ("hello",)))
    assert isinstance(outcome, Verdict)
    return outcome.revision, outcome.cached


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 30))


def test_after_a_promotion_kept_verdicts_of_the_old_weights_answer_nothing() -> None:
    async def main() -> None:
        guard = Changing()
        cached = CachedGuard(guard, MemoryStore(**STORE))
        assert [await revision(cached), await revision(cached)] == [("old", False), ("old", True)]
        guard.revision = "new"
        cached.serving("m", "new")
        assert [await revision(cached), await revision(cached)] == [("new", False), ("new", True)]
        guard.revision = "old"
        cached.serving("m", "old")  # a rollback: what these very weights said is theirs
        assert await revision(cached) == ("old", True)

    run(main())


def test_a_verdict_of_the_old_weights_that_comes_late_makes_nothing_theirs_again() -> None:
    async def main() -> None:
        guard = Changing()
        cached = CachedGuard(guard, MemoryStore(**STORE))
        await revision(cached)
        guard.gate.clear()
        late = asyncio.create_task(revision(cached, "another question"))
        await asyncio.sleep(0.01)
        guard.revision = "new"
        cached.serving("m", "new")
        guard.gate.set()
        assert await late == ("old", False)  # it was asked before
        assert await revision(cached) == ("new", False)
        assert await revision(cached, "another question") == ("new", False)

    run(main())


def test_who_asks_after_the_promotion_does_not_wait_for_what_the_old_weights_are_saying() -> None:
    async def main() -> None:
        guard = Changing()
        cached = CachedGuard(guard, MemoryStore(**STORE))
        guard.gate.clear()
        before = asyncio.create_task(revision(cached))
        await asyncio.sleep(0.01)
        guard.revision = "new"
        cached.serving("m", "new")
        after = asyncio.create_task(revision(cached))
        await asyncio.sleep(0.01)
        guard.gate.set()
        assert await asyncio.gather(before, after) == [("old", False), ("new", False)]

    run(main())


def test_a_look_up_that_is_under_way_finds_nothing_of_the_old_weights() -> None:
    async def main() -> None:
        guard, store = Changing(), SlowStore()
        cached = CachedGuard(guard, store)
        await revision(cached)
        store.gate.clear()
        looking = asyncio.create_task(revision(cached))
        await asyncio.sleep(0.01)
        guard.revision = "new"
        cached.serving("m", "new")
        store.gate.set()
        assert await looking == ("new", False)

    run(main())


def test_a_conversation_that_the_old_weights_passed_is_read_whole_by_the_new_ones() -> None:
    async def main() -> None:
        guard = Changing()
        cached = CachedGuard(guard, MemoryStore(**STORE), bounds=TurnBounds(10, 1))
        await revision(cached, "hello")
        guard.revision = "new"
        cached.serving("m", "new")
        await revision(cached, "hello", "an answer " * 50, "and now?")
        assert guard.asked[-1].conversation == question("hello", "an answer " * 50, "and now?").conversation

    run(main())


def test_a_worker_that_went_away_may_come_back_with_other_weights() -> None:
    async def main() -> None:
        guard = Changing()
        cached = CachedGuard(guard, MemoryStore(**STORE))
        await revision(cached)
        cached.unknown()
        guard.revision = "new"
        assert await revision(cached) == ("new", False)

    run(main())


@pytest.mark.parametrize("known", [True, False])
def test_a_verdict_of_a_worker_that_stands_in_does_not_make_its_weights_those_that_judge(known: bool) -> None:
    async def main() -> None:
        guard = Changing()
        cached = CachedGuard(guard, MemoryStore(**STORE))
        cached.serving("m", "old")
        await revision(cached)
        cached.serving("m", "new")
        if not known:
            cached.unknown()
        assert await revision(cached, "another question") == ("old", False)
        guard.revision = "new"
        assert await revision(cached) == ("new", False)
        assert await revision(cached, "another question") == ("new", False)
        cached.serving("m", "old")
        assert await revision(cached, "another question") == ("old", True)

    run(main())


def test_a_client_says_that_its_connection_has_ended(tmp_path: Any) -> None:
    from websockets.asyncio.server import ServerConnection, unix_serve

    async def main() -> None:
        async def closes(connection: ServerConnection) -> None:
            await connection.recv()
            await connection.close()

        lost: list[bool] = []
        async with unix_serve(closes, str(tmp_path / "w.sock")):
            client = GuardClient(tmp_path / "w.sock")
            client.on_lost = lambda: lost.append(True)
            assert isinstance(await client.moderate(question("hello")), GuardError)
            assert lost == [True]
            await client.aclose()

    run(main())
