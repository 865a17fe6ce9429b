"""Who answers while weights change: one seat per worker process, and the switch that gives each question to one.

A question stays with the seat that it was given to. A seat that is left answers what it has, then ends. Where the
active worker is gone and the one before it is still loaded, that one is asked in the time that is left.

The staged seat gets copies of some live questions, after the verdict on them. The copies hold nothing up: one is
under way at a time, and what comes meanwhile is left out of the sample.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.guard.client import GuardClient
from guard_middleware.guard.supervisor import WorkerEvent, WorkerProcess
from guard_middleware.types import Source, Verdict
from guard_middleware.weights.golden import Asking
from guard_middleware.weights.state import Revision, Shadow
from guard_middleware.wire import ModerationRequest

logger = logging.getLogger(__name__)

Agreement = Literal["agreed", "stricter", "looser", "failed"]


class Seat:
    """One worker process with its weights. ``on_exit`` is told whenever the process has ended by itself; it is started
    again where ``check`` has nothing against its files."""

    def __init__(
        self,
        revision: Revision,
        argv: Sequence[str],
        socket: Path,
        on_exit: Callable[[Seat, int | None], None],
        check: Callable[[Revision], Awaitable[str | None]],
    ) -> None:
        self.revision = revision
        self._on_exit = on_exit
        self._client = GuardClient(socket)
        self._process = WorkerProcess(argv, socket, on_event=self._told, check=lambda: check(self.revision))
        self._said: str | None = None
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._ended = False

    @property
    def pid(self) -> int | None:
        return self._process.pid

    async def start(self) -> None:
        """Raises ``OSError`` for a command that cannot be run."""
        await self._process.start()

    async def wait_ready(self, seconds: float) -> None:
        """Raises ``GuardError`` with the worker's last words."""
        await self._process.wait_ready(seconds)

    async def identity(self) -> tuple[str, str] | None:
        """Model and revision, as the worker says them; None where it cannot moderate now."""
        found = await self._client.identity()
        self._said = found and found[1]
        return found

    async def moderate(self, request: ModerationRequest) -> Verdict | GuardError:
        self._open += 1
        self._idle.clear()
        try:
            outcome = await self._client.moderate(request)
            if isinstance(outcome, GuardError):
                outcome.revision = self._said or self.revision.name
            return outcome
        finally:
            self._open -= 1
            if not self._open:
                self._idle.set()

    async def idle(self) -> None:
        """Returns when it has no question any more; each has its deadline."""
        await self._idle.wait()

    async def stop(self) -> None:
        """Ends it now."""
        self._ended = True
        await self._client.aclose()
        await self._process.stop()

    def _told(self, event: WorkerEvent) -> None:
        if event.kind == "log":
            logger.info("worker %d (%s): %s", event.pid, self.revision.name, event.line)
        elif event.kind == "exited" and not self._ended:
            logger.error("worker %d (%s) exited with %s", event.pid, self.revision.name, event.returncode)
            self._said = None
            self._on_exit(self, event.returncode)
        else:
            logger.info("worker %d (%s) %s", event.pid, self.revision.name, event.kind)


@dataclass(frozen=True, slots=True)
class Compared:
    """One live question that both answered, or at which the staged worker failed."""

    id: str
    source: Source
    result: Agreement
    active: Verdict
    staged: Verdict | GuardError

    def told(self) -> dict[str, Any]:
        """Without content: ``id`` is that of the question, whose decision the log has under the same."""
        return {
            "id": self.id,
            "source": self.source,
            "result": self.result,
            "active": _labels(self.active),
            "staged": _labels(self.staged),
        }


def _labels(verdict: Verdict | GuardError) -> dict[str, Any]:
    if isinstance(verdict, GuardError):
        return {"revision": verdict.revision, "error": verdict.kind.value}
    return {
        "revision": verdict.revision,
        "request": verdict.request,
        "request_score": verdict.request_score,
        "response": verdict.response,
        "response_score": verdict.response_score,
    }


class Switch:
    """The guard of a gateway whose weights can change. Use from one event loop."""

    def __init__(self, share: float, on_compared: Callable[[Compared], None]) -> None:
        self._share, self._on_compared = share, on_compared
        #: how policies ask, and what is harmful to each
        self.askings: Sequence[Asking] = ()
        self.active: Seat | None = None
        #: the seat before the active one, while it is still loaded and may answer in its place
        self.warm: Seat | None = None
        self.shadow = Shadow()
        self._staged: Seat | None = None
        self._copy: asyncio.Task[None] | None = None

    async def moderate(self, request: ModerationRequest) -> Verdict | GuardError:
        """See ``wire.Guard``."""
        loop = asyncio.get_running_loop()
        end, seat = loop.time() + request.deadline, self.active
        if seat is None:
            return GuardError(GuardErrorKind.UNAVAILABLE, "the guard worker is not started", retry_after=1.0)
        outcome = await seat.moderate(request)
        if isinstance(outcome, Verdict):
            self._sample(request, outcome)
            return outcome
        other = self.warm if seat is self.active else self.active
        left = end - loop.time()
        if outcome.kind is GuardErrorKind.UNAVAILABLE and other is not None and left > 0:
            return await other.moderate(replace(request, deadline=left))
        return outcome

    def hand_over(self, seat: Seat) -> None:
        """New questions go to ``seat`` from now on, and the active one stays warm."""
        self.active, self.warm = seat, self.active
        self.try_out(None)

    def try_out(self, seat: Seat | None) -> None:
        """``seat`` gets the copies; None ends them."""
        self._staged, self.shadow = seat, Shadow()
        if self._copy is not None:
            self._copy.cancel()

    async def aclose(self) -> None:
        self.try_out(None)
        if self._copy is not None:
            await asyncio.gather(self._copy, return_exceptions=True)

    def _sample(self, request: ModerationRequest, verdict: Verdict) -> None:
        busy = self._copy is not None and not self._copy.done()
        if self._staged is None or busy or secrets.randbelow(1_000_000) >= self._share * 1_000_000:
            return
        self._copy = asyncio.create_task(self._compare(self._staged, request, verdict), name="guard-shadow")

    async def _compare(self, seat: Seat, request: ModerationRequest, active: Verdict) -> None:
        staged = await seat.moderate(request)
        result: Agreement = "failed"
        if isinstance(staged, Verdict):
            result = _agreement(self.askings, request, active, staged)
        found = Compared(request.id, request.source, result, active, staged)
        self.shadow = replace(self.shadow, **{found.result: getattr(self.shadow, found.result) + 1})
        self._on_compared(found)


def _agreement(askings: Sequence[Asking], request: ModerationRequest, active: Verdict, staged: Verdict) -> Agreement:
    """Whether every policy that asks so would hold both to be harmful, or neither."""
    asked = (request.source, request.judging, request.reader)
    same = [one for one in askings if (one.source, one.judging, one.reader) == asked] or [Asking(*asked[:2])]
    before, after = (sum(bool(one.harmful(verdict, request.source)) for one in same) for verdict in (active, staged))
    if before == after:
        return "agreed"
    return "stricter" if after > before else "looser"
