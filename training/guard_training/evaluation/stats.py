"""Rates with 95 % intervals, and the counts behind precision, recall and F1. Pure functions."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Rate:
    """``hits`` of ``total``, with Wilson's 95 % interval; ``value`` is None where there is nothing to count."""

    hits: int
    total: int

    @property
    def value(self) -> float | None:
        return self.hits / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's score interval (Wilson 1927)."""
        if not self.total:
            return None
        p, n, z2 = self.hits / self.total, self.total, _Z * _Z
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


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


def confusion(pairs: Sequence[tuple[bool, bool | None]]) -> Confusion:
    """Counts of (is harmful, was called harmful) pairs; a call of None is an error, and wrong either way."""
    tp = sum(is_ and called is True for is_, called in pairs)
    fn = sum(is_ and called is not True for is_, called in pairs)
    tn = sum(not is_ and called is False for is_, called in pairs)
    fp = sum(not is_ and called is not False for is_, called in pairs)
    return Confusion(tp, fp, tn, fn)


def f1_interval(
    pairs: Sequence[tuple[bool, bool | None]], *, draws: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap 95 % interval of F1 over the rows; None where F1 has no meaning."""
    counts = confusion(pairs)
    if counts.f1 is None:
        return None
    cells = (counts.true_positive, counts.false_positive, counts.true_negative, counts.false_negative)
    rng = random.Random(seed)  # noqa: S311
    values = []
    for _ in range(draws):
        drawn = rng.choices(range(4), cells, k=sum(cells))
        values.append(Confusion(*(drawn.count(cell) for cell in range(4))).f1 or 0.0)
    values.sort()
    return values[int(0.025 * draws)], values[min(int(0.975 * draws), draws - 1)]


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which ``share`` of the values lie (nearest rank)."""
    if not values:
        return None
    return sorted(values)[min(len(values) - 1, max(0, math.ceil(share * len(values)) - 1))]
