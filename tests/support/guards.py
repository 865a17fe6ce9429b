"""Guards for tests that are not about the guard: the scripted worker's rule in this process, and one that breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from guard_middleware.errors import GuardError
from guard_middleware.types import Source, Verdict
from guard_middleware.wire import ModerationRequest
from tests.support.scripted_worker import ScriptedGuard


class RuleGuard:
    """Harmful is what contains ``pick a lock``; keeps every question. ``seconds`` is what a verdict takes."""

    def __init__(self, seconds: Mapping[Source, float] | None = None) -> None:
        self.asked: list[ModerationRequest] = []
        self.cancelled = 0
        self._seconds = seconds or {}
        self._rule = ScriptedGuard()

    def of(self, source: Source) -> list[ModerationRequest]:
        return [request for request in self.asked if request.source == source]

    async def moderate(self, request: ModerationRequest) -> Verdict | GuardError:
        self.asked.append(request)
        try:
            async with asyncio.timeout(request.deadline):
                if seconds := self._seconds.get(request.source):
                    await asyncio.sleep(seconds)
                return await self._rule.moderate(request, request.deadline)
        except TimeoutError:
            return GuardError("timeout")
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


class BrokenGuard:
    """Gives no verdict: ``error`` from the ``after``-th question on."""

    def __init__(self, error: GuardError, after: int = 0) -> None:
        self._error, self._left, self._rule = error, after, RuleGuard()

    async def moderate(self, request: ModerationRequest) -> Verdict | GuardError:
        self._left -= 1
        return self._error if self._left < 0 else await self._rule.moderate(request)
