from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from guard_training.evaluation.curves import (
    area_interval,
    brier,
    calibration_error,
    curve,
    even_weights,
    operating_points,
    reliability,
)

_CASES = st.lists(
    st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])), min_size=2, max_size=60
)


@given(_CASES)
@settings(max_examples=100)
def test_areas_agree_with_scikit_learn(cases: list[tuple[bool, float]]) -> None:
    truth, scores = [is_ for is_, _ in cases], [score for _, score in cases]
    found = curve(truth, scores)
    if len(set(truth)) < 2:
        assert found is None
        return
    assert found is not None
    assert found.area == pytest.approx(sk.roc_auc_score(truth, scores))
    assert found.average_precision == pytest.approx(sk.average_precision_score(truth, scores))
    interval = area_interval(truth, scores)
    if interval is not None:
        assert interval[0] - 1e-9 <= found.area <= interval[1] + 1e-9


def test_weights_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    truth, scores, weights = rng.random(200) < 0.4, rng.random(200).round(2), rng.random(200)
    found = curve(truth, scores, weights)
    assert found is not None
    assert found.area == pytest.approx(sk.roc_auc_score(truth, scores, sample_weight=weights))


def test_the_areas_interval_agrees_with_the_bootstrap() -> None:
    rng = np.random.default_rng(2)
    truth = rng.random(300) < 0.5
    scores = np.clip(rng.normal(0.4 + 0.2 * truth, 0.25), 0, 1)
    draws = []
    for _ in range(400):
        rows = rng.integers(0, 300, 300)
        draws.append(sk.roc_auc_score(truth[rows], scores[rows]))
    assert area_interval(truth, scores) == pytest.approx(tuple(np.percentile(draws, (2.5, 97.5))), abs=0.02)


def test_operating_points_keep_the_false_positive_rate() -> None:
    harmful = [True] * 4 + [False] * 10
    scores = [0.95, 0.8, 0.6, 0.3, *(0.05 * n for n in range(1, 11))]  # benign: 0.05 to 0.5
    found = curve(harmful, scores)
    assert found is not None
    points = {point.rate: point for point in operating_points(found)}
    assert (points[0.01].recall, points[0.01].threshold, points[0.01].false_positive_rate) == (0.75, 0.6, 0.0)
    assert points[0.10].false_positive_rate == pytest.approx(0.1)
    assert points[0.30].false_positive_rate == pytest.approx(0.3)
    assert points[0.30].recall == 0.75
    for point in points.values():
        assert point.false_positive_rate <= point.rate + 1e-9


def test_where_a_benign_row_has_the_top_score_nothing_can_be_called_at_one_per_cent() -> None:
    found = curve([True, False, False], [1.0, 1.0, 0.2])
    assert found is not None
    assert operating_points(found, [0.01])[0].threshold is None
    assert operating_points(found, [0.01])[0].recall == 0.0


def test_even_weights_make_the_weighted_recall_the_mean_of_the_sources() -> None:
    harmful = [True] * 10 + [True] * 2 + [False] * 5
    sources = ["big"] * 10 + ["small"] * 2 + ["benign"] * 5
    scores = [0.9] * 5 + [0.1] * 5 + [0.9] * 2 + [0.5] * 5
    found = curve(harmful, scores, even_weights(harmful, sources))
    assert found is not None
    assert found.recall[found.thresholds == 0.9] == pytest.approx([0.75])  # (5/10 + 2/2) / 2, not 7/12


def test_calibration_of_known_scores() -> None:
    harmful = [True] * 8 + [False] * 2 + [True] * 1 + [False] * 9
    scores = [0.8] * 10 + [0.3] * 10
    bins = reliability(harmful, scores)
    assert [one.rows for one in bins] == [0, 0, 0, 10, 0, 0, 0, 0, 10, 0]
    assert calibration_error(bins) == pytest.approx((0.0 + 0.2) / 2)
    assert brier(harmful, scores) == pytest.approx(sk.brier_score_loss(harmful, scores))
    assert reliability([True], [1.0])[-1].rows == 1
    assert calibration_error(reliability([], [])) is None
