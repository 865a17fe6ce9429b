"""Does the student err as its teacher errs? Labels of the data, of the teacher and of the student, row by row.

Per source and side: the 2 x 2 x 2 table, how right teacher and student are, how well each pair agrees (share and
Cohen's kappa), and of the student's errors the share that repeats the teacher's. That share alone says little where
the teacher errs a lot, so it stands beside the student's error rate where the teacher is right and where it is wrong:
a student that learnt its teacher's faults errs far more often in the second. Intervals are Wilson's; kappa's is the
percentile bootstrap over the rows.

Rows without a label of all three count nowhere and are counted apart: labels of the data that are missing, rows that
the teacher did not label, and the student's guard errors.

Refuses: a teacher's line that is not ``{"id", "request"?, "response"?}`` with labels harmful, unharmful or null (or a
row of data, whose ``prompt_label`` and ``response_label`` are then the teacher's), which is named and left out; and
files that share no row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from guard_middleware.types import Label
from guard_training.corpus.rows import Skipped, read_lines, row_id
from guard_training.evaluation import plots
from guard_training.evaluation.outcomes import SIDES, Outcome, Side, read_outcomes
from guard_training.evaluation.report import present
from guard_training.evaluation.stats import Array, Rate, percentiles, rate_json
from guard_training.evaluation.tables import Sheet, cell

DRAWS = 1000
_KEYS = {"request": ("request", "prompt_label"), "response": ("response", "response_label")}


class BiasError(ValueError):
    """Files that cannot be compared; the message says what to give."""


@dataclass(frozen=True, slots=True)
class Counts:
    """``cells[truth][teacher][student]``, flattened; 1 is harmful."""

    cells: tuple[int, ...]

    def total(self, *, truth: int | None = None, teacher: int | None = None, student: int | None = None) -> int:
        """Rows with the given values."""
        wanted = (truth, teacher, student)
        return sum(
            count
            for index, count in enumerate(self.cells)
            if all(want in (None, index >> shift & 1) for want, shift in zip(wanted, (2, 1, 0), strict=True))
        )

    @property
    def rows(self) -> int:
        return sum(self.cells)

    @property
    def copied(self) -> Rate:
        """Of the student's errors, those where the teacher says the same."""
        return Rate(self._both_wrong, self._both_wrong + self._only_student_wrong)

    @property
    def wrong_after_right(self) -> Rate:
        """The student's errors where the teacher is right."""
        right = self.total(truth=0, teacher=0) + self.total(truth=1, teacher=1)
        return Rate(self._only_student_wrong, right)

    @property
    def wrong_after_wrong(self) -> Rate:
        """The student's errors where the teacher is wrong."""
        wrong = self.total(truth=0, teacher=1) + self.total(truth=1, teacher=0)
        return Rate(self._both_wrong, wrong)

    @property
    def _both_wrong(self) -> int:
        return self.total(truth=0, teacher=1, student=1) + self.total(truth=1, teacher=0, student=0)

    @property
    def _only_student_wrong(self) -> int:
        return self.total(truth=0, teacher=0, student=1) + self.total(truth=1, teacher=1, student=0)


def count(triples: Sequence[tuple[bool, bool, bool]]) -> Counts:
    """Counts of (truth, teacher, student), each whether harmful."""
    found = Counter(4 * truth + 2 * teacher + student for truth, teacher, student in triples)
    return Counts(tuple(found[index] for index in range(8)))


def agreement(counts: Counts, first: str, second: str) -> dict[str, Any]:
    """Share of rows on which two of ``truth``, ``teacher``, ``student`` agree, and Cohen's kappa (Cohen 1960).

    Kappa is None where both give one and the same label only: chance agreement is then all there is.
    """
    table = [[counts.total(**{first: a, second: b}) for b in (0, 1)] for a in (0, 1)]
    same = Rate(table[0][0] + table[1][1], counts.rows)
    flat: Array = np.array([[*table[0], *table[1]]], dtype=np.float64)
    value = float(kappa(flat)[0])
    draws = np.random.default_rng(0).multinomial(counts.rows, flat[0] / max(1, counts.rows), size=DRAWS)
    known = not np.isnan(value)
    return {
        "agreement": rate_json(same),
        "kappa": {"value": value, "interval": percentiles(kappa(draws.astype(np.float64))), "n": counts.rows}
        if known
        else None,
    }


def kappa(tables: Array) -> Array:
    """Cohen's kappa of each (n, 4) table [both 0, 0 and 1, 1 and 0, both 1]; NaN where chance agreement is total."""
    a, b, c, d = tables.T
    n = a + b + c + d
    with np.errstate(invalid="ignore", divide="ignore"):
        chance = ((a + b) * (a + c) + (c + d) * (b + d)) / n**2
        found: Array = ((a + d) / n - chance) / (1 - chance)
    return np.where(np.isclose(chance, 1.0), np.nan, found)


def read_teacher(path: Path, skipped: Skipped) -> dict[str, dict[Side, Label]]:
    """The teacher's labels by row id and side; a bad line goes to ``skipped``."""
    return dict(read_lines(path, _labels, skipped, "a teacher's label"))


