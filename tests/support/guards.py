"""Guards for tests that are not about the guard: the scripted worker's rule in this process, and one that breaks."""

from __future__ import annotations

import asyncio

from guard_middleware.errors import GuardError
from guard_middleware.types import Verdict
from guard_middleware.wire import ModerationRequest
from tests.support.scripted_worker import ScriptedGuard


class RuleGuard:
    """Harmful is what contains ``pick a lock``; keeps every question."""

    def __init__(self) -> None:
        self.asked: list[ModerationRequest] = []
        self.cancelled = 0
        self._rule = ScriptedGuard()

    async def moderate(self, request: ModerationRequest) -> Verdict | GuardError:
        self.asked.append(request)
        try:
            async with asyncio.timeout(request.deadline):
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
