"""Answers that a client continues by their id: remembered with their conversation, or refused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from guard_middleware.errors import RejectKind, RequestRejected
from guard_middleware.history import History, Scopes
from guard_middleware.stores import MemoryStore, RedisStore, connect
from guard_middleware.types import (
    Blob,
    Conversation,
    Definition,
    Message,
    Reasoning,
    Text,
    ToolCall,
    ToolCallResponse,
    Uri,
)
from tests.support.redis_server import RedisServer, needs_redis

PHOTO = Blob("image/jpeg", b"photo" * 1000)
TALK = Conversation(
    (
        Message("system", (Text("be brief \udc80"),)),
        Message("user", (Text("what is it?"), PHOTO, PHOTO), name="ann"),
        Message("assistant", (Reasoning("hm"), ToolCall("c", "find", '{"q": 1}'))),
        Message("tool", (ToolCallResponse("c", "found"), Blob("image/png", b"chart"))),
    ),
    (Definition("tool", "finds"),),
    Message("assistant", (Text("a cat"),)),
)


def memory(size: int = 10**6) -> MemoryStore:
    return MemoryStore(entries=100, size=size, ttl=60)


def run(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await work

    asyncio.run(bounded())


async def unknown(history: History, scope: str, answer_id: str) -> None:
    with pytest.raises(RequestRejected) as caught:
        await history.find(scope, answer_id)
    error = caught.value
    assert (error.kind, error.param) == (RejectKind.INVALID_REQUEST, "previous_response_id")
    assert error.message == (
        "No answer with this id is known here: it did not pass this service, was not for you, or is too old. "
        "Send the whole conversation instead."
    )


def test_a_conversation_comes_back_as_it_was() -> None:
    async def work() -> None:
        history = History(memory(), max_bytes=10**6)
        await history.remember("me", "resp_1", TALK)
        assert await history.find("me", "resp_1") == TALK
        assert await history.find("me", "resp_1") == TALK  # it may be continued more than once

    run(work())


def test_what_is_not_known_is_refused_in_the_same_words_as_what_is_somebody_elses() -> None:
    async def work() -> None:
        history = History(memory(), max_bytes=10**6)
        await history.remember("me", "resp_1", TALK)
        await unknown(history, "me", "resp_2")
        await unknown(history, "other", "resp_1")
        await unknown(history, "me", "x" * 600)
        await unknown(history, "meresp", "_1")
        await unknown(History(None, max_bytes=1), "me", "resp_1")

    run(work())


def test_an_image_is_kept_once_however_many_turns_show_it() -> None:
    async def work() -> None:
        store = memory()
        history = History(store, max_bytes=10**6)
        for turn in range(5):
            await history.remember("me", f"resp_{turn}", TALK)
        assert len(PHOTO.data) < store.bytes < 3 * len(PHOTO.data)

    run(work())


def test_a_conversation_whose_image_was_forgotten_is_not_known() -> None:
    async def work() -> None:
        store = memory(size=8000)
        history = History(store, max_bytes=10**6)
        await history.remember("me", "resp_1", TALK)
        assert await history.find("me", "resp_1") == TALK
        other = Conversation((Message("user", (Blob("image/png", b"x" * 4000),)),))
        await history.remember("me", "resp_2", other)
        assert await history.find("me", "resp_2") == other
        await unknown(history, "me", "resp_1")

    run(work())


def test_an_image_that_is_not_the_one_that_was_judged_is_not_given_back() -> None:
    class Swapped(MemoryStore):
        async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
            return [b"other" if value == PHOTO.data else value for value in await super().get(keys)]

    async def work() -> None:
        history = History(Swapped(entries=100, size=10**6, ttl=60), max_bytes=10**6)
        await history.remember("me", "resp_1", TALK)
        await unknown(history, "me", "resp_1")

    run(work())


def test_a_conversation_that_is_too_long_or_not_whole_is_not_kept() -> None:
    async def work() -> None:
        store = memory()
        history = History(store, max_bytes=5000)
        await history.remember("me", "resp_1", TALK)
        await history.remember("me", "x" * 600, Conversation((Message("user", (Text("hi"),)),)))
        await history.remember("me", "resp_2", Conversation((Message("user", (Uri("http://a/b.png"),)),)))
        assert len(store) == 0
        await unknown(history, "me", "resp_1")

    run(work())


# -- who asks --

BEARER = (b"authorization", b"Bearer a")


@pytest.mark.parametrize(
    ("tenant", "headers"),
    [
        (None, ()),
        (None, (BEARER,)),
        (None, ((b"authorization", b"Bearer b"),)),
        (None, ((b"x-api-key", b"Bearer a"),)),
        (None, ((b"api-key", b"Bearer a"),)),
        (None, (BEARER, (b"openai-project", b"p"))),
        ("acme", (BEARER,)),
        ("authorization", ()),
    ],
)
def test_callers_who_prove_different_things_do_not_share_answers(
    tenant: str | None, headers: tuple[tuple[bytes, bytes], ...]
) -> None:
    scopes = Scopes(b"k" * 16)
    mine = scopes.of(tenant, headers)
    others = [("globex", headers), ("globex", ()), (None, ((b"authorization", b"Bearer c"),))]
    assert mine not in [scopes.of(*other) for other in others]
    assert scopes.of(tenant, (*headers, (b"x-session-id", b"1"), (b"x-guard-scope", b"acme"))) == mine
    assert Scopes(b"k" * 16).of(tenant, headers) == mine
    assert Scopes().of(tenant, headers) != mine
    assert "Bearer" not in mine


def test_the_tenant_decides_before_its_keys() -> None:
    scopes = Scopes()
    assert scopes.of("acme", (BEARER,)) == scopes.of("acme", ())
    assert scopes.of("acme", ()) != scopes.of(None, ())


# -- in Redis --


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    redis = RedisServer(tmp_path)
    redis.start()
    yield redis
    redis.stop()


def shared(server: RedisServer, key: bytes = b"k" * 32) -> tuple[History, RedisStore]:
    client = connect(server.url, seconds=0.5)
    store = RedisStore(client, key=key, space="h", ttl=60, seconds=0.5, max_bytes=10**6)
    return History(store, max_bytes=10**6), store


@needs_redis
def test_another_gateway_finds_it_and_a_forged_or_lost_one_is_not_known(server: RedisServer) -> None:
    async def work() -> None:
        (a, store), (b, other), (forger, forging) = shared(server), shared(server), shared(server, b"another key here")
        client = store._client
        await a.remember("me", "resp_1", TALK)
        await a.remember("me", "resp_2", replace(TALK, answer=None))
        assert await b.find("me", "resp_1") == TALK
        await forger.remember("me", "resp_3", TALK)
        await unknown(b, "me", "resp_3")
        names = await client.keys("*")
        kept = {name: await client.get(name) for name in names}
        for name in names:  # each alone is garbage, in turn
            await client.set(name, kept[names[0]][:-1] + b"!")
            found = []
            for answer in ("resp_1", "resp_2"):
                try:
                    found.append(await b.find("me", answer))
                except RequestRejected:
                    found.append(None)
            assert found[0] in (None, TALK)
            assert found[1] in (None, replace(TALK, answer=None))
            await client.set(name, kept[name])
        assert await b.find("me", "resp_1") == TALK
        server.stop()
        await unknown(b, "me", "resp_1")
        await a.remember("me", "resp_4", TALK)
        for one in (store, other, forging):
            await one._client.aclose()

    run(work())
