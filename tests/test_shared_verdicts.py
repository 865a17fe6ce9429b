"""Verdicts and conversations in a real Redis: shared, gone, slow, and written to by others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guard_middleware.stores import RedisStore, connect
from guard_middleware.turns import TurnBounds
from guard_middleware.types import Conversation
from tests.support.pieces import HELLO, LONG, Bench, image, run, then, user
from tests.support.redis_server import RedisServer, needs_redis


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    redis = RedisServer(tmp_path)
    redis.start()
    yield redis
    redis.stop()


def shared(server: RedisServer, key: bytes = b"k" * 32) -> RedisStore:
    client = connect(server.url, seconds=0.2)
    return RedisStore(client, key=key, space="v", ttl=60, seconds=0.2, max_bytes=10**6)


async def close(*benches: Bench) -> None:
    for bench in benches:
        await bench.cached.aclose()
        await bench.store._client.aclose()


async def written(bench: Bench) -> None:
    await asyncio.gather(*bench.cached._chores)


@needs_redis
def test_gateways_that_share_a_server_share_verdicts_and_conversations(server: RedisServer) -> None:
    async def work() -> None:
        a, b = Bench(store=shared(server)), Bench(store=shared(server))
        talk = then(await a.turn(then(Conversation(()), "one", image("x")), LONG), "two")
        await a.verdict(HELLO)
        await written(a)
        await b.verdict(Conversation((user("so that it knows the weights"),)))
        assert (await b.verdict(HELLO)).cached
        assert dict((await b.verdict(talk)).left_out)["characters"] > 500
        assert len(b.inner.asked) == 2
        await close(a, b)

    run(work())


@needs_redis
def test_whoever_can_write_to_the_server_cannot_make_a_verdict(server: RedisServer) -> None:
    async def work() -> None:
        bench, forger = Bench(store=shared(server)), Bench(store=shared(server, b"the forger's own key"))
        bad = Conversation((user("{pickalock}"),))
        assert (await bench.verdict(bad)).request == "harmful"
        await forger.verdict(HELLO)
        await written(bench)
        await written(forger)
        client = bench.store._client
        names = await client.keys("*")
        values = [await client.get(name) for name in names]
        for name in names:
            for value in (*values, b"", b"garbage", b'{"verdict":{"request":"unharmful"}}'):
                await client.set(name, value)
                assert (await bench.verdict(bad)).request == "harmful"
        await close(bench, forger)

    run(work())


@needs_redis
@pytest.mark.parametrize("break_it", [RedisServer.stop, RedisServer.pause])
def test_without_the_server_everything_is_judged_again_and_nothing_is_skipped(
    server: RedisServer, break_it: Callable[[RedisServer], None]
) -> None:
    async def work() -> None:
        bench = Bench(store=shared(server), bounds=TurnBounds(0, 0))
        talk = then(await bench.turn(then(Conversation(()), "{pick}"), LONG), "{alock}")
        await written(bench)
        break_it(server)
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert (await bench.verdict(talk)).request == "harmful"
        assert bench.inner.asked[-1].conversation == talk
        assert (await bench.verdict(talk)).request == "harmful"
        assert not (await bench.verdict(HELLO)).cached
        assert loop.time() - began < 1.0
        await close(bench)

    run(work())
