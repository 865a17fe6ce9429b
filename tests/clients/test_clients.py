"""Every client through the real gateway, in every case: what its caller sees, and what reached us."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import cache
from itertools import pairwise

import pytest

from tests.clients import environments
from tests.clients.conftest import Stage
from tests.clients.contract import CALLS, Call, Case, cell, wrong
from tests.clients.docs import DOCS, table, with_section

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
EVERY = [
    pytest.param(client, call, case, id=f"{client}-{call.name}-{case.name}")
    for client, calls in CALLS.items()
    for call in calls
    for case in call.cases
]


@pytest.fixture(scope="session")
def played(stage: Stage) -> Callable[[str], Stage]:
    """Plays each client once, when its first case is asked for; skips it where this machine cannot."""

    @cache
    def play(client: str) -> environments.Missing | None:
        try:
            stage.play(client)
        except environments.Missing as missing:
            return missing
        return None

    def asked(client: str) -> Stage:
        missing = play(client)
        if missing is not None and "GUARD_REQUIRE_CLIENTS" in os.environ:
            raise missing
        if missing is not None:
            pytest.skip(f"{client}: {missing}")
        return stage

    return asked


@pytest.mark.parametrize(("client", "call", "case"), EVERY)
def test_a_caller_sees_what_happened_and_nothing_is_sent_twice(
    played: Callable[[str], Stage], client: str, call: Call, case: Case
) -> None:
    stage = played(client)
    saw = stage.saw(client, call, case)
    complaint = wrong(call, case, saw)
    assert complaint is None, f"{complaint}: {saw}"
    records = stage.records(client, call, case)
    expected = (call.dialect, call.streams, case.outcome, case.called)
    assert [(r["dialect"], r["stream"], r["outcome"], r["upstream_called"]) for r in records] == [
        expected for _ in range(call.hits(case))
    ]
    if case.guard != "works":  # whoever comes again waits first
        times = [datetime.fromisoformat(record["time"]) for record in records]
        assert all(later - one >= timedelta(seconds=0.9) for one, later in pairwise(times))


@pytest.mark.parametrize("client", CALLS)
def test_the_documentation_says_what_was_measured(played: Callable[[str], Stage], client: str) -> None:
    stage = played(client)
    measured = {
        call.name: {case.name: cell(call, case, stage.saw(client, call, case)) for case in call.cases}
        for call in CALLS[client]
    }
    text = DOCS.read_text("utf-8")
    told = with_section(text, client, table(CALLS[client], measured))
    if "UPDATE_DOCS" in os.environ:
        DOCS.write_text(told, "utf-8")
    assert told == text or "UPDATE_DOCS" in os.environ, "run this test with UPDATE_DOCS=1"
