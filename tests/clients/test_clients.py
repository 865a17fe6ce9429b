"""Every client through the real gateway, in every case: what its caller sees, and what reached us."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.conftest import Stage
from tests.clients.contract import CALLS, Call, Case, cell, wrong
from tests.clients.environments import PROJECT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
EVERY = [
    pytest.param(client, call, case, id=f"{client}-{call.name}-{case.name}")
    for client, calls in CALLS.items()
    for call in calls
    for case in call.cases
]


@pytest.fixture(scope="session")
def played(stage: Stage) -> Any:
    """Plays each client once, when its first case is asked for."""
    done: set[str] = set()

    def play(client: str) -> Stage:
        if client not in done:
            done.add(client)
            stage.play(client, PROJECT)
        return stage

    return play


@pytest.mark.parametrize(("client", "call", "case"), EVERY)
def test_a_caller_sees_what_happened_and_nothing_is_sent_twice(
    played: Any, client: str, call: Call, case: Case
) -> None:
    stage = played(client)
    saw = stage.saw(client, call, case)
    complaint = wrong(call, case, saw)
    assert complaint is None, f"{complaint}: {saw}"
    records = stage.records(client, call, case)
    assert [(r["dialect"], r["outcome"], r["upstream_called"]) for r in records] == [
        (call.dialect, case.outcome, case.called)
    ] * call.hits(case)
    print(cell(call, case, saw))
