"""Which of many decisions counts, in whatever order they come."""

from __future__ import annotations

from itertools import permutations

import pytest

from guard_middleware.commands import Call, Judged
from guard_middleware.config import SourcePolicy
from guard_middleware.decided import Decided
from guard_middleware.errors import GuardError
from guard_middleware.types import Action, Basis, Conversation, Decision, GuardCall, Source

NOBODY = Conversation(())


def add(
    decided: Decided, choice: int | None, action: Action, id: str = "", *, retry_after: float | None = None
) -> GuardCall:
    """An answer of the guard about a choice, or about the input (None)."""
    source: Source = "input" if choice is None else "output"
    call = Call(id, source, choice, NOBODY, SourcePolicy())
    outcome = GuardError("overloaded", retry_after=retry_after)
    decision = Decision(id, source, action, Basis.VERDICT, "p", "0", action)
    return decided.add(Judged(call, outcome, 0.1), decision)


def stands(decided: Decided, choice: int = 0) -> str:
    return decided.notices(NOBODY)[choice].id


def test_the_newest_window_stands_until_the_whole_is_asked_for() -> None:
    decided = Decided("gd_1")
    for name in ("w1", "w2"):
        assert decided.keep(0, add(decided, 0, Action.ALLOW, name), whole=False)
    assert stands(decided) == "w2"
    decided.expect_whole(0)
    assert decided.notices(NOBODY) == {}
    decided.keep(0, add(decided, 0, Action.ALLOW, "w3"), whole=False)
    assert decided.notices(NOBODY) == {}
    decided.keep(0, add(decided, 0, Action.ANNOTATE, "whole"), whole=True)
    decided.keep(0, add(decided, 0, Action.ALLOW, "w4"), whole=False)
    assert stands(decided) == "whole"


@pytest.mark.parametrize("order", list(permutations(("window", "whole", "block"))))
@pytest.mark.parametrize("block_on_whole", [True, False])
def test_a_block_is_for_good_whenever_it_comes(order: tuple[str, ...], block_on_whole: bool) -> None:
    decided = Decided("gd_1")
    decided.expect_whole(0)
    kept = {}
    for name in order:
        call = add(decided, 0, Action.BLOCK if name == "block" else Action.ALLOW, name)
        kept[name] = decided.keep(0, call, whole=name == "whole" or (name == "block" and block_on_whole))
    assert stands(decided) == "block"
    assert kept == {name: order.index(name) <= order.index("block") for name in order}
    assert decided.any_choice_blocked


def test_what_is_kept_of_one_choice_changes_no_other() -> None:
    decided = Decided("gd_1")
    decided.keep(1, add(decided, 1, Action.BLOCK, "one"), whole=True)
    assert decided.keep(0, add(decided, 0, Action.ALLOW, "zero"), whole=True)
    assert (stands(decided, 0), stands(decided, 1)) == ("zero", "one")


def test_a_blocked_input_is_no_blocked_choice() -> None:
    decided = Decided("gd_1")
    add(decided, None, Action.BLOCK)
    assert not decided.any_choice_blocked


def test_every_answer_is_taken_down_and_the_record_has_the_input_first() -> None:
    decided = Decided("gd_1")
    for choice in (2, None, 0, 1, 0):
        add(decided, choice, Action.ALLOW)
    assert [call.choice for call in decided.calls] == [2, None, 0, 1, 0]
    assert [call.choice for call in decided.by_choice] == [None, 0, 0, 1, 2]


def test_one_word_says_the_worst_of_all_that_was_decided() -> None:
    decided = Decided("gd_1")
    assert decided.action is Action.ALLOW
    for action in (Action.ANNOTATE, Action.BLOCK, Action.ALLOW):
        add(decided, 0, action)
    assert decided.action is Action.BLOCK


def test_the_guard_is_left_alone_for_the_longest_that_it_asked_for() -> None:
    decided = Decided("gd_1")
    for seconds, longest in ((None, None), (3.0, 3.0), (1.0, 3.0), (0.0, 3.0), (7.0, 7.0)):
        add(decided, 0, Action.BLOCK, retry_after=seconds)
        assert decided.retry_after == longest


def test_the_ruling_names_the_inputs_decision_and_each_choices() -> None:
    decided = Decided("gd_1")
    assert decided.ruling(NOBODY, soft=True).request is None
    add(decided, None, Action.ANNOTATE, "input")
    decided.keep(0, add(decided, 0, Action.BLOCK, "zero"), whole=True)
    ruling = decided.ruling(NOBODY, soft=False)
    assert ruling.request is not None
    assert (ruling.request.id, ruling.choices[0].id, ruling.soft) == ("input", "zero", False)


def test_a_choice_that_nobody_was_to_judge_is_said_to_be_unread() -> None:
    decided = Decided("gd_1")
    decided.leave_unread([1])
    notice = decided.notices(NOBODY)[1]
    assert (notice.id, notice.action, notice.basis) == ("gd_1.output.1", Action.ALLOW, Basis.COVERAGE)
    assert not decided.any_choice_blocked
