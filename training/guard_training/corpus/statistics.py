"""What a corpus holds: the table of modalities and reasoning steps of the paper (Table 6), and labels by source.

Paper, for comparison: text 63,799 samples, 353,440 steps, 5.54 steps each, 163.25 characters per step; image 13,267,
57,322, 4.32, 154.03; text-image 46,030, 221,033, 4.80, 160.79; all 123,096, 631,795, 5.13, 159.36. The last figure
is the plain mean of the three above it; here every mean is over steps.

A step is what stands under a heading ``## Reasoning Step 3`` or ``Step 3:``; a rationale without such headings has
one step per line. Lengths are characters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from guard_training.corpus.rows import Row

Modality = Literal["text", "image", "text-image", "all"]
_MODALITIES: tuple[Modality, ...] = ("text", "image", "text-image")
_STEP = re.compile(
    r"^[ \t]*(?:#+[ \t]*|\*\*)?(?:Reasoning[ \t]+)?Step[ \t]*\d+\b[ \t]*[:.)]?(?:\*\*)?[:.)]?", re.I | re.M
)
#: other headings (``# Task 1``) end a step
_HEADING = re.compile(r"^[ \t]*#+[^\n]*$", re.M)


@dataclass(frozen=True, slots=True)
class Steps:
    """One line of the paper's Table 6. Means are None where there is nothing to divide by."""

    modality: Modality
    samples: int
    steps: int
    mean_steps: float | None
    mean_length: float | None


@dataclass(frozen=True, slots=True)
class Labels:
    """Rows of one source and modality: how many are labelled what on each side, and how many carry a rationale."""

    source: str
    modality: Modality
    samples: int
    request: dict[str, int]
    response: dict[str, int]
    rationales: int
    licence: str


@dataclass(frozen=True, slots=True)
class Statistics:
    """``steps`` ends with the line of all modalities."""

    steps: list[Steps]
    labels: list[Labels]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def modality(row: Row) -> Modality:
    if row.image is None:
        return "text"
    return "text-image" if row.prompt.strip() else "image"


def steps(rationale: str) -> list[str]:
    """The reasoning steps of a rationale, without their headings."""
    marks = list(_STEP.finditer(rationale))
    if not marks:
        found = _HEADING.sub("", rationale).splitlines()
    else:
        ends = [*(mark.start() for mark in marks[1:]), len(rationale)]
        found = [
            _HEADING.split(rationale[mark.end() : end], maxsplit=1)[0] for mark, end in zip(marks, ends, strict=True)
        ]
    return [step.strip() for step in found if step.strip()]


def statistics(rows: Iterable[Row]) -> Statistics:
    """Counts of all rows."""
    samples: Counter[Modality] = Counter()
    counts: Counter[Modality] = Counter()
    lengths: Counter[Modality] = Counter()
    groups: dict[tuple[str, Modality], list[Row]] = {}
    for row in rows:
        kind = modality(row)
        found = steps(row.rationale or "")
        groups.setdefault((row.source, kind), []).append(row)
        for name in (kind, "all"):
            samples[name] += 1
            counts[name] += len(found)
            lengths[name] += sum(map(len, found))
    table = [_line(name, samples[name], counts[name], lengths[name]) for name in (*_MODALITIES, "all")]
    return Statistics(table, [_labels(*group, rows) for group, rows in sorted(groups.items())])


def _line(name: Modality, samples: int, steps: int, length: int) -> Steps:
    return Steps(name, samples, steps, steps / samples if samples else None, length / steps if steps else None)


def _labels(source: str, kind: Modality, rows: Sequence[Row]) -> Labels:
    return Labels(
        source=source,
        modality=kind,
        samples=len(rows),
        request=dict(Counter(row.request or "none" for row in rows)),
        response=dict(Counter(row.response_label or "none" for row in rows if row.response)),
        rationales=sum(row.rationale is not None for row in rows),
        licence=", ".join(sorted({row.licence for row in rows if row.licence})),
    )


def steps_table(found: Statistics) -> Table:
    """As the paper prints it."""
    table = Table(title="Modalities and reasoning steps", title_justify="left")
    for name in ("modality", "samples", "steps", "mean steps", "mean length of a step"):
        table.add_column(name, justify="left" if name == "modality" else "right")
    for line in found.steps:
        if line.modality == "all":
            table.add_section()
        table.add_row(
            line.modality, f"{line.samples:,}", f"{line.steps:,}", _mean(line.mean_steps), _mean(line.mean_length)
        )
    return table


def _mean(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def labels_table(found: Statistics) -> Table:
    """Harmful, unharmful and unlabelled rows of each source, on each side."""
    table = Table(title="Labels: harmful / unharmful / none", title_justify="left")
    for name in ("source", "modality", "samples", "request", "response", "rationales", "licence"):
        table.add_column(name, justify="right" if name in ("samples", "rationales") else "left")
    for line in found.labels:
        table.add_row(
            escape(line.source), line.modality, f"{line.samples:,}", _sides(line.request), _sides(line.response),
            f"{line.rationales:,}", escape(line.licence),
        )  # fmt: skip
    return table


def _sides(counts: dict[str, int]) -> str:
    return " / ".join(f"{counts.get(name, 0):,}" for name in ("harmful", "unharmful", "none")) if counts else "-"
