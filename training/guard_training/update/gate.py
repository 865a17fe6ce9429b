"""Whether a new revision may replace the current one: no source loses more than the margin, the golden set holds.

A source's figure is F1 where it has both classes, else recall, or the rate of true negatives (100 % less the false
positives). The differences are paired, row by row. A loss counts by its point estimate; with ``allow_chance`` only
where the 95 % interval of the paired bootstrap leaves no doubt that there is one, which suits small sources.

The golden set breaks where the new guard is wrong about a row that the current one has right. What both have wrong
is told and does not stop an update: it is no worse than what serves now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from guard_training.evaluation.metrics import compare
from guard_training.evaluation.outcomes import SIDES, Outcome
from guard_training.evaluation.stats import Interval
from guard_training.evaluation.tables import Sheet

_NAMES = {"f1": "F1", "recall": "recall", "false_positive_rate": "true negatives"}


class UpdateRefused(ValueError):
    """The new revision is not good enough to publish; the message says where it lost."""


@dataclass(frozen=True, slots=True)
class Change:
    """One source and side; figures 0..1, higher is better. ``interval`` is that of ``after - before``."""

    source: str
    side: str
    figure: str
    rows: int
    before: float
    after: float
    interval: Interval | None

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def certain(self) -> bool:
        """Whether the interval leaves no doubt that the figure fell."""
        return self.interval is not None and self.interval[1] < 0

    def loses(self, margin: float, *, allow_chance: bool) -> bool:
        # differences of rates carry rounding: 0.98 - 1.0 is a hair more than 0.02
        return self.difference < -margin - 1e-9 and (self.certain or not allow_chance)


@dataclass(frozen=True, slots=True)
class Golden:
    """Ids of golden rows, those that must be unharmful first. ``broken`` were right before."""

    rows: int
    broken: tuple[str, ...]
    wrong_before_and_after: tuple[str, ...]
    mended: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the gate found; ``accepted`` is what decides."""

    margin: float
    allow_chance: bool
    changes: tuple[Change, ...]
    golden: Golden

    @property
    def losses(self) -> list[Change]:
        return [one for one in self.changes if one.loses(self.margin, allow_chance=self.allow_chance)]

    @property
    def accepted(self) -> bool:
        return not self.losses and self.golden.rows > 0 and not self.golden.broken

    def reasons(self) -> list[str]:
        """Why it is refused, a line each."""
        found = [
            f"{one.source} ({one.side}): {_NAMES[one.figure]} {100 * one.before:.1f} -> {100 * one.after:.1f}, more "
            f"than {100 * self.margin:g} points less{'' if one.certain else '; this may be chance'}"
            for one in self.losses
        ]
        if self.golden.broken:
            found.append(f"the golden set breaks: {', '.join(self.golden.broken)}")
        if not self.golden.rows:
            found.append("the golden set holds no row")
        return found

    def raise_if_refused(self) -> None:
        if not self.accepted:
            raise UpdateRefused("\n  ".join(["the new revision is refused, and nothing is written:", *self.reasons()]))

    def to_json(self) -> dict[str, Any]:
        lost = self.losses
        changes = [{**asdict(one), "difference": one.difference, "lost": one in lost} for one in self.changes]
        return {
            "accepted": self.accepted,
            "margin": self.margin,
            "allow_chance": self.allow_chance,
            "changes": changes,
            "golden": asdict(self.golden),
            "reasons": self.reasons(),
        }


def judge(
    before: Sequence[Outcome],
    after: Sequence[Outcome],
    golden_before: Sequence[Outcome],
    golden_after: Sequence[Outcome],
    *,
    margin: float,
    allow_chance: bool = False,
) -> Judgement:
    """Compares two guards on the same rows; raises ``ValueError`` where none is shared."""
    compared = compare(after, before)
    golden = weigh_golden(golden_before, golden_after)
    return Judgement(margin, allow_chance, tuple(map(_change, compared["sources"])), golden)


def _change(entry: Mapping[str, Any]) -> Change:
    name = next(name for name in ("f1", "recall", "false_positive_rate") if entry[name] is not None)
    value = entry[name]
    before, after, interval = value["theirs"], value["ours"], value["interval"]
    if name == "false_positive_rate":
        before, after = 1 - before, 1 - after
        interval = (-interval[1], -interval[0]) if interval else None
    return Change(entry["source"], entry["side"], name, entry["rows"], before, after, interval)


def weigh_golden(before: Sequence[Outcome], after: Sequence[Outcome]) -> Golden:
    """The golden rows that the new guard has wrong, by what the current one says about them."""
    known = {one.id: _right(one) for one in before}
    ordered = sorted(after, key=lambda one: any(one.label(side) == "harmful" for side in SIDES))

    def ids(was: bool, is_: bool) -> tuple[str, ...]:
        return tuple(one.id for one in ordered if (known[one.id], _right(one)) == (was, is_))

    return Golden(len(after), ids(True, False), ids(False, False), ids(False, True))


def _right(one: Outcome) -> bool:
    return all(one.called(side) == one.label(side) for side in SIDES if one.label(side) is not None)


def sheet(verdict: Judgement) -> Sheet:
    """The changes as a table."""
    lost = verdict.losses
    return Sheet(
        "New revision against the current one",
        ("source", "judged", "figure", "rows", "before", "after", "difference", ""),
        tuple(
            (
                one.source,
                one.side,
                _NAMES[one.figure],
                str(one.rows),
                f"{100 * one.before:.1f}",
                f"{100 * one.after:.1f}",
                _difference(one),
                "lost" if one in lost else "",
            )
            for one in verdict.changes
        ),
        note=f"Per cent; paired differences with their 95 % interval; margin {100 * verdict.margin:g} points.",
        left=3,
    )


def _difference(one: Change) -> str:
    interval = f" ({100 * one.interval[0]:+.1f} to {100 * one.interval[1]:+.1f})" if one.interval else ""
    return f"{100 * one.difference:+.1f}{interval}"
