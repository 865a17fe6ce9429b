from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_training.evaluation.stats import Confusion, Rate, confusion, f1_interval, percentile


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (60, 100, 0.5020, 0.6906)],
)
def test_wilsons_interval_agrees_with_published_values(hits: int, total: int, low: float, high: float) -> None:
    assert Rate(hits, total).interval == pytest.approx((low, high), abs=1e-4)


def test_a_rate_of_nothing_has_no_value() -> None:
    assert Rate(0, 0).value is None
    assert Rate(0, 0).interval is None


@given(st.integers(0, 400), st.integers(1, 400))
@settings(max_examples=50)
def test_the_interval_holds_the_rate(hits: int, total: int) -> None:
    hits = min(hits, total)
    low, high = Rate(hits, total).interval or (2.0, -1.0)
    assert 0.0 <= low <= hits / total + 1e-9
    assert hits / total - 1e-9 <= high <= 1.0


def test_an_error_is_wrong_on_either_side() -> None:
    assert confusion([(True, None), (False, None), (True, True), (False, False)]) == Confusion(1, 1, 1, 1)


def test_f1_and_its_interval() -> None:
    pairs: list[tuple[bool, bool | None]] = [(True, True)] * 30 + [(True, False)] * 10 + [(False, True)] * 10
    assert confusion(pairs).f1 == pytest.approx(0.75)
    low, high = f1_interval(pairs) or (1.0, 0.0)
    assert low < 0.75 < high
    assert f1_interval([(False, False)]) is None


def test_percentile_is_the_nearest_rank() -> None:
    assert percentile([5.0, 1.0, 3.0], 0.5) == 3.0
    assert percentile([5.0, 1.0, 3.0], 0.95) == 5.0
    assert percentile([], 0.5) is None
