"""The switch: who gets a question, when the seat before is asked too, and what the shadow may cost."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, cast

import pytest

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.types import Conversation, Judging, Label, Message, Text, Verdict
from guard_middleware.weights.golden import Asking
from guard_middleware.weights.seats import Compared, Seat, Switch
from guard_middleware.wire import ModerationRequest
from tests.support.scripted_worker import ScriptedGuard


class FakeSeat:
    def __init__(self, revision: str, error: str | None = None, seconds: float = 0.0, score: float = 0.1) -> None:
        self.revision, self.error, self.seconds, self.score = revision, error, seconds, score
        self.asked: list[ModerationRequest] = []

    async def moderate(self, request: ModerationRequest) -> Verdict | GuardError:
        self.asked.append(request)
        await asyncio.sleep(self.seconds)
        if self.error:
            return GuardError(self.error)
        said = await ScriptedGuard().moderate(request, 1.0)
        label: Label = "harmful" if self.score >= 0.5 else "unharmful"
        return replace(said, revision=self.revision, request=label, request_score=self.score)


def question(deadline: float = 5.0) -> ModerationRequest:
    return ModerationRequest("q", Conversation((Message("user", (Text("hello"),)),)), "input", deadline)


def switch(active: FakeSeat | None, warm: FakeSeat | None = None, share: float = 0.0) -> tuple[Switch, list[Compared]]:
    compared: list[Compared] = []
    made = Switch(share, compared.append)
    made.active, made.warm = cast(Seat, active), cast(Seat, warm)
    return made, compared


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 30))


@pytest.mark.parametrize(
    ("active", "warm", "outcome"),
    [
        (FakeSeat("new"), FakeSeat("old"), "new"),
        (FakeSeat("new", "unavailable"), FakeSeat("old"), "old"),
        (FakeSeat("new", "unavailable"), None, "unavailable"),
        (FakeSeat("new", "unavailable"), FakeSeat("old", "timeout"), "timeout"),
        (FakeSeat("new", "timeout"), FakeSeat("old"), "timeout"),
        (FakeSeat("new", "truncated"), FakeSeat("old"), "truncated"),
        (None, None, "unavailable"),
    ],
)
def test_the_seat_before_is_asked_only_where_the_worker_is_gone(
    active: FakeSeat | None, warm: FakeSeat | None, outcome: str
) -> None:
    async def main() -> None:
        found = await switch(active, warm)[0].moderate(question())
        assert (found.revision if isinstance(found, Verdict) else found.kind.value) == outcome

    run(main())


def test_a_question_whose_worker_goes_in_a_promotion_is_put_to_the_new_one_in_the_time_that_is_left() -> None:
    async def main() -> None:
        old, new = FakeSeat("old", "unavailable", 0.3), FakeSeat("new")
        made, _ = switch(old)
        asked = asyncio.create_task(made.moderate(question(1.0)))
        await asyncio.sleep(0.05)
        made.hand_over(cast(Seat, new))
        made.warm = None
        found = await asked
        assert isinstance(found, Verdict)
        assert found.revision == "new"
        assert new.asked[0].deadline < 0.75

    run(main())


def test_without_time_left_nobody_else_is_asked() -> None:
    async def main() -> None:
        warm = FakeSeat("old")
        found = await switch(FakeSeat("new", "unavailable", 0.1), warm)[0].moderate(question(0.05))
        assert isinstance(found, GuardError)
        assert found.kind is GuardErrorKind.UNAVAILABLE
        assert warm.asked == []

    run(main())


def test_a_promotion_ends_the_copies_and_keeps_the_old_seat_warm() -> None:
    async def main() -> None:
        old, new = FakeSeat("old"), FakeSeat("new", seconds=5.0)
        made, compared = switch(old, share=1.0)
        made.try_out(cast(Seat, new))
        await made.moderate(question())
        await asyncio.sleep(0)
        made.hand_over(cast(Seat, new))
        await made.aclose()
        assert (made.active, made.warm) == (new, old)
        assert compared == []

    run(main())


def test_copies_go_one_at_a_time_and_the_rest_is_left_out() -> None:
    async def main() -> None:
        staged = FakeSeat("new", seconds=0.1)
        made, compared = switch(FakeSeat("old"), share=1.0)
        made.try_out(cast(Seat, staged))
        for _ in range(20):
            await made.moderate(question())
        assert len(staged.asked) <= 1
        await asyncio.sleep(0.3)
        assert [one.result for one in compared] == ["agreed"]

    run(main())


@pytest.mark.parametrize(
    ("active", "staged", "thresholds", "result"),
    [
        (0.4, 0.6, (), "stricter"),
        (0.6, 0.4, (), "looser"),
        (0.6, 0.9, (), "agreed"),
        (0.2, 0.4, (0.3,), "stricter"),
        (0.4, 0.6, (0.3,), "agreed"),
        (0.95, 0.6, (0.9,), "looser"),
        (0.4, 0.6, (0.9,), "agreed"),
        (0.4, 0.8, (0.3, 0.7), "stricter"),
    ],
)
def test_two_weights_agree_where_every_policy_would_act_alike_on_both(
    active: float, staged: float, thresholds: tuple[float, ...], result: str
) -> None:
    async def main() -> None:
        made, compared = switch(FakeSeat("old", score=active), share=1.0)
        made.askings = [Asking("input", threshold=one) for one in thresholds]
        made.askings += [Asking("output", threshold=0.01), Asking("input", Judging("label"), 0.01)]
        made.try_out(cast(Seat, FakeSeat("new", score=staged)))
        await made.moderate(question())
        while not compared:
            await asyncio.sleep(0.01)
        assert [one.result for one in compared] == [result]

    run(main())


def test_the_share_is_about_what_was_asked_for() -> None:
    async def main() -> None:
        staged = FakeSeat("new")
        made, _ = switch(FakeSeat("old"), share=0.25)
        made.try_out(cast(Seat, staged))
        for _ in range(2000):
            await made.moderate(question())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert 400 <= len(staged.asked) <= 600  # 5 standard deviations

    run(main())


def test_errors_are_not_copied_and_a_share_of_0_copies_nothing() -> None:
    async def main() -> None:
        for active, share in ((FakeSeat("old", "timeout"), 1.0), (FakeSeat("old"), 0.0)):
            staged = FakeSeat("new")
            made, _ = switch(active, share=share)
            made.try_out(cast(Seat, staged))
            for _ in range(50):
                await made.moderate(question())
                await asyncio.sleep(0)
            assert staged.asked == []

    run(main())
