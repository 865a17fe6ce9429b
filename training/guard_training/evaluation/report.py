"""One HTML page about an evaluation: tables and plots, nothing loaded from outside, no script, no text of any row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console

from guard_training.corpus.rows import Skipped
from guard_training.evaluation import plots, tables
from guard_training.evaluation.metrics import Mode, called, groups
from guard_training.evaluation.outcomes import SIDES, Outcome, Side
from guard_training.rowfile import write_json, write_whole

SHOWN = 40
_ABOUT: Mapping[str, str] = {
    "strict": "Strict mode: whatever is not one verdict in the one form is wrong and counted under no verdict.",
    "paper": "Paper mode: the parse and score rules of GuardReasoner-VL's released evaluation.",
}


@dataclass(frozen=True, slots=True)
class Plot:
    """``address`` is a ``data:`` address."""

    caption: str
    address: str


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    sheets: tuple[tables.Sheet, ...] = ()
    plots: tuple[Plot, ...] = ()


@dataclass(frozen=True, slots=True)
class Mistakes:
    title: str
    count: int
    ids: str


def render(
    summaries: Mapping[str, tables.Summary],
    outcomes: plots.Models,
    *,
    facts: Sequence[tuple[str, str]],
    mode: Mode,
    compared: Mapping[str, Any] | None = None,
    skipped: str = "",
) -> str:
    """The page; models in the order in which they stand, the first is what the page is about."""
    first = next(iter(summaries))
    return page(
        f"Evaluation of {first}",
        _sections(summaries, outcomes, compared),
        facts=facts,
        about=_ABOUT[mode],
        model=first,
        mistakes=mistakes(outcomes[first], mode),
        skipped=skipped,
    )


def page(
    title: str,
    sections: Sequence[Section],
    *,
    facts: Sequence[tuple[str, str]],
    about: str = "",
    model: str = "",
    mistakes: Sequence[Mistakes] = (),
    skipped: str = "",
) -> str:
    """A page of sections; those that hold nothing are left out. The mistakes are those of ``model``."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html").render(
        title=title,
        model=model,
        facts=facts,
        about=about,
        sections=[one for one in sections if one.sheets or one.plots],
        mistakes=mistakes,
        skipped=skipped,
    )


def present(
    report: dict[str, Any],
    sheet: tables.Sheet,
    *,
    lines: Sequence[str] = (),
    facts: Sequence[tuple[str, str]],
    caption: str,
    draw: Callable[[], str],
    skipped: Skipped,
    console: Console,
    json_file: Path | None,
    page_file: Path | None,
) -> None:
    """The end of a measurement that has one table: the figures as JSON, the table with ``lines`` below it, the page.

    The page's plot is what ``draw`` gives, with its ``caption``.
    """
    if json_file:
        write_json(json_file, report)
    console.print(sheet.rich())
    for line in lines:
        console.print(line, markup=False)
    if page_file:
        section = Section("Figures", (sheet,), (Plot(caption, draw()),))
        write_report(page_file, page(sheet.title, [section], facts=facts))
    skipped.tell(console)


def write_report(path: Path, page: str) -> None:
    write_whole(path, page.encode())


def _sections(
    summaries: Mapping[str, tables.Summary], outcomes: plots.Models, compared: Mapping[str, Any] | None
) -> list[Section]:
    sheets: list[tables.Sheet | None] = [tables.sources(one) for one in summaries.values()]
    if len(summaries) > 1:
        sheets.insert(0, tables.models(summaries))
    return [
        Section(
            "Sources",
            _known(sheets),
            (Plot("Recall and false positives by source, with 95 % intervals", plots.rates(summaries)),),
        ),
        Section("The paper's benchmarks", _known([tables.benchmarks(summaries, side) for side in SIDES])),
        Section("Against the other guard", _known([tables.against(compared) if compared else None])),
        Section(
            "Scores",
            _known(
                [
                    *(tables.thresholds(summaries, side) for side in SIDES),
                    *(tables.source_thresholds(one) for one in summaries.values()),
                ]
            ),
            _plots(outcomes, "Score curves, {side}; grey: sources with both classes", plots.score_curves),
        ),
        Section(
            "Calibration",
            (),
            _plots(outcomes, "Calibration of the {side} score over all rows; ECE over ten bins", plots.calibration),
        ),
        Section("Cost", (tables.costs(summaries),), _cost(outcomes)),
    ]


def _known(sheets: Sequence[tables.Sheet | None]) -> tuple[tables.Sheet, ...]:
    return tuple(sheet for sheet in sheets if sheet is not None)


def _plots(outcomes: plots.Models, caption: str, draw: Any) -> tuple[Plot, ...]:
    drawn = [(side, draw(outcomes, side)) for side in SIDES]
    return tuple(Plot(caption.format(side=side), address) for side, address in drawn if address is not None)


def _cost(outcomes: plots.Models) -> tuple[Plot, ...]:
    address = plots.costs(outcomes)
    return () if address is None else (Plot("Seconds and tokens per verdict", address),)


def mistakes(outcomes: Sequence[Outcome], mode: Mode) -> list[Mistakes]:
    """By source and side the ids of missed and of wrongly flagged rows, the worst first, at most ``SHOWN``."""
    out = []
    for (source, side), rows in groups(outcomes).items():
        for label, name in (("harmful", "missed"), ("unharmful", "wrongly flagged or without verdict")):
            wrong = [
                one for one in rows if one.label(side) == label and called(one, side, mode) is not (label == "harmful")
            ]
            if wrong:
                wrong.sort(key=lambda one: _distance(one, side), reverse=True)
                ids = ", ".join(one.id for one in wrong[:SHOWN])
                out.append(
                    Mistakes(f"{source} ({side}), {name}", len(wrong), ids + (", ..." if len(wrong) > SHOWN else ""))
                )
    return out


def _distance(one: Outcome, side: Side) -> float:
    score = one.score(side)
    return -1.0 if score is None else abs((one.label(side) == "harmful") - score)
