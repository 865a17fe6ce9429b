"""A corpus from parts: without duplicates, without leaks, at the wanted shares, some images held out as a test.

Draws are by the digest of seed and id: they do not depend on the order of rows or on the other sources, and the
number that a share leaves is exact. The folder then holds ``train.jsonl``, ``harm_image_test.jsonl`` (where images
are held out), ``images/`` and ``report.json`` (counts and ids, no text).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from guard_training.corpus.leakage import Duplicate, Fingerprints, Leak, Track, find_duplicates, find_leaks
from guard_training.corpus.rows import Row, rows_to_jsonl
from guard_training.corpus.sources.parts import Part
from guard_training.rowfile import write_json, write_whole

TRAIN, TEST, REPORT = "train.jsonl", "harm_image_test.jsonl", "report.json"
#: the part of the image rows that the paper holds out as HarmImageTest (section 2.1)
PAPER_IMAGE_TEST = 0.2


@dataclass(frozen=True, slots=True)
class Plan:
    """What to make of the rows. ``shares``: source to fraction, 1 where it is not named. ``near``: the similarity
    from which rows count as duplicates too, None for exact ones only. Raises ``ValueError`` for one outside 0..1.
    """

    seed: int = 0
    shares: Mapping[str, float] = field(default_factory=dict)
    image_test: float = 0.0
    against: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    threshold: float = 0.6
    remove_leaks: bool = True
    near: float | None = None

    def __post_init__(self) -> None:
        if not all(0 <= part <= 1 for part in (*self.shares.values(), self.image_test)):
            raise ValueError("a share, of a source or of the test's images, lies between 0 and 1")
        if not all(0 < least <= 1 for least in (self.threshold, 1.0 if self.near is None else self.near)):
            raise ValueError("the similarity from which texts are nearly the same lies above 0 and is at most 1")


@dataclass(frozen=True, slots=True)
class Count:
    """Rows of one source, from the copy to the corpus."""

    read: int
    bad: int
    foreign: dict[str, int]
    duplicates: int
    leaks: int
    train: int
    test: int


@dataclass(frozen=True, slots=True)
class Built:
    """A corpus. ``counts`` by source; ``too_alike`` are training images that resemble one held out."""

    train: list[Row]
    test: list[Row]
    counts: dict[str, Count]
    duplicates: list[Duplicate]
    leaks: list[Leak]
    too_alike: list[Leak]
    bad: list[str]


def build(
    parts: Mapping[str, Sequence[Part]],
    plan: Plan,
    fingerprints: Fingerprints | None = None,
    track: Track = lambda rows, _: rows,
) -> Built:
    """The corpus of the parts (source to its copies), in their order."""
    prints = fingerprints or Fingerprints()
    everything = [row for copies in parts.values() for part in copies for row in part.rows]
    duplicates = find_duplicates(everything, near=plan.near, fingerprints=prints, track=track)
    rows = _without(everything, [duplicate.id for duplicate in duplicates])
    leaks = find_leaks(rows, plan.against, threshold=plan.threshold, fingerprints=prints, track=track)
    if plan.remove_leaks:
        rows = _without(rows, [leak.id for leak in leaks])
    for source, share in plan.shares.items():
        mine = [row.id for row in rows if row.source == source]
        rows = _without(rows, set(mine) - draw(mine, share, plan.seed))
    held = draw([row.id for row in rows if row.image and not row.prompt], plan.image_test, plan.seed + 1)
    train, test = _without(rows, held), [row for row in rows if row.id in held]
    too_alike = find_leaks(train, {TEST: test}, fingerprints=prints, track=track) if test else []
    train = _without(train, [leak.id for leak in too_alike])
    counts = _counts(parts, duplicates, leaks, train, test)
    bad = [reason for copies in parts.values() for part in copies for reason in part.bad]
    return Built(train, test, counts, duplicates, leaks, too_alike, bad)


def draw(ids: Sequence[str], share: float, seed: int) -> set[str]:
    """``share`` of the ids, rounded. Raises ``ValueError`` for a share outside 0..1."""
    if not 0 <= share <= 1:
        raise ValueError(f"a share lies between 0 and 1, not {share}")
    ranked = sorted(ids, key=lambda id: hashlib.sha256(f"{seed}/{id}".encode()).digest())
    return set(ranked[: round(share * len(ids))])


def write_corpus(built: Built, plan: Plan, folder: Path) -> None:
    """The files of the corpus, each in one go."""
    for name, rows in ((TRAIN, built.train), (TEST, built.test)):
        if rows or name == TRAIN:
            write_whole(folder / name, rows_to_jsonl(rows, folder).encode())
        else:
            (folder / name).unlink(missing_ok=True)
    write_json(folder / REPORT, report(built, plan))


def report(built: Built, plan: Plan) -> dict[str, Any]:
    """How the corpus came about: counts and ids."""
    return {
        "seed": plan.seed,
        "shares": dict(plan.shares),
        "image_test": plan.image_test,
        "threshold": plan.threshold,
        "leaks_removed": plan.remove_leaks,
        "counts": {source: asdict(count) for source, count in built.counts.items()},
        "duplicates": [asdict(duplicate) for duplicate in built.duplicates],
        "leaks": [asdict(leak) for leak in built.leaks],
        "too_alike": [asdict(leak) for leak in built.too_alike],
        "bad": built.bad,
    }


def _without(rows: Sequence[Row], ids: Sequence[str] | set[str]) -> list[Row]:
    gone = set(ids)
    return [row for row in rows if row.id not in gone]


def _counts(
    parts: Mapping[str, Sequence[Part]],
    duplicates: Sequence[Duplicate],
    leaks: Sequence[Leak],
    train: Sequence[Row],
    test: Sequence[Row],
) -> dict[str, Count]:
    source = {row.id: name for name, copies in parts.items() for part in copies for row in part.rows}
    duplicated, leaked = (Counter(source[found.id] for found in list) for list in (duplicates, leaks))
    trained, tested = (Counter(row.source for row in rows) for rows in (train, test))
    return {
        name: Count(
            read=sum(len(part.rows) for part in copies),
            bad=sum(len(part.bad) for part in copies),
            foreign=dict(sum((part.foreign for part in copies), Counter[str]())),
            duplicates=duplicated[name],
            leaks=leaked[name],
            train=trained[name],
            test=tested[name],
        )
        for name, copies in parts.items()
    }
