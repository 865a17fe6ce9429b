"""What is remembered between requests: verdicts, conversations and images, in memory or in Redis.

Refuses sizes and ages out of range, and Redis's address in the file: it may hold a password.
"""

from __future__ import annotations

from pydantic import Field

from guard_middleware.config.section import Section
from guard_middleware.configtypes import Age, Bytes, Env, Seconds


class VerdictCache(Section):
    """With ``entries: 0`` nothing is kept: each question is put to the guard, about the whole conversation."""

    entries: int = Field(default=20_000, ge=0, le=10**8, description="a whole number; 0 keeps no verdicts")
    bytes: Bytes = Field(default=64 * 2**20, description="a size of more than 0 and at most 2GiB, such as 64MiB")
    ttl: Age = Field(default=3600.0, description="an age of at most 30d, such as 1h")


class TurnsCache(Section):
    characters: int = Field(
        default=1500,
        ge=0,
        le=10**9,
        description="how much of earlier turns is read again at least; beyond it, judged answers are left out",
    )
    images: int = Field(
        default=2, ge=0, le=1000, description="how many images are shown; earlier ones stand as the text drawn in them"
    )


class HistoryCache(Section):
    """With ``entries: 0`` nothing is kept, and a request that continues an earlier answer is refused."""

    entries: int = Field(default=10_000, ge=0, le=10**8, description="a whole number; 0 keeps no conversations")
    bytes: Bytes = Field(default=256 * 2**20, description="a size of more than 0 and at most 2GiB, such as 256MiB")
    ttl: Age = Field(default=86_400.0, description="an age of at most 30d, such as 24h")
    conversation: Bytes = Field(
        default=32 * 2**20, description="a size, such as 32MiB: the longest conversation that is kept, images included"
    )


class RedisCache(Section):
    url_env: Env | None = Field(
        default=None,
        description="NAME of the environment variable that holds redis://host:6379/0; left out, memory is used",
    )
    deadline: Seconds = Field(default=0.05, description="a duration, such as 50ms: then everything is judged anew")


class Cache(Section):
    """What is remembered between requests, in memory or, for several gateways, in one Redis or Valkey."""

    verdicts: VerdictCache = Field(default=VerdictCache(), description="a mapping, such as {entries: 20000, ttl: 1h}")
    turns: TurnsCache = Field(default=TurnsCache(), description="a mapping, such as {characters: 1500, images: 2}")
    history: HistoryCache = Field(default=HistoryCache(), description="a mapping, such as {entries: 10000, ttl: 24h}")
    images: Bytes = Field(default=64 * 2**20, description="a size, such as 64MiB, of decoded images that are kept")
    redis: RedisCache = Field(default=RedisCache(), description="a mapping, such as {url_env: GUARD_REDIS_URL}")
