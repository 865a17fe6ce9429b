"""Health, the start and the scaling of a replica in Ray's environment, without a cluster (``replica_driver.py``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integrations.ray import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return environment.told(str(Path(__file__).with_name("replica_driver.py")))


SOUND = {"health": "", "ready": 200, "judged": 200}


@pytest.mark.parametrize("end", ["stuck", "dead"])
def test_a_replica_has_not_started_before_its_guard_is_loaded_and_is_in_health_meanwhile(
    seen: dict[str, Any], end: str
) -> None:
    assert seen[end]["loading"] == {"started": False, "health": ""}
    assert seen[end]["sound"] == {"refused": False, **SOUND}


@pytest.mark.parametrize(
    ("end", "why"), [("stuck", "the engine has been stuck for 60 s"), ("dead", "the engine has died")]
)
def test_a_replica_whose_engine_is_stuck_or_dead_is_out_of_health_and_judges_nothing(
    seen: dict[str, Any], end: str, why: str
) -> None:
    assert seen[end]["slow"] == SOUND
    assert seen[end]["stuck"] == {"health": why, "ready": 503, "judged": 503}


def test_a_replica_whose_guard_cannot_be_loaded_does_not_start(seen: dict[str, Any]) -> None:
    why = "the guard cannot be loaded: unavailable: no such model"
    assert seen["unloadable"] == {"refused": True, "health": why}


def test_serve_wants_another_replica_when_one_has_all_that_it_takes_and_none_beyond_the_bounds(
    seen: dict[str, Any],
) -> None:
    # idle, half loaded, full; two at a quarter; two with nine times what they take
    assert seen["scaled"] == [[1, 1, 2, 1, 4]] * 3
