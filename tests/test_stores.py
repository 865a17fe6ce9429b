"""Both stores, the second on a real server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from guard_middleware.errors import ConfigError
from guard_middleware.stores import MemoryStore, RedisStore, connect
from tests.support.redis_server import RedisServer, needs_redis

KEY = b"k" * 32


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def memory(entries: int = 10, size: int = 10**6, ttl: float = 60) -> tuple[MemoryStore, Clock]:
    clock = Clock()
    return MemoryStore(entries=entries, size=size, ttl=ttl, clock=clock), clock


def test_memory_forgets_the_least_recently_used() -> None:
    async def run() -> None:
        store, _ = memory(entries=2)
        await store.put({b"a": b"1"})
        await store.put({b"b": b"2"})
        assert await store.get([b"a"]) == [b"1"]
        await store.put({b"c": b"3"})
        assert await store.get([b"a", b"b", b"c"]) == [b"1", None, b"3"]

    asyncio.run(run())


def test_memory_is_bounded_in_bytes_and_counts_what_it_holds() -> None:
    async def run() -> None:
        store, _ = memory(size=2500)
        for name in (b"a", b"b", b"c", b"b"):
            await store.put({name: b"x" * 1000})
        assert await store.get([b"a", b"b", b"c"]) == [None, b"x" * 1000, b"x" * 1000]
        assert 2000 < store.bytes <= 2500
        await store.put({b"d": b"x" * 5000})
        assert len(store) == 0
        assert store.bytes == 0

    asyncio.run(run())


def test_memory_forgets_what_is_old_unless_it_was_touched() -> None:
    async def run() -> None:
        store, clock = memory(ttl=60)
        await store.put({b"a": b"1", b"b": b"2"})
        clock.now += 50
        assert await store.touch([b"a", b"none"]) == [True, False]
        clock.now += 50
        assert await store.get([b"a", b"b"]) == [b"1", None]
        clock.now += 50
        assert await store.get([b"a"]) == [None]

    asyncio.run(run())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    redis = RedisServer(tmp_path)
    redis.start()
    yield redis
    redis.stop()


class Gateway:
    """What one gateway has of a server, its own clock, and the errors it was told of."""

    def __init__(self, server: RedisServer, *, key: bytes = KEY, ttl: float = 60, max_bytes: int = 10**6) -> None:
        self.client = connect(server.url, seconds=0.2)
        self.errors: list[str] = []
        self.clock = Clock()
        self.store = RedisStore(
            self.client, key=key, space="t", ttl=ttl, seconds=0.2, max_bytes=max_bytes,
            on_error=self.errors.append, clock=self.clock,
        )  # fmt: skip


def with_gateways(work: Callable[..., Awaitable[None]], *gateways: Gateway) -> None:
    async def run() -> None:
        try:
            await work(*gateways)
        finally:
            for gateway in gateways:
                await gateway.client.aclose()

    asyncio.run(run())


@needs_redis
def test_what_one_gateway_puts_another_with_the_same_key_finds(server: RedisServer) -> None:
    async def work(a: Gateway, b: Gateway, stranger: Gateway) -> None:
        await a.store.put({b"x": b"1", b"y": b"\0\xff" * 500})
        assert await b.store.get([b"x", b"none", b"y"]) == [b"1", None, b"\0\xff" * 500]
        assert await stranger.store.get([b"x"]) == [None]
        assert (a.errors, b.errors) == ([], [])
        assert await b.store.touch([b"x", b"none"]) == [True, False]

    with_gateways(work, Gateway(server), Gateway(server), Gateway(server, key=b"another key of 16+"))


@needs_redis
def test_names_and_content_digests_on_the_server_are_keyed(server: RedisServer) -> None:
    async def work(a: Gateway) -> None:
        await a.store.put({b"content digest": b"1"})
        (name,) = await a.client.keys("*")
        assert name.startswith(b"t:")
        assert b"content" not in name

    with_gateways(work, Gateway(server))


@needs_redis
@pytest.mark.parametrize(
    "forge",
    [
        lambda sealed, other: b"",
        lambda sealed, other: b"garbage",
        lambda sealed, other: b'{"verdict": "unharmful"}',
        lambda sealed, other: sealed[:-1],
        lambda sealed, other: sealed[:-1] + bytes([sealed[-1] ^ 1]),
        lambda sealed, other: sealed[:32] + b"\0\0\0\0\xff\0\0\0" + sealed[40:],  # a later expiry
        lambda sealed, other: other,  # a true entry under another name
        lambda sealed, other: bytes(32) + sealed[32:],
    ],
)
def test_an_entry_that_nobody_with_the_key_wrote_is_none(
    server: RedisServer, forge: Callable[[bytes, bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    async def work(a: Gateway) -> None:
        await a.store.put({b"x": b"1"})
        (name,) = await a.client.keys("*")
        sealed = await a.client.get(name)
        await a.store.put({b"y": b"2"})
        (other,) = [await a.client.get(n) for n in await a.client.keys("*") if n != name]
        await a.client.set(name, forge(sealed, other))
        assert await a.store.get([b"x", b"x", b"y"]) == [None, None, b"2"]
        assert a.errors == ["forged", "forged"]
        assert len(caplog.records) == 1

    with_gateways(work, Gateway(server))


@needs_redis
def test_an_entry_of_another_type_is_none(server: RedisServer) -> None:
    async def work(a: Gateway) -> None:
        await a.store.put({b"x": b"1"})
        (name,) = await a.client.keys("*")
        await a.client.delete(name)
        await a.client.lpush(name, "1")
        assert await a.store.get([b"x"]) == [None]

    with_gateways(work, Gateway(server))


@needs_redis
def test_an_entry_ends_with_its_time_even_where_the_server_keeps_it(server: RedisServer) -> None:
    async def work(a: Gateway) -> None:
        await a.store.put({b"x": b"1"})
        (name,) = await a.client.keys("*")
        assert 0 < await a.client.ttl(name) <= 60
        await a.client.persist(name)
        a.clock.now += 59
        assert await a.store.get([b"x"]) == [b"1"]
        a.clock.now += 2
        assert await a.store.get([b"x"]) == [None]
        assert a.errors == []

    with_gateways(work, Gateway(server))


@needs_redis
def test_a_value_that_is_too_long_is_not_sent(server: RedisServer) -> None:
    async def work(a: Gateway) -> None:
        await a.store.put({b"x": b"1" * 101, b"y": b"2"})
        assert await a.store.get([b"x", b"y"]) == [None, b"2"]

    with_gateways(work, Gateway(server, max_bytes=100))


@needs_redis
def test_a_server_that_is_gone_knows_nothing_is_told_of_once_and_is_used_again(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)

    async def work(a: Gateway) -> None:
        await a.store.put({b"x": b"1"})
        server.stop()
        assert await a.store.get([b"x"]) == [None]
        await a.store.put({b"y": b"1"})
        assert await a.store.touch([b"x"]) == [False]
        assert a.errors == ["redis"]  # the others did not even try
        await asyncio.sleep(1.05)
        assert await a.store.get([b"x"]) == [None]
        assert a.errors == ["redis", "redis"]
        server.start()
        await asyncio.sleep(1.05)
        await a.store.put({b"x": b"2"})
        assert await a.store.get([b"x"]) == [b"2"]
        assert [record.getMessage().split(";")[0] for record in caplog.records] == [
            "the cache in Redis failed (ConnectionError)",
            "the cache in Redis is back",
        ]

    with_gateways(work, Gateway(server))


@needs_redis
def test_a_server_that_hangs_costs_its_deadline_once(server: RedisServer) -> None:
    async def work(a: Gateway) -> None:
        loop = asyncio.get_running_loop()
        await a.store.put({b"x": b"1"})
        server.pause()
        began = loop.time()
        assert await a.store.get([b"x"]) == [None]
        assert await a.store.get([b"x"]) == [None]
        assert loop.time() - began < 0.5
        server.resume()
        await asyncio.sleep(1.05)
        assert await a.store.get([b"x"]) == [b"1"]

    with_gateways(work, Gateway(server))


def test_a_key_that_anybody_could_guess_is_refused() -> None:
    with pytest.raises(ConfigError, match="16 bytes"):
        RedisStore(None, key=b"short", space="t", ttl=1, seconds=1, max_bytes=1)


@needs_redis
def test_a_url_that_is_none_of_redis_is_refused() -> None:
    with pytest.raises(ConfigError, match="none of Redis"):
        connect("http://127.0.0.1", seconds=1)
