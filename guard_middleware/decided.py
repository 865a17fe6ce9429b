"""What was decided about one request, and which of it counts: it knows no phase, and holds no bytes.

Questions are answered in any order. For each choice one decision stands: a block, for good; else the one on the whole
answer, from when that is asked for; else that on the newest window.
"""

from __future__ import annotations

from collections.abc import Iterable

from guard_middleware import enforce
from guard_middleware.commands import Judged
from guard_middleware.dialects.base import Notice, Ruling
from guard_middleware.errors import GuardError
from guard_middleware.types import Action, Conversation, Decision, GuardCall


class Decided:
    """``id`` is the transaction's."""

    def __init__(self, id: str) -> None:
        self._id = id
        self._calls: tuple[GuardCall, ...] = ()
        self._last: dict[int, GuardCall] = {}
        self._whole: set[int] = set()
        self._unread: dict[int, Notice] = {}
        #: seconds after which the guard can be asked again, where it said so
        self.retry_after: float | None = None

    def add(self, result: Judged, decision: Decision) -> GuardCall:
        """Takes one answer down for the record, whether or not it counts."""
        asked, outcome = result.call, result.outcome
        call = GuardCall(asked.source, asked.choice, decision, result.seconds, outcome.opinions, outcome.revision)
        self._calls += (call,)
        if isinstance(outcome, GuardError) and outcome.retry_after:
            self.retry_after = max(self.retry_after or 0.0, outcome.retry_after)
        return call

    def expect_whole(self, choice: int) -> None:
        """The question about all that a choice said is asked: from here on only its answer, or a block, counts."""
        self._whole.add(choice)
        self._last.pop(choice, None)

    def keep(self, choice: int, call: GuardCall, *, whole: bool) -> bool:
        """Keeps the call if it counts for its choice. False where the choice was blocked before: then none does."""
        last = self._last.get(choice)
        if last is not None and last.decision.action is Action.BLOCK:
            return False
        if whole or call.decision.action is Action.BLOCK or choice not in self._whole:
            self._last[choice] = call
        return True

    def leave_unread(self, choices: Iterable[int]) -> None:
        """The operator left the output unguarded: these choices are released, and recorded as such."""
        self._unread = {c: enforce.not_moderated(f"{self._id}.output.{c}", "output") for c in choices}

    @property
    def calls(self) -> tuple[GuardCall, ...]:
        """In the order in which they were answered."""
        return self._calls

    @property
    def by_choice(self) -> tuple[GuardCall, ...]:
        """The input first and the choices in their order."""
        return tuple(sorted(self._calls, key=lambda call: -1 if call.choice is None else call.choice))

    @property
    def action(self) -> Action:
        """What one word says of the whole request."""
        return enforce.worst(call.decision.action for call in self._calls)

    @property
    def any_choice_blocked(self) -> bool:
        return any(call.decision.action is Action.BLOCK for call in self._last.values())

    def notices(self, conversation: Conversation) -> dict[int, Notice]:
        """What is to be said of each choice, by the decision that stands."""
        read = {choice: enforce.notice(call.decision, conversation) for choice, call in self._last.items()}
        return self._unread | read

    def ruling(self, conversation: Conversation, *, soft: bool) -> Ruling:
        asked = next((call for call in self._calls if call.source == "input"), None)
        request = None if asked is None else enforce.notice(asked.decision, conversation)
        return Ruling(request, self.notices(conversation), soft)
