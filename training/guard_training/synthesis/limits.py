"""How often a teacher may be asked: requests and tokens in any minute, and never while it has asked us to wait."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

WINDOW = 60.0


@dataclass(slots=True)
class Taken:
    """One request: when it was sent, and its tokens (estimated; set the real ones when they are known)."""

    at: float
    tokens: int


class Limiter:
    """At most ``requests`` and ``tokens`` in any 60 seconds; None is no limit. First come, first served.

    A single request of more tokens than a minute allows goes alone.
    """

    def __init__(
        self,
        requests: int | None = None,
        tokens: int | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if (requests is not None and requests < 1) or (tokens is not None and tokens < 1):
            raise ValueError("a limit per minute is 1 or more")
        self._requests, self._tokens, self._clock, self._sleep = requests, tokens, clock, sleep
        self._taken: deque[Taken] = deque()
        self._not_before = 0.0
        self._turn = asyncio.Lock()

    async def take(self, tokens: int) -> Taken:
        """Waits until a request of so many tokens may go."""
        async with self._turn:
            while (wait := self._wait(tokens)) > 0:
                await self._sleep(wait)
            taken = Taken(self._clock(), tokens)
            self._taken.append(taken)
            return taken

    def pause(self, seconds: float) -> None:
        """Nothing goes for so long: the teacher has said ``Retry-After``."""
        self._not_before = max(self._not_before, self._clock() + seconds)

    def _wait(self, tokens: int) -> float:
        now = self._clock()
        while self._taken and self._taken[0].at <= now - WINDOW:
            self._taken.popleft()
        due = self._not_before
        if self._requests is not None and len(self._taken) >= self._requests:
            due = max(due, self._taken[-self._requests].at + WINDOW)
        if self._tokens is not None:
            over = sum(taken.tokens for taken in self._taken) + tokens - self._tokens
            for taken in self._taken:
                if over <= 0:
                    break
                over -= taken.tokens
                due = max(due, taken.at + WINDOW)
        return due - now
