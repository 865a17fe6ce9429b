"""The state of the weights: what each change does, and what no sequence of changes and crashes can do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard_middleware.weights import state
from guard_middleware.weights.state import Golden, Refused, Revision, Shadow, State

AT, BY = "2026-11-21T10:00:00.000+00:00", "ada@host"
OLD = Revision("old", "/w/old", "a", "r-old")
NEW = Revision("new", "/w/new", "b")
START = State(OLD)
KEPT, BROKEN = Golden(3), Golden(3, ("bread",))

stage = partial(state.stage, revision=NEW, by=BY, at=AT)
promote = partial(state.promote, by=BY, at=AT)
force = partial(state.promote, by=BY, at=AT, force=True)
roll_back = partial(state.roll_back, by=BY, at=AT)
unstage = partial(state.unstage, by=BY, at=AT)
unstage_alone = partial(unstage, followed=False)
stage_old = partial(state.stage, revision=OLD, by=BY, at=AT)
promoted = partial(state.promoted, at=AT)
recovered = partial(state.recovered, at=AT)
reverted = partial(state.reverted, why="exited", at=AT)


def loading(s: State) -> State:
    return state.loading(s, _id(s))


def ready(s: State, golden: Golden | None = KEPT) -> State:
    return state.ready(s, _id(s), f"r-{s.staged.revision.name if s.staged else ''}", golden, at=AT)


def failed(s: State) -> State:
    return state.failed(s, _id(s), "no memory", at=AT)


def declined(s: State) -> State:
    return state.declined(s, "no worker", at=AT)


def _id(s: State) -> int:
    return s.staged.id if s.staged else -1


broken = partial(ready, golden=BROKEN)
Change = Callable[[State], State]


def after(*changes: Change) -> State:
    found = START
    for change in changes:
        found = change(found)
    return found


SERVES_NEW = (stage, ready, promote, promoted)


@pytest.mark.parametrize(
    ("changes", "active", "previous", "staged", "order", "last"),
    [
        ((stage,), "old", None, "new", None, "staged"),
        ((stage, stage), "old", None, "new", None, "staged"),
        ((stage, unstage), "old", None, None, None, "unstaged"),
        ((stage, ready, promote, unstage_alone), "old", None, None, None, "unstaged"),
        ((*SERVES_NEW, roll_back, unstage_alone), "new", "old", None, None, "unstaged"),
        ((*SERVES_NEW, stage_old), "new", "old", "new", None, "staged"),
        ((stage, loading), "old", None, "loading", None, "staged"),
        ((stage, loading, ready), "old", None, "ready", None, "ready"),
        ((stage, loading, failed), "old", None, "failed", None, "failed"),
        ((stage, ready, promote), "old", None, "ready", "promote", "promotion ordered"),
        (SERVES_NEW, "new", "old", None, None, "promoted"),
        ((stage, broken, force, promoted), "new", "old", None, None, "promoted"),
        ((stage, ready, promote, declined), "old", None, "ready", None, "refused"),
        ((stage, ready, promote, failed), "old", None, "failed", None, "failed"),
        ((*SERVES_NEW, reverted), "old", None, None, None, "reverted"),
        ((*SERVES_NEW, roll_back), "new", "old", "new", "roll back", "rollback ordered"),
        ((*SERVES_NEW, roll_back, partial(ready, golden=None), promoted), "old", "new", None, None, "rolled back"),
        ((stage, recovered), "old", None, "new", None, "staged"),
        ((stage, loading, recovered), "old", None, "new", None, "staged"),
        ((stage, ready, recovered), "old", None, "new", None, "ready"),
        ((stage, failed, recovered), "old", None, "failed", None, "failed"),
        ((stage, ready, promote, recovered), "old", None, "new", None, "interrupted"),
        ((*SERVES_NEW, recovered), "new", "old", None, None, "promoted"),
        ((*SERVES_NEW, roll_back, recovered), "new", "old", None, None, "interrupted"),
    ],
)
def test_what_changes_lead_to(
    changes: tuple[Change, ...], active: str, previous: str | None, staged: str | None, order: str | None, last: str
) -> None:
    found = after(*changes)
    assert found.active.name == active
    assert (found.previous and found.previous.name) == previous
    assert (found.staged and found.staged.phase) == staged
    assert (found.order and found.order.what) == order
    assert found.history[-1].what == last


@pytest.mark.parametrize(
    ("changes", "refused", "remedy"),
    [
        ((), partial(state.stage, revision=OLD, by=BY, at=AT), "active already"),
        (SERVES_NEW, partial(state.stage, revision=replace(NEW, sums="c"), by=BY, at=AT), "a folder of their own"),
        (SERVES_NEW, partial(state.stage, revision=replace(NEW, sums=None), by=BY, at=AT), "a folder of their own"),
        (SERVES_NEW, partial(state.stage, revision=replace(OLD, sums="c"), by=BY, at=AT), "a folder of their own"),
        ((), unstage, "nothing is staged"),
        ((), promote, "weights stage"),
        ((), roll_back, "stage the ones"),
        ((stage,), promote, "not loaded yet"),
        ((stage, loading), promote, "not loaded yet"),
        ((stage, loading), force, "not loaded yet"),
        ((stage, failed), promote, "stage it again"),
        ((stage, broken), promote, r"bread.*--force"),
        ((stage, partial(ready, golden=None)), promote, "not run"),
        ((stage, ready, promote), stage, "wait for it"),
        ((stage, ready, promote), unstage, "wait for it"),
        ((stage, ready, promote), promote, "wait for it"),
        ((*SERVES_NEW, roll_back), roll_back, "wait for it"),
        ((stage, ready), promoted, "no order"),
        ((stage, ready, promote), partial(promoted, unchecked=True), "checksums"),
        ((stage, ready, promote, broken), promoted, "golden set"),
        ((stage, ready, promote, partial(ready, golden=None)), promoted, "golden set"),
        ((), declined, "no order"),
        ((), reverted, "no previous"),
        ((stage,), partial(state.loading, id=99), "by now"),
    ],
)
def test_what_is_refused(changes: tuple[Change, ...], refused: Change, remedy: str) -> None:
    with pytest.raises(Refused, match=remedy):
        refused(after(*changes))


def test_a_forced_promotion_says_so_and_its_files_are_not_vouched_for() -> None:
    found = after(stage, broken, force, partial(promoted, unchecked=True))
    assert found.active == replace(NEW, sums=None, revision="r-new")
    assert found.history[-1].by == BY
    assert found.history[-1].why == "forced; the checksums do not match; golden set broken: bread"


def test_a_promotion_tells_what_the_shadow_found() -> None:
    found = after(stage, ready, lambda s: state.shadowed(s, _id(s), Shadow(agreed=19, stricter=1)), promote, promoted)
    assert found.history[-1].why == "shadow: 19 agreed, 1 stricter"


def test_where_the_previous_weights_serve_again_an_order_for_them_is_done() -> None:
    found = after(*SERVES_NEW, roll_back, partial(ready, golden=None), reverted)
    assert (found.active.name, found.staged, found.order) == ("old", None, None)


def test_the_history_is_bounded_and_its_numbers_go_on() -> None:
    found = START
    for _ in range(state.HISTORY):
        found = unstage(stage(found))
    assert len(found.history) == state.HISTORY
    assert found.number == 2 * state.HISTORY


def test_it_is_read_back_as_it_was_written() -> None:
    for found in (START, after(stage, broken, force), after(*SERVES_NEW, roll_back)):
        assert state.decode(json.loads(json.dumps(state.encode(found)))) == found


@pytest.mark.parametrize(
    "edit",
    [
        {"version": 2},
        {"active": None},
        {"active": {"name": "x", "model": 3, "sums": None, "revision": None}},
        {"order": {"what": "dance", "by": "x", "force": False}},
        {"staged": {"id": 1}},
        {"history": [{"number": 1}]},
    ],
)
def test_another_file_is_no_state(edit: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        state.decode({**state.encode(after(stage)), **edit})


CHANGES: dict[str, Change] = {
    "stage": stage,
    "stage other": partial(state.stage, revision=Revision("other", "/w/other", "c"), by=BY, at=AT),
    "unstage": unstage,
    "unstage alone": unstage_alone,
    "promote": promote,
    "force": force,
    "roll back": roll_back,
    "loading": loading,
    "ready": ready,
    "broken": broken,
    "ready again": partial(ready, golden=None),
    "failed": failed,
    "declined": declined,
    "promoted": promoted,
    "reverted": reverted,
    "crash": recovered,
}
MOVES = {"promoted": ("promoted", "rolled back"), "reverted": ("reverted",)}


@given(st.lists(st.sampled_from(sorted(CHANGES)), max_size=40))
def test_no_sequence_of_commands_and_crashes_serves_what_was_not_tried(names: list[str]) -> None:
    found = START
    has_served = {OLD.model}
    for name in names:
        before = found
        try:
            found = CHANGES[name](before)
        except Refused:
            assert found is before
            continue
        assert state.decode(json.loads(json.dumps(state.encode(found)))) == found
        assert found.number >= before.number
        if found.active.model != before.active.model:
            assert name in MOVES
            assert found.history[-1].what in MOVES[name]
            assert found.order is None
            if name == "promoted":
                assert before.order is not None
                assert before.staged is not None
                assert before.staged.phase == "ready"
                golden = before.staged.golden
                tried = golden is not None and not golden.broken
                assert tried or before.order.force or before.staged.revision.model in has_served
                assert found.previous == before.active
            else:
                assert found.active == before.previous
            has_served.add(found.active.model)
        if name == "crash":
            assert found.active == before.active
            assert found.order is None
            assert found.staged is None or found.staged.phase in ("new", "failed")
            assert recovered(found) == found
        if found.order is not None:
            assert found.staged is not None
