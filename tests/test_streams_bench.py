"""``tests/bench/streams.py`` with small numbers: it measures, and what does not depend on the machine holds."""

from __future__ import annotations

import asyncio

import pytest

from tests.bench import streams
from tests.bench.streams import Row


def found(rows: list[Row], part: str, what: str) -> float:
    (row,) = (row for row in rows if row.part == part and row.what.startswith(what))
    return row.figure


def test_each_mode_is_timed_and_shows_nothing_unscreened_but_async() -> None:
    rows = asyncio.run(streams.modes(tokens=100, rate=200, seconds=0.05))
    for mode in streams.MODES:
        assert found(rows, mode, "shown before") <= (streams.BOUND if mode == "async" else 0)
        assert 0 < found(rows, mode, "time to first text") < 5
    assert found(rows, "async", "shown before") > 0
    assert 1 < found(rows, "window", "text the guard read") <= 2.5
    assert found(rows, "hold", "text the guard read") == 1


def test_a_race_hides_the_guard_behind_the_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "RACES", ((0.3, 0.3),))
    rows = asyncio.run(streams.race(1))
    assert found(rows, "no race", "added") >= 290
    assert found(rows, "race", "added") < 200


def test_random_splits_stay_within_the_bound() -> None:
    assert not [row for row in streams.leak(25) if row.missed]


def test_streams_of_a_real_gateway_are_neither_lost_nor_mixed() -> None:
    rows = streams.load(12, 10, 1, cap=1024 * 1024, seconds=0.3)
    assert (found(rows, "12 at once", "lost"), found(rows, "12 at once", "mixed")) == (0, 0)
    assert found(rows, "1 at the cap", "peak") > 0


def test_a_missed_target_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("part", "what", 2.0, "s", 1.0), Row("part", "other", 2.0)]
    assert [row.missed for row in rows] == [True, False]
    streams.show(rows)
    assert "<= 1 s" in capsys.readouterr().out
