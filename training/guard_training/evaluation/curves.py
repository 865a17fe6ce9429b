"""Score curves: ROC with its area, precision and recall, recall at fixed false-positive rates, calibration.

All take ``harmful`` (n booleans) and ``scores`` (n guard probabilities of harmful), and ``weights`` where rows count
unequally: ``even_weights`` makes every source count the same, since sources differ in size for no good reason.
Equal scores are one point of a curve: no threshold separates them. Pure functions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_curve

from guard_training.evaluation.stats import Array, Interval, Rate, Z

#: the false-positive rates of the threshold table
RATES = (0.01, 0.05, 0.10, 0.20, 0.30)
BINS = 10


@dataclass(frozen=True, slots=True)
class Curve:
    """Points from the highest threshold to the lowest; a row is called harmful where its score is at least
    ``thresholds[i]``. The first point calls nothing harmful, so its threshold is infinite."""

    thresholds: Array
    recall: Array
    false_positive_rate: Array
    precision: Array

    @property
    def area(self) -> float:
        """Area under the ROC curve."""
        return float(np.trapezoid(self.recall, self.false_positive_rate))

    @property
    def average_precision(self) -> float:
        """Sum of precision times gain in recall, without interpolation."""
        return float(np.sum(np.diff(self.recall) * self.precision[1:]))


def curve(harmful: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> Curve | None:
    """None where one of the classes is missing."""
    truth, score = np.asarray(harmful, dtype=bool), np.asarray(scores, dtype=np.float64)
    weight = np.ones(len(score)) if weights is None else np.asarray(weights, dtype=np.float64)
    if not truth.any() or truth.all():
        return None
    wrong, found, thresholds = roc_curve(truth, score, sample_weight=weight, drop_intermediate=False)
    right, called = found * weight[truth].sum(), found * weight[truth].sum() + wrong * weight[~truth].sum()
    precision = np.divide(right, called, out=np.ones_like(called), where=called > 0)
    return Curve(thresholds, found, wrong, precision)


def area_interval(harmful: ArrayLike, scores: ArrayLike) -> Interval | None:
    """95 % interval of the area under the ROC curve (DeLong, DeLong and Clarke-Pearson 1988); None below two rows of
    a class."""
    truth, score = np.asarray(harmful, dtype=bool), np.asarray(scores, dtype=np.float64)
    high, low = np.sort(score[truth]), np.sort(score[~truth])
    if len(high) < 2 or len(low) < 2:
        return None
    found = _below(high, low)
    passed = 1 - _below(low, high)
    spread = math.sqrt(float(np.var(found, ddof=1)) / len(high) + float(np.var(passed, ddof=1)) / len(low))
    area = float(found.mean())
    return max(0.0, area - Z * spread), min(1.0, area + Z * spread)


def _below(values: Array, others: Array) -> Array:
    """For each value the share of ``others`` (sorted) below it; an equal one counts half."""
    return (np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")) / (2 * len(others))


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """The lowest threshold whose false-positive rate is at most ``rate``. ``threshold`` None: only a threshold above
    every score does it, so nothing is called harmful."""

    rate: float
    threshold: float | None
    false_positive_rate: float
    recall: float


def operating_points(given: Curve, rates: Sequence[float] = RATES) -> list[OperatingPoint]:
    points = []
    for rate in rates:
        # Sums of weights such as 1/3 end a hair above the rate that they mean.
        at = int(np.searchsorted(given.false_positive_rate, rate + 1e-12, "right")) - 1
        threshold = float(given.thresholds[at])
        points.append(
            OperatingPoint(
                rate,
                threshold if math.isfinite(threshold) else None,
                float(given.false_positive_rate[at]),
                float(given.recall[at]),
            )
        )
    return points


@dataclass(frozen=True, slots=True)
class Bin:
    """Scores from ``low`` to below ``high`` (the last bin holds 1)."""

    low: float
    high: float
    rows: int
    mean_score: float | None
    harmful: Rate


def reliability(harmful: ArrayLike, scores: ArrayLike) -> list[Bin]:
    """Bins of equal width (Guo et al. 2017, section 2)."""
    truth, score = np.asarray(harmful, dtype=bool), np.asarray(scores, dtype=np.float64)
    number = np.minimum((score * BINS).astype(int), BINS - 1)
    out = []
    for index in range(BINS):
        inside = number == index
        rows = int(inside.sum())
        mean = float(score[inside].mean()) if rows else None
        out.append(Bin(index / BINS, (index + 1) / BINS, rows, mean, Rate(int(truth[inside].sum()), rows)))
    return out


def calibration_error(given: Sequence[Bin]) -> float | None:
    """Expected calibration error: the mean gap between score and share of harmful rows, bins weighed by their rows."""
    total = sum(one.rows for one in given)
    if not total:
        return None
    gaps = (one.rows * abs((one.harmful.value or 0.0) - one.mean_score) for one in given if one.mean_score is not None)
    return sum(gaps) / total


def brier(harmful: ArrayLike, scores: ArrayLike) -> float | None:
    """Mean squared distance of score and label (Brier 1950)."""
    score = np.asarray(scores, dtype=np.float64)
    return float(np.mean((score - np.asarray(harmful, dtype=np.float64)) ** 2)) if len(score) else None


def even_weights(harmful: Sequence[bool], sources: Sequence[str]) -> NDArray[np.float64]:
    """Weights under which each source that has harmful rows holds the same share of them, and so for unharmful rows:
    the weighted recall is then the mean recall over sources."""
    sizes = Counter(zip(sources, harmful, strict=True))
    return np.array([1.0 / sizes[key] for key in zip(sources, harmful, strict=True)])
