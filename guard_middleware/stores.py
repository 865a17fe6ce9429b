"""Where verdicts and histories are kept: in this process, or in a Redis (or Valkey) that several gateways share.

A store may forget at any time and never raises: whoever asks it can do without. Keys are digests made by the caller.

``RedisStore`` does not trust its server. An entry is ``HMAC-SHA-256(operator's key, name, expiry, value)``, expiry,
value; one that somebody without the key wrote, moved to another name, or kept beyond its time is no entry. Names are
keyed digests too. Entries are authenticated, not encrypted: whoever may read the server reads what they hold.

Refuses: entries that do not verify or are over time; values beyond ``max_bytes``.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from guard_middleware.errors import ConfigError

logger = logging.getLogger(__name__)

_MAC = 32
_EXPIRY = struct.Struct(">Q")
#: seconds for which a server that failed is not asked again
_PAUSE = 1.0
#: what an entry costs in memory beside its key and value
_OVERHEAD = 200


class Store(Protocol):
    """Keys and values are bytes; every entry ends by itself after the store's ``ttl``."""

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The value of each key, None where there is none to be had."""

    async def put(self, entries: Mapping[bytes, bytes]) -> None:
        """Keeps these, if it can."""

    async def touch(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each key needs no writing again: it is there, for half a ``ttl`` or more from now."""

    async def aclose(self) -> None: ...


class MemoryStore:
    """Least recently used out first. ``entries`` and ``size`` (bytes) bound it, ``ttl`` is in seconds."""

    def __init__(self, *, entries: int, size: int, ttl: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._entries, self._size, self._ttl, self._clock = entries, size, ttl, clock
        self._kept: OrderedDict[bytes, tuple[float, bytes]] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self._get(key) for key in keys]

    async def put(self, entries: Mapping[bytes, bytes]) -> None:
        until = self._clock() + self._ttl
        for key, value in entries.items():
            self._drop(key)
            self._kept[key] = (until, value)
            self.bytes += len(key) + len(value) + _OVERHEAD
        while self._kept and (len(self._kept) > self._entries or self.bytes > self._size):
            self._drop(next(iter(self._kept)))

    async def touch(self, keys: Sequence[bytes]) -> list[bool]:
        present = []
        for key in keys:
            value = self._get(key)
            present.append(value is not None)
            if value is not None:
                self._kept[key] = (self._clock() + self._ttl, value)
        return present

    async def aclose(self) -> None:
        self._kept.clear()
        self.bytes = 0

    def _get(self, key: bytes) -> bytes | None:
        until, value = self._kept.get(key, (0.0, None))
        if value is None:
            return None
        if until <= self._clock():
            self._drop(key)
            return None
        self._kept.move_to_end(key)
        return value

    def _drop(self, key: bytes) -> None:
        _, value = self._kept.pop(key, (0.0, None))
        if value is not None:
            self.bytes -= len(key) + len(value) + _OVERHEAD


def connect(url: str, *, seconds: float) -> Any:
    """A ``redis.asyncio`` client that tries once and not for longer than ``seconds``; raises ``ConfigError``."""
    try:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError:
        raise ConfigError(
            "a cache in Redis needs the redis package", remedy="pip install 'guard-middleware[redis]'"
        ) from None
    try:
        return Redis.from_url(
            url,
            socket_timeout=seconds,
            socket_connect_timeout=seconds,
            retry=Retry(NoBackoff(), 0),
            health_check_interval=0,
        )
    except ValueError:
        raise ConfigError(
            "the URL of the cache is none of Redis", remedy="write redis://, rediss:// or unix:// and the address"
        ) from None


