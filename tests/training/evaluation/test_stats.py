from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_training.evaluation.stats import (
    Change,
    Confusion,
    Paired,
    Rate,
    cell,
    confusion,
    differences,
    f1_interval,
    mean_draws,
    mean_json,
    pair,
    paired_cell,
    paired_change,
    percentile,
    percentiles,
    resample_jointly,
)


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


def test_the_bootstrap_of_counts_is_the_bootstrap_of_rows() -> None:
    pairs: list[tuple[bool, bool | None]] = [(True, True)] * 20 + [(True, None)] * 9 + [(False, True)] * 5
    pairs += [(False, False)] * 26
    rng = np.random.default_rng(3)
    values = [confusion([pairs[i] for i in rng.integers(0, 60, 60)]).f1 for _ in range(2000)]
    assert f1_interval(pairs, draws=4000) == pytest.approx(tuple(np.percentile(values, (2.5, 97.5))), abs=0.02)


def test_rows_labelled_on_both_sides_are_resampled_as_one() -> None:
    cells = [(n % 4, n % 4) for n in range(40)] + [(0, None)] * 10 + [(None, 3)] * 10
    first, second = resample_jointly(cells, 4, np.random.default_rng(0), draws=500)
    assert first.mean(axis=0) == pytest.approx([20, 10, 10, 10], abs=0.6)
    assert second.mean(axis=0) == pytest.approx([10, 10, 10, 20], abs=0.6)
    assert np.array_equal(first[:, 1:3], second[:, 1:3])  # the same rows have both


@pytest.mark.parametrize(("is_", "called"), [(is_, called) for is_ in (True, False) for called in (True, False, None)])
def test_a_cell_is_where_confusion_counts_the_row(is_: bool, called: bool | None) -> None:
    counts = confusion([(is_, called)])
    held = (counts.true_positive, counts.false_positive, counts.true_negative, counts.false_negative)
    assert held.index(1) == cell(is_, called)


def test_a_resample_without_a_class_is_left_out_of_the_mean() -> None:
    nan = float("nan")
    assert mean_draws([np.array([1.0, nan, nan]), np.array([0.0, 0.5, nan])]).tolist()[:2] == [0.5, 0.5]
    assert percentiles(np.array([nan, nan])) is None


_CALLS = st.sampled_from([True, False, None])


@given(st.lists(st.tuples(st.booleans(), _CALLS, _CALLS), min_size=1, max_size=40))
@settings(max_examples=50)
def test_paired_counts_hold_both_sides(rows: list[tuple[bool, bool | None, bool | None]]) -> None:
    found = pair(rows)
    assert found.sides() == (confusion([(t, a) for t, a, _ in rows]), confusion([(t, b) for t, _, b in rows]))
    assert found.only_ours == sum(a is t and b is not t for t, a, b in rows)
    assert found.only_theirs == sum(b is t and a is not t for t, a, b in rows)
    cells = [(paired_cell(*row), None) for row in rows]
    for values in differences(resample_jointly(cells, 8, np.random.default_rng(0), draws=5)[0]).values():
        assert np.all(np.isnan(values) | (np.abs(values) <= 1))


def test_a_paired_difference_is_tighter_than_two_intervals() -> None:
    same: list[tuple[bool, bool | None, bool | None]] = [(True, n % 2 == 0, n % 2 == 0) for n in range(200)]
    better: list[tuple[bool, bool | None, bool | None]] = [(True, True, False)] * 6
    cells = [(paired_cell(*row), None) for row in same + better]
    found = differences(resample_jointly(cells, 8, np.random.default_rng(0))[0])["recall"]
    low, high = percentiles(found) or (0.0, 0.0)
    assert 0.0 < low < 6 / 206 < high < 0.06


@pytest.mark.parametrize(("ours", "theirs", "p"), [(0, 0, 1.0), (5, 5, 1.0), (10, 2, 158 / 2**12), (1, 9, 22 / 2**10)])
def test_mcnemar_looks_only_at_rows_that_one_of_them_has_right(ours: int, theirs: int, p: float) -> None:
    assert Paired((7, theirs, 0, 3, 4, 0, ours, 9)).p == pytest.approx(p)


def test_the_paired_change_counts_what_was_gained_and_lost() -> None:
    change = paired_change([True, True, True, False], [True, False, False, True])
    assert (change.gained, change.lost, change.total) == (1, 2, 4)
    assert change.value == -0.25


def test_the_interval_of_a_change_is_that_of_agresti_and_min() -> None:
    # (3.5 - 12.5) / 42 = -0.21429, and 1.96 * sqrt(16 - 81 / 42) / 42 = 0.17505 to either side.
    low, high = Change(3, 12, 40).interval or (0.0, 0.0)
    assert (low, high) == pytest.approx((-0.38934, -0.03924), abs=1e-5)
    assert Change(0, 0, 0).interval is None
    low, high = Change(0, 0, 30).interval or (0.0, 0.0)
    assert low < 0 < high


def test_the_interval_of_a_mean_stays_within_what_its_values_can_be() -> None:
    found = mean_json([1.0, 1.0, 0.0, 1.0], most=1.0) or {}
    assert (found["value"], found["interval"][1]) == (0.75, 1.0)
    assert found["interval"][0] == pytest.approx(0.26, abs=1e-3)
    assert mean_json([]) is None


def test_lists_of_different_length_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_change([True], [])