def _labels(value: Mapping[str, Any], where: str) -> tuple[str, dict[Side, Label]]:
    if (id := row_id(value.get("id"))) is None:
        raise ValueError("no id")
    labels: dict[Side, Label] = {}
    for side in SIDES:
        given = [value[key] for key in _KEYS[side] if key in value]
        if any(label not in ("harmful", "unharmful", None) for label in given):
            raise ValueError(f"label {given[0]!r} of the {side}")
        stated = [label for label in given if label is not None]
        if stated:
            labels[side] = stated[0]
    if not any(key in value for keys in _KEYS.values() for key in keys):
        raise ValueError("neither request nor response")
    return id, labels


def compare(
    outcomes: Sequence[Outcome], teacher: Mapping[str, Mapping[Side, Label]]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """One entry per source and side (and ``all`` of a side where it has several), and rows left out by reason."""
    groups: dict[tuple[Side, str], list[tuple[bool, bool, bool]]] = {}
    left_out: Counter[str] = Counter()
    for one in outcomes:
        for side in SIDES:
            truth, said = one.label(side), one.called(side)
            if truth is None:
                continue
            taught = teacher.get(one.id, {}).get(side)
            if said is None:
                left_out["guard errors"] += 1
            elif taught is None:
                left_out["without the teacher's label"] += 1
            else:
                triple = (truth == "harmful", taught == "harmful", said == "harmful")
                groups.setdefault((side, one.source), []).append(triple)
    entries = []
    for side in SIDES:
        own = {source: triples for (where, source), triples in sorted(groups.items()) if where == side}
        if len(own) > 1:
            own["all"] = [triple for triples in own.values() for triple in triples]
        entries += [_entry(source, side, count(triples)) for source, triples in own.items()]
    return entries, dict(left_out)


def _entry(source: str, side: Side, counts: Counts) -> dict[str, Any]:
    return {
        "source": source,
        "side": side,
        "rows": counts.rows,
        "table": [list(counts.cells[start : start + 2]) for start in (0, 2, 4, 6)],
        "teacher_and_data": agreement(counts, "truth", "teacher"),
        "student_and_data": agreement(counts, "truth", "student"),
        "student_and_teacher": agreement(counts, "teacher", "student"),
        "copied_errors": rate_json(counts.copied),
        "wrong_where_teacher_right": rate_json(counts.wrong_after_right),
        "wrong_where_teacher_wrong": rate_json(counts.wrong_after_wrong),
    }


def report_bias(
    outcomes: Path, teacher: Path, *, json_file: Path | None, page: Path | None = None, console: Console
) -> dict[str, Any]:
    """Compares two files, prints the table (and writes it to ``page``) and returns the figures.

    Raises ``BiasError`` and ``OutcomeError``.
    """
    skipped = Skipped()
    with Progress(console=console) as progress:
        task = progress.add_task("comparing labels", total=3)
        said = read_outcomes(outcomes, skipped)
        progress.advance(task)
        taught = read_teacher(teacher, skipped)
        progress.advance(task)
        entries, left_out = compare(said, taught)
        progress.advance(task)
    if not entries:
        raise BiasError(
            f"{outcomes.name} and {teacher.name} share no row that the data, the teacher and the student all label: "
            "the ids must be those of the data file" + ("\n" + skipped.summary() if skipped.reasons else "")
        )
    first = said[0]
    report = {
        "outcomes": outcomes.name,
        "teacher": teacher.name,
        "model": first.model,
        "revision": first.revision,
        "left_out": left_out,
        "sources": entries,
    }
    keys = (
        ("wrong_where_teacher_right", "wrong, teacher right"),
        ("wrong_where_teacher_wrong", "wrong, teacher wrong"),
    )
    present(
        report,
        _sheet(report),
        lines=[f"left out: {', '.join(f'{why} {n}' for why, n in left_out.items()) or 'none'}"],
        facts=[("Outcomes", outcomes.name), ("Teacher", teacher.name), ("Model", f"{first.model} {first.revision}")],
        caption="The guard's errors, with 95 % intervals",
        draw=partial(plots.rates, {first.model: {"sources": entries}}, keys),
        skipped=skipped,
        console=console,
        json_file=json_file,
        page_file=page,
    )
    return report


def _sheet(report: Mapping[str, Any]) -> Sheet:
    columns = (
        "source", "judged", "rows", "teacher right", "student right", "agree", "kappa", "errors copied",
        "wrong, teacher right", "wrong, teacher wrong",
    )  # fmt: skip
    rows = [
        (
            entry["source"],
            entry["side"],
            str(entry["rows"]),
            cell(entry["teacher_and_data"]["agreement"]),
            cell(entry["student_and_data"]["agreement"]),
            cell(entry["student_and_teacher"]["agreement"]),
            _fraction(entry["student_and_teacher"]["kappa"]),
            cell(entry["copied_errors"]),
            cell(entry["wrong_where_teacher_right"]),
            cell(entry["wrong_where_teacher_wrong"]),
        )
        for entry in report["sources"]
    ]
    title = f"{report['model']} {report['revision']} beside its teacher: per cent with 95 % intervals"
    return Sheet(title, columns, tuple(rows), left=2)


def _fraction(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    low, high = value["interval"]
    return f"{value['value']:.2f} ({low:.2f}-{high:.2f})"