class RedisStore:
    """Entries in a server that others share. ``client`` is what ``connect`` makes; the caller closes it.

    ``key`` is the operator's secret (16 bytes or more), ``space`` keeps two stores in one server apart, ``ttl`` and
    ``seconds`` (the longest that one operation may take) are seconds. ``on_error`` is told ``redis`` when the server
    failed and ``forged`` for an entry that does not verify.
    """

    def __init__(
        self,
        client: Any,
        *,
        key: bytes,
        space: str,
        ttl: float,
        seconds: float,
        max_bytes: int,
        on_error: Callable[[str], None] = lambda kind: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if len(key) < 16:
            raise ConfigError(
                "a cache in Redis needs a key of 16 bytes or more", remedy="make one with: openssl rand -hex 32"
            )
        self._client, self._space, self._ttl, self._seconds = client, space, ttl, seconds
        self._key = hmac.digest(key, b"guard-middleware cache", hashlib.sha256)
        self._max, self._on_error, self._clock = max_bytes, on_error, clock
        self._failing = self._forged = False
        self._again_at = 0.0

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        names = [self._name(key) for key in keys]
        raw = await self._ask(lambda: self._client.mget(names)) if names else []
        if not isinstance(raw, list) or len(raw) != len(names):
            return [None] * len(names)
        return [self._opened(name, data) for name, data in zip(names, raw, strict=True)]

    async def put(self, entries: Mapping[bytes, bytes]) -> None:
        until = int(self._clock() + self._ttl)
        sealed = [
            (name := self._name(key), self._sealed(name, until, value))
            for key, value in entries.items()
            if len(value) <= self._max
        ]
        if not sealed:
            return

        async def write() -> None:
            pipe = self._client.pipeline(transaction=False)
            for name, data in sealed:
                pipe.set(name, data, ex=max(1, int(self._ttl)))
            await pipe.execute()

        await self._ask(write)

    async def touch(self, keys: Sequence[bytes]) -> list[bool]:
        # The expiry inside an entry is sealed, so it cannot be put off: what is old is to be written again.
        if not keys:
            return []
        names = [self._name(key) for key in keys]

        async def ages() -> Any:
            pipe = self._client.pipeline(transaction=False)
            for name in names:
                pipe.ttl(name)
            return await pipe.execute()

        found = await self._ask(ages)
        if not isinstance(found, list) or len(found) != len(names):
            return [False] * len(names)
        return [isinstance(left, int) and left > self._ttl / 2 for left in found]

    async def aclose(self) -> None:
        """Leaves the client, which is shared, open."""

    async def _ask(self, work: Callable[[], Any]) -> Any:
        """What the server says; None where it failed, and at once for a moment after it did."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._again_at:
            return None
        try:
            async with asyncio.timeout(self._seconds):
                answer = await work()
        except Exception as error:  # whatever a store does, its callers can do without
            self._again_at = loop.time() + _PAUSE
            self._on_error("redis")
            if not self._failing:
                logger.warning(
                    "the cache in Redis failed (%s); everything is judged anew until it is back", type(error).__name__
                )
            self._failing = True
            return None
        if self._failing:
            logger.warning("the cache in Redis is back")
        self._failing = False
        return answer

    def _name(self, key: bytes) -> str:
        return f"{self._space}:{hmac.digest(self._key, b'name' + key, hashlib.sha256).hex()}"

    def _mac(self, name: str, rest: bytes) -> bytes:
        return hmac.digest(self._key, b"entry" + name.encode("ascii") + b"\0" + rest, hashlib.sha256)

    def _sealed(self, name: str, until: int, value: bytes) -> bytes:
        rest = _EXPIRY.pack(until) + value
        return self._mac(name, rest) + rest

    def _opened(self, name: str, data: Any) -> bytes | None:
        if data is None:
            return None
        if not isinstance(data, bytes) or not hmac.compare_digest(data[:_MAC], self._mac(name, data[_MAC:])):
            self._on_error("forged")
            if not self._forged:
                logger.error(
                    "the cache in Redis holds an entry that was not written with this key; such entries are ignored"
                )
            self._forged = True
            return None
        if len(data) < _MAC + _EXPIRY.size or _EXPIRY.unpack_from(data, _MAC)[0] < self._clock():
            return None
        return data[_MAC + _EXPIRY.size :]
