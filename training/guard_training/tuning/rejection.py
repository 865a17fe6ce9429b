"""Which rows a guard still gets wrong (GuardReasoner-VL, section 4.1): ``k`` samples a row, read by the strict parser.

A sample is right where its format is whole and every labelled side is right; else it is wrong, as in the released
code. The paper keeps rows that are wrong in all samples; group-relative RL learns nothing from a group that is all
wrong, so a range (``1..3`` of 4) keeps the mixed ones instead. The paper's image rule keeps every row that is only an
image.

Refuses: a row without any label that the guard is asked for.
"""

# ruff: noqa: S311 - the draws must repeat for a seed, not resist guessing
from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from guard_middleware.errors import GuardError
from guard_middleware.guard.parse import parse
from guard_training.corpus.rows import Row
from guard_training.corpus.statistics import modality
from guard_training.tuning.sampling import Sample


class Outcome(StrEnum):
    RIGHT = "right"
    WRONG = "wrong"
    MALFORMED = "malformed"


@dataclass(frozen=True, slots=True)
class Counts:
    """What came of one row's samples; all but right are wrong. ``tokens`` are the lengths, ``cut`` hit the limit."""

    id: str
    right: int
    malformed: int
    cut: int
    tokens: tuple[int, ...]

    @property
    def samples(self) -> int:
        return len(self.tokens)

    @property
    def wrong(self) -> int:
        return self.samples - self.right


def judge(text: str, row: Row, *, answered: bool) -> Outcome:
    """One output against a row's labels; a side without a label counts as right. ``answered`` as in ``parse``."""
    try:
        verdict = parse(text, answered=answered)
    except GuardError:
        return Outcome.MALFORMED
    right = row.request in (None, verdict.request) and (not answered or row.response_label in (None, verdict.response))
    return Outcome.RIGHT if right else Outcome.WRONG


def count(row: Row, samples: Sequence[Sample], *, answered: bool) -> Counts:
    outcomes = [judge(sample.text, row, answered=answered) for sample in samples]
    return Counts(
        id=row.id,
        right=outcomes.count(Outcome.RIGHT),
        malformed=outcomes.count(Outcome.MALFORMED),
        cut=sum(not sample.ended for sample in samples),
        tokens=tuple(sample.tokens for sample in samples),
    )


def to_json(counts: Counts) -> dict[str, Any]:
    return asdict(counts)


def from_json(value: Mapping[str, Any]) -> Counts:
    return Counts(**{**value, "tokens": tuple(value["tokens"])})


def read_range(text: str | None, k: int) -> range:
    """``1..3`` or ``4`` as numbers of wrong samples; None is all ``k``. Raises ``ValueError`` outside 0..k."""
    if text is None:
        return range(k, k + 1)
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if not 0 <= low <= high <= k:
        raise ValueError(f"--keep {text}: give wrong samples as N or N..M within 0..{k}")
    return range(low, high + 1)


def select(
    rows: Sequence[Row],
    counts: Mapping[str, Counts],
    wrong: range,
    *,
    all_images: bool = False,
    balance: bool = False,
    max_rows: int | None = None,
    seed: int = 0,
) -> list[Row]:
    """The rows with as many wrong samples, in order; of more than ``max_rows``, as many drawn by the seed.

    ``all_images`` keeps every row that is only an image (the paper's rule). ``balance`` draws as many rows with a
    harmful label as without one, among those with the same sides labelled. Rows without counts are left out.
    """
    kept = [
        row
        for row in rows
        if row.id in counts and (counts[row.id].wrong in wrong or (all_images and modality(row) == "image"))
    ]
    rng = random.Random(seed)
    if balance:
        kept = _balanced(kept, rng)
    if max_rows is None or len(kept) <= max_rows:
        return kept
    return _drawn(kept, max_rows, rng)


def _balanced(rows: Sequence[Row], rng: random.Random) -> list[Row]:
    kinds: dict[tuple[bool, bool], tuple[list[Row], list[Row]]] = {}
    for row in rows:
        sides = kinds.setdefault((row.request is None, row.response_label is None), ([], []))
        sides["harmful" in (row.request, row.response_label)].append(row)
    kept = {row.id for sides in kinds.values() for side in sides for row in _drawn(side, min(map(len, sides)), rng)}
    return [row for row in rows if row.id in kept]


def _drawn(rows: Sequence[Row], count: int, rng: random.Random) -> list[Row]:
    drawn = set(rng.sample(range(len(rows)), count))
    return [row for number, row in enumerate(rows) if number in drawn]


@dataclass(frozen=True, slots=True)
class Group:
    """The figures of one source and modality. ``right[n]`` rows had n samples right; lengths are mean tokens."""

    source: str
    modality: str
    rows: int
    right: tuple[int, ...]
    malformed: float
    cut: float
    length: float
    kept: int


def statistics(rows: Iterable[Row], counts: Mapping[str, Counts], kept: Iterable[Row], k: int) -> list[Group]:
    """Per source and modality, then per modality, then all; shares are of the samples."""
    counted = [row for row in rows if row.id in counts]
    chosen = {row.id for row in kept}
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(counted, key=lambda row: (row.source, modality(row))):
        groups.setdefault((row.source, modality(row)), []).append(row)
    for row in sorted(counted, key=modality):
        groups.setdefault(("all", modality(row)), []).append(row)
    if counted:
        groups["all", "all"] = counted
    return [_group(source, kind, members, counts, chosen, k) for (source, kind), members in groups.items()]


def _group(
    source: str, kind: str, rows: Sequence[Row], counts: Mapping[str, Counts], chosen: set[str], k: int
) -> Group:
    found = [counts[row.id] for row in rows]
    samples = sum(one.samples for one in found)
    return Group(
        source=source,
        modality=kind,
        rows=len(rows),
        right=tuple(sum(one.right == n for one in found) for n in range(k + 1)),
        malformed=sum(one.malformed for one in found) / samples,
        cut=sum(one.cut for one in found) / samples,
        length=sum(sum(one.tokens) for one in found) / samples,
        kept=sum(row.id in chosen for row in rows),
    )
