"""Rates with 95 % intervals, the counts behind precision, recall and F1, and the bootstrap. Pure functions.

Every bootstrap resamples rows. A figure depends on the rows through a few counts only, so a resample is one
multinomial draw of these counts: the same distribution at no cost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

#: half the width of a normal 95 % interval, in standard deviations
Z = 1.959963984540054
DRAWS = 1000

Array = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Rate:
    """``hits`` of ``total``, with Wilson's 95 % interval; ``value`` is None where there is nothing to count."""

    hits: int
    total: int

    @property
    def value(self) -> float | None:
        return self.hits / self.total if self.total else None

    @property
    def interval(self) -> Interval | None:
        """Wilson's score interval (Wilson 1927)."""
        if not self.total:
            return None
        low, high = binomtest(self.hits, self.total).proportion_ci(method="wilson")
        return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Change:
    """Paired change of a rate: ``gained`` rows became hits, ``lost`` ceased to be, of ``total``."""

    gained: int
    lost: int
    total: int

    @property
    def value(self) -> float | None:
        return (self.gained - self.lost) / self.total if self.total else None

    @property
    def interval(self) -> Interval | None:
        """Wald's 95 % interval with half a pair added to each of the four cells (Agresti and Min 2005)."""
        if not self.total:
            return None
        n, gained, lost = self.total + 2, self.gained + 0.5, self.lost + 0.5
        middle = (gained - lost) / n
        half = Z * math.sqrt((gained + lost) - (gained - lost) ** 2 / n) / n
        return max(-1.0, middle - half), min(1.0, middle + half)


def paired_change(before: Sequence[bool], after: Sequence[bool]) -> Change:
    """The change from ``before`` to ``after``, row by row; ``ValueError`` for lists of different length."""
    pairs = list(zip(before, after, strict=True))
    return Change(sum(b and not a for a, b in pairs), sum(a and not b for a, b in pairs), len(pairs))


def rate_json(rate: Rate | Change) -> dict[str, Any] | None:
    """Value, 95 % interval and count, or None where there is nothing to count."""
    return {"value": rate.value, "interval": rate.interval, "n": rate.total} if rate.total else None


def mean_json(values: Sequence[float], most: float = math.inf) -> dict[str, Any] | None:
    """Mean of values between 0 and ``most`` with its normal 95 % interval; None where there are none."""
    if not values:
        return None
    n, mean = len(values), sum(values) / len(values)
    spread = (sum((value - mean) ** 2 for value in values) / max(1, n - 1)) ** 0.5
    half_width = Z * spread / n**0.5
    return {"value": mean, "interval": (max(0.0, mean - half_width), min(most, mean + half_width)), "n": n}


@dataclass(frozen=True, slots=True)
class Confusion:
    """Counts of one source and one side; "positive" is harmful. A verdict that is an error counts as wrong."""

    true_positive: int = 0
    false_positive: int = 0
    true_negative: int = 0
    false_negative: int = 0

    @property
    def recall(self) -> Rate:
        return Rate(self.true_positive, self.true_positive + self.false_negative)

    @property
    def precision(self) -> Rate:
        return Rate(self.true_positive, self.true_positive + self.false_positive)

    @property
    def false_positive_rate(self) -> Rate:
        return Rate(self.false_positive, self.false_positive + self.true_negative)

    @property
    def f1(self) -> float | None:
        total = 2 * self.true_positive + self.false_positive + self.false_negative
        return 2 * self.true_positive / total if total else None


def cell(is_: bool, called: bool | None) -> int:
    """Where a row stands in ``resample``'s counts."""
    return (0 if called is True else 3) if is_ else (2 if called is False else 1)


def confusion(pairs: Sequence[tuple[bool, bool | None]]) -> Confusion:
    """Counts of (is harmful, was called harmful) pairs; a call of None is an error, and wrong either way."""
    counts = Counter(cell(is_, called) for is_, called in pairs)
    return Confusion(*(counts[number] for number in range(4)))


def f1_interval(pairs: Sequence[tuple[bool, bool | None]], *, draws: int = DRAWS) -> Interval | None:
    """Percentile bootstrap 95 % interval of F1 over the rows; None where F1 has no meaning."""
    counts = confusion(pairs)
    if counts.f1 is None:
        return None
    return percentiles(figures(resample(counts, np.random.default_rng(0), draws))["f1"])


def resample(counts: Confusion, rng: np.random.Generator, draws: int = DRAWS) -> Array:
    """(draws, 4) counts of resampled rows: true and false positives, true and false negatives."""
    cells = (counts.true_positive, counts.false_positive, counts.true_negative, counts.false_negative)
    return _multinomial(cells, rng, draws)


