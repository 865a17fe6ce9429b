"""How a guard holds up when the same words are written another way: drawn, hidden, encoded, translated, surrounded.

Every row that has a label and text is asked as it is and once per perturbation (``perturb``). Per perturbation:
recall on the harmful rows, false positives on the harmless ones, and the paired change against the same rows as they
are. A perturbation that does not fit a row (a text too long to draw, no translation given) leaves it out on both
sides. A guard error counts as wrong. Translations are read from a file of people's translations and never made here.

What is measured is the guard behind its worker; the gateway's own refusals (hidden characters, limits) come on top.

Answers are kept under the digest of what was asked and of the guard's revision (``measure``), without text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import Progress

from guard_training.corpus.rows import Row, Skipped, read_good_rows, sample
from guard_training.evaluation import plots
from guard_training.evaluation.curves import area_interval, curve
from guard_training.evaluation.measure import identity, measure
from guard_training.evaluation.outcomes import Outcome, Side
from guard_training.evaluation.perturb import GROUPS, PerturbError, Variant, read_translations, subjects, variants
from guard_training.evaluation.report import present
from guard_training.evaluation.stats import Rate, paired_change, rate_json
from guard_training.evaluation.tables import Sheet, cell

_PLAIN = "as it is"


def measure_robustness(
    data: Path,
    model: str,
    output: Path,
    *,
    side: Side = "request",
    limit: int | None = None,
    groups: Sequence[str] = GROUPS,
    translations: Path | None = None,
    concurrency: int = 12,
    seed: int = 0,
    console: Console,
) -> dict[str, Any]:
    """Asks about every row in every form, prints the table and returns the figures; goes on where it was killed.

    ``output`` gets ``answers.jsonl`` (no text), ``images/``, ``report.json`` and ``report.html``. Raises
    ``PerturbError``.
    """
    skipped = Skipped()
    rows = read_good_rows(data, skipped)
    words = read_translations(translations, skipped) if translations else {}
    chosen = sample(subjects(rows, side), limit, seed)
    if not chosen:
        raise PerturbError(f"{data}: no row has text and a label for its {side} without an image")
    name, revision = identity(model)
    ways = [
        Variant(_PLAIN, "", lambda row: row),
        *variants(rows, side, groups=groups, translations=words, images=output / "images", seed=seed),
    ]
    if len(ways) == 1:
        raise PerturbError(
            f"no way to rewrite a {side} in {', '.join(groups)}: typography is for requests, and translation needs "
            "--translations FILE with ids of the data"
        )
    with Progress(console=console) as progress:
        forms = [[_form(way, row) for row in chosen] for way in progress.track(ways, description="writing variants")]
    asked = [row for form in forms for row in form if row is not None]
    answers = iter(measure(asked, model, concurrency=concurrency, console=console, journal=output / "answers.jsonl"))
    said = [[None if row is None else next(answers) for row in form] for form in forms]
    report: dict[str, Any] = {
        "data": data.name,
        "model": name,
        "revision": revision,
        "side": side,
        "limit": limit,
        "seed": seed,
        "rows": len(chosen),
        "left_out": len(skipped.reasons),
        "variants": [_entry(way, chosen, said[0], form, side) for way, form in zip(ways, said, strict=True)],
    }
    figures = {name: {"sources": [{**one, "source": one["name"], "side": one["group"]} for one in report["variants"]]}}
    present(
        report,
        _sheet(report),
        lines=[
            f"{len(chosen)} rows; sources pooled here and apart in report.json; changes are against the same rows as "
            "they are"
        ],
        facts=[("Data", data.name), ("Rows", str(len(chosen))), ("Model", f"{name}, revision {revision}")],
        caption="Recall and false positives by perturbation, with 95 % intervals",
        draw=partial(plots.rates, figures),
        skipped=skipped,
        console=console,
        json_file=output / "report.json",
        page_file=output / "report.html",
    )
    return report


def _form(way: Variant, row: Row) -> Row | None:
    changed = way.change(row)
    return None if changed is None else dataclasses.replace(changed, id=f"{way.name}/{row.id}")


def _entry(
    way: Variant, rows: Sequence[Row], plain: Sequence[Outcome | None], said: Sequence[Outcome | None], side: Side
) -> dict[str, Any]:
    """One line of the table, and the same by source."""
    pairs = [
        (row, cast(Outcome, before), after)
        for row, before, after in zip(rows, plain, said, strict=True)
        if after is not None
    ]
    return {
        "name": way.name,
        "group": way.group,
        "rows": len(pairs),
        "errors": sum(after.error is not None for _, _, after in pairs),
        **_figures(pairs, side),
        "sources": [
            {"source": source, **_figures([pair for pair in pairs if pair[0].source == source], side)}
            for source in sorted({row.source for row, _, _ in pairs})
        ],
    }


def _figures(pairs: Sequence[tuple[Row, Outcome, Outcome]], side: Side) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, label in (("recall", "harmful"), ("false_positive_rate", "unharmful")):
        # An error is wrong either way: harm not found, or a harmless text not let through.
        hits = [
            (_hit(before, side, label), _hit(after, side, label))
            for row, before, after in pairs
            if (row.request if side == "request" else row.response_label) == label
        ]
        figures[name] = rate_json(Rate(sum(after for _, after in hits), len(hits)))
        figures[f"{name}_change"] = rate_json(paired_change([b for b, _ in hits], [a for _, a in hits]))
    return {**figures, "auc": _area(pairs, side)}


def _area(pairs: Sequence[tuple[Row, Outcome, Outcome]], side: Side) -> dict[str, Any] | None:
    """How well the scores still tell the two labels apart, whatever the threshold."""
    known = [
        ((row.request if side == "request" else row.response_label) == "harmful", score)
        for row, _, after in pairs
        if (score := after.score(side)) is not None
    ]
    truth, scores = [harmful for harmful, _ in known], [score for _, score in known]
    found = curve(truth, scores) if known else None
    interval = None if found is None else area_interval(truth, scores)
    return None if found is None else {"value": found.area, "interval": interval or (0.0, 1.0), "n": len(known)}


def _hit(said: Outcome, side: Side, label: str) -> bool:
    return said.called(side) == "harmful" if label == "harmful" else said.called(side) != "unharmful"


def _sheet(report: Mapping[str, Any]) -> Sheet:
    columns = (
        "perturbation", "group", "harmful", "recall", "change", "harmless", "false positives", "change", "area (ROC)",
        "errors",
    )  # fmt: skip
    rows = []
    for entry in report["variants"]:
        recall, alarms = entry["recall"], entry["false_positive_rate"]
        plain = entry["name"] == _PLAIN
        rows.append(
            (
                entry["name"],
                entry["group"],
                str(recall["n"] if recall else 0),
                cell(recall),
                "" if plain else cell(entry["recall_change"]),
                str(alarms["n"] if alarms else 0),
                cell(alarms),
                "" if plain else cell(entry["false_positive_rate_change"]),
                cell(entry["auc"]),
                str(entry["errors"] or "-"),
            )
        )
    title = f"{report['model']} {report['revision']}: {report['side']}s, per cent with 95 % intervals"
    return Sheet(title, columns, tuple(rows), left=2)
