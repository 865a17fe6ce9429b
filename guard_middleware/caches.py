"""What one process remembers, as its configuration says: verdicts, conversations to continue, canonical images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from guard_middleware.config import DEFAULT_GUARD, Config
from guard_middleware.errors import ConfigError
from guard_middleware.history import History, Scopes
from guard_middleware.imagecache import CanonicalImages
from guard_middleware.stores import MemoryStore, RedisStore, Store, connect
from guard_middleware.telemetry import Telemetry
from guard_middleware.turns import TurnBounds
from guard_middleware.types import GuardCall, Record
from guard_middleware.verdicts import CachedGuard
from guard_middleware.wire import Guard

#: one kept verdict, its marks included; a longer one is judged again
_VERDICT_BYTES = 256 * 1024
#: how much longer than a verdict a conversation with its images may take to be written or read
_HISTORY_PATIENCE = 10


class Caches:
    """Built once per process; raises ``ConfigError`` for what cannot work."""

    def __init__(
        self, config: Config, guards: Mapping[str, Guard], telemetry: Telemetry, environ: Mapping[str, str] = os.environ
    ) -> None:
        cache = config.cache
        secret = environ.get(config.audit.hmac_key_env, "").encode("utf-8", "surrogateescape")
        self._client: Any = None
        if cache.redis.url_env is not None:
            self._client = _connect(
                cache.redis.url_env, config.audit.hmac_key_env, secret, environ, cache.redis.deadline
            )

        def store(space: str, section: Any, seconds: float, max_bytes: int) -> Store | None:
            if section.entries == 0:
                return None
            if self._client is None:
                return MemoryStore(entries=section.entries, size=section.bytes, ttl=section.ttl)
            return RedisStore(
                self._client,
                key=secret,
                space=f"guard-middleware:{space}",
                ttl=section.ttl,
                seconds=seconds,
                max_bytes=max_bytes,
                on_error=telemetry.cache_error,
            )

        sources = [source for policy in config.policies.values() for source in (policy.input, policy.output)]
        confident = [source.ensemble.confident for source in sources if source.ensemble is not None]
        seconds = cache.redis.deadline
        verdicts = store("verdicts", cache.verdicts, seconds, _VERDICT_BYTES)
        #: each guard by its name, asked only what it has not judged yet
        self.guards: Mapping[str, CachedGuard] = {
            name: CachedGuard(
                guard,
                verdicts,
                name=name,
                bounds=TurnBounds(cache.turns.characters, cache.turns.images),
                clean_below=min([0.5, *(s.threshold for s in sources), *(pair[0] for pair in confident if pair)]),
                on_event=telemetry.cache_lookup,
            )
            for name, guard in guards.items()
        }
        self.history = History(
            store("history", cache.history, seconds * _HISTORY_PATIENCE, cache.history.conversation),
            max_bytes=cache.history.conversation,
        )
        self.scopes = Scopes(secret or None)
        self.images = CanonicalImages(cache.images)

    def settled(self, record: Record) -> None:
        """Takes note of a finished request, for each guard by what it said itself."""
        for name, guard in self.guards.items():
            guard.settled(replace(record, calls=tuple(_of(name, call) for call in record.calls)))

    async def aclose(self) -> None:
        for guard in self.guards.values():
            await guard.aclose()
        await self.history.aclose()
        if self._client is not None:
            await self._client.aclose()


def _of(name: str, call: GuardCall) -> GuardCall:
    """A call as the guard of that name answered it: where an ensemble judged, with its own verdict or none."""
    if not call.opinions:
        return call if name == DEFAULT_GUARD else replace(call, decision=replace(call.decision, verdict=None))
    own = next((opinion.verdict for opinion in call.opinions if opinion.guard == name), None)
    return replace(call, decision=replace(call.decision, verdict=own))


def _connect(url_env: str, key_env: str, secret: bytes, environ: Mapping[str, str], seconds: float) -> Any:
    if not environ.get(url_env):
        raise ConfigError(f"cache.redis.url_env: {url_env} is not set", remedy="set it to redis://host:6379/0")
    if len(secret) < 16:
        raise ConfigError(
            "cache.redis: entries are sealed with the operator's key, which is missing or shorter than 16 bytes",
            remedy=f"set {key_env} to the same value in every gateway (openssl rand -hex 32)",
        )
    return connect(environ[url_env], seconds=seconds)