def resample_jointly(
    cells: Sequence[Sequence[int | None]], kinds: int, rng: np.random.Generator, draws: int = DRAWS
) -> list[Array]:
    """Counts (draws, ``kinds``) of each side over rows that are drawn together, because both sides are of one row.

    ``cells`` holds a row's cell on each of two sides; None where that side has no label.
    """
    counts = np.zeros((kinds + 1, kinds + 1), dtype=np.int64)
    for first, second in cells:
        counts[kinds if first is None else first, kinds if second is None else second] += 1
    drawn = _multinomial(counts.ravel().tolist(), rng, draws).reshape(draws, kinds + 1, kinds + 1)
    return [drawn.sum(axis=2)[:, :kinds], drawn.sum(axis=1)[:, :kinds]]


def figures(cells: Array) -> dict[str, Array]:
    """Recall, false-positive rate, F1 and accuracy of each row of ``resample``; NaN where there is nothing to count,
    but F1 is 0 where nothing was found (as in scikit-learn)."""
    tp, fp, tn, fn = cells.T
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = 2 * tp / (2 * tp + fp + fn)
        return {
            "recall": tp / (tp + fn),
            "false_positive_rate": fp / (fp + tn),
            "f1": np.nan_to_num(f1),
            "accuracy": (tp + tn) / cells.sum(axis=1),
        }


def percentiles(values: Array) -> Interval | None:
    """The 2.5th and 97.5th percentile of bootstrap values; None where no draw had a value."""
    known = values[~np.isnan(values)]
    if not known.size:
        return None
    low, high = np.percentile(known, (2.5, 97.5))
    return float(low), float(high)


def mean_draws(draws: Sequence[Array]) -> Array:
    """Draw by draw the mean over several groups; a group whose resample has no value is left out of that draw."""
    stacked = np.stack(draws)
    known = ~np.isnan(stacked)
    count = known.sum(axis=0)
    mean: Array = np.where(count > 0, np.nansum(stacked, axis=0) / np.maximum(count, 1), np.nan)
    return mean


@dataclass(frozen=True, slots=True)
class Paired:
    """How two guards did on the same rows; ``cells[harmful][ours right][theirs right]`` counts them."""

    cells: tuple[int, ...]

    @property
    def only_ours(self) -> int:
        """Rows that only ours has right."""
        return self.cells[2] + self.cells[6]

    @property
    def only_theirs(self) -> int:
        return self.cells[1] + self.cells[5]

    @property
    def p(self) -> float:
        """Two-sided exact McNemar test that both are right equally often (McNemar 1947)."""
        apart = self.only_ours + self.only_theirs
        return float(binomtest(self.only_ours, apart).pvalue) if apart else 1.0

    def sides(self) -> tuple[Confusion, Confusion]:
        """Ours and theirs."""
        ours, theirs = _both(np.array([self.cells], dtype=np.float64))
        return _confusion(ours[0]), _confusion(theirs[0])


def paired_cell(is_: bool, ours: bool | None, theirs: bool | None) -> int:
    """Where a row stands in ``Paired.cells``; a call of None is wrong."""
    return 4 * is_ + 2 * (ours is is_) + (theirs is is_)


def differences(cells: Array) -> dict[str, Array]:
    """Ours minus theirs of each figure, for resampled ``Paired.cells`` (draws, 8)."""
    ours, theirs = (figures(one) for one in _both(cells))
    return {name: ours[name] - theirs[name] for name in ours}


def pair(rows: Sequence[tuple[bool, bool | None, bool | None]]) -> Paired:
    """Counts of (is harmful, our call, their call); a call of None is wrong."""
    cells = [0] * 8
    for is_, ours, theirs in rows:
        cells[paired_cell(is_, ours, theirs)] += 1
    return Paired(tuple(cells))


def _confusion(cells: Array) -> Confusion:
    return Confusion(*(int(n) for n in cells))


def _both(cells: Array) -> tuple[Array, Array]:
    """(n, 8) paired counts as two (n, 4) confusions."""
    _, harmless_theirs, harmless_ours, harmless_both, none, theirs, ours, both = cells.T
    false = cells[:, 0]
    return (
        np.stack([ours + both, false + harmless_theirs, harmless_ours + harmless_both, none + theirs], axis=1),
        np.stack([theirs + both, false + harmless_ours, harmless_theirs + harmless_both, none + ours], axis=1),
    )


def _multinomial(cells: Sequence[int], rng: np.random.Generator, draws: int) -> Array:
    total = sum(cells)
    shares: Any = [cell / total for cell in cells] if total else [1.0] + [0.0] * (len(cells) - 1)
    return rng.multinomial(total, shares, size=draws).astype(np.float64)


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which ``share`` of the values lie (nearest rank)."""
    return np.quantile(values, share, method="inverted_cdf").item() if values else None
