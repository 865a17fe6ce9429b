"""The tables of an evaluation, made once for terminal, card and report: each a ``Sheet`` of text cells.

All figures are per cent; an interval is the 95 % one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from guard_training.evaluation.published import TOKENS

Summary = Mapping[str, Any]

COLUMNS = ("source", "judged", "rows", "harmful", "recall", "false positives", "precision", "F1", "no verdict")


@dataclass(frozen=True, slots=True)
class Sheet:
    """``left`` is how many columns are words; the others are figures. A rule stands above the last ``totals`` rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    left: int = 1
    totals: int = 0

    def rich(self) -> Table:
        table = Table(title=escape(self.title), caption=escape(self.note) or None, caption_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(escape(column), justify="left" if number < self.left else "right")
        for number, row in enumerate(self.rows, 1):
            table.add_row(*map(escape, row), end_section=number == len(self.rows) - self.totals)
        return table

    def markdown(self) -> str:
        rule = "|" + "".join("---|" if number < self.left else "---:|" for number in range(len(self.columns)))
        return "\n".join([_line(self.columns), rule, *map(_line, self.rows)])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def cell(rate: Mapping[str, Any] | None) -> str:
    """``62.1 (55.9-67.9)`` in per cent, or a dash."""
    if rate is None or rate["value"] is None:
        return "-"
    low, high = rate["interval"]
    return f"{100 * rate['value']:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the table of sources."""
    rates = (entry["recall"], entry["false_positive_rate"], entry["precision"], entry["f1"])
    lost = str(entry["errors"]) if entry["errors"] else "-"
    counts = (str(entry["rows"]), str(entry["harmful"]))
    return (entry["source"], entry["side"], *counts, *(cell(rate) for rate in rates), lost)


def sources(summary: Summary) -> Sheet:
    """Every source and side of one model, and the means."""
    means = summary["means"]
    mean = ("mean over sources", "", "", "", cell(means["recall"]), cell(means["false_positive_rate"]), "-")
    title = f"{summary['model']} {summary['revision'] or ''}: per cent, with 95 % intervals, {summary['mode']} mode"
    formless = sum(entry["format_errors"] for entry in summary["sources"])
    note = f"no verdict counts as wrong; failures of format among them: {formless}" if summary["errors"] else ""
    rows = (*(cells(entry) for entry in summary["sources"]), (*mean, cell(means["f1"]), "-"))
    return Sheet(title, COLUMNS, rows, note, left=2)


def models(summaries: Mapping[str, Summary]) -> Sheet:
    """Recall, false positives and F1 of several models side by side."""
    known = {name: {(e["source"], e["side"]): e for e in one["sources"]} for name, one in summaries.items()}
    keys = list(dict.fromkeys(key for entries in known.values() for key in entries))
    rows = [(*key, *(_triple(known[name].get(key)) for name in summaries)) for key in keys]
    rows.append(("mean over sources", "", *(_triple(one["means"]) for one in summaries.values())))
    columns = ("source", "judged", *summaries)
    return Sheet("recall / false positives / F1, per cent", columns, tuple(rows), left=2)


def _triple(entry: Mapping[str, Any] | None) -> str:
    found = [entry and entry[name] for name in ("recall", "false_positive_rate", "f1")]
    return " / ".join("-" if one is None else f"{100 * one['value']:.1f}" for one in found)


def thresholds(summaries: Mapping[str, Summary], side: str) -> Sheet | None:
    """Recall of every model at fixed false-positive rates; both are means over the sources. None without scores."""
    scored = {name: one["scores"][side] for name, one in summaries.items() if one["scores"].get(side)}
    scored = {name: one for name, one in scored.items() if "thresholds" in one}
    if not scored:
        return None
    rates = [point["rate"] for point in next(iter(scored.values()))["thresholds"]]
    rows = [
        (
            name,
            *(f"{100 * one[key]:.1f}" for key in ("auc", "average_precision", "calibration_error")),
            *(f"{100 * point['recall']:.1f} (at {_threshold(point)})" for point in one["thresholds"]),
            str(one["without"] or "-"),
        )
        for name, one in scored.items()
    ]
    columns = ("model", "ROC area", "avg. precision", "ECE", *(f"FPR {rate:.0%}" for rate in rates), "no score")
    return Sheet(f"{side} scores: recall at fixed false positives, every source weighs the same", columns, tuple(rows))


def source_thresholds(summary: Summary) -> Sheet | None:
    """The same within each source that has both classes."""
    found = [(e, e["scores"]) for e in summary["sources"] if e["scores"] and "thresholds" in e["scores"]]
    if not found:
        return None
    rates = [point["rate"] for point in found[0][1]["thresholds"]]
    rows = [
        (
            entry["source"],
            entry["side"],
            str(scores["rows"]),
            cell(scores["auc"]) if scores["auc"]["interval"] else f"{100 * scores['auc']['value']:.1f}",
            *(f"{100 * scores[key]:.1f}" for key in ("average_precision", "calibration_error")),
            *(f"{100 * point['recall']:.1f} (at {_threshold(point)})" for point in scores["thresholds"]),
        )
        for entry, scores in found
    ]
    columns = ("source", "judged", "rows", "ROC area", "avg. precision", "ECE", *(f"FPR {rate:.0%}" for rate in rates))
    return Sheet("recall at fixed false positives, threshold set within the source", columns, tuple(rows), left=2)


def _threshold(point: Mapping[str, Any]) -> str:
    return "none" if point["threshold"] is None else f"{point['threshold']:.3f}"


def benchmarks(summaries: Mapping[str, Summary], side: str) -> Sheet | None:
    """F1 on the paper's benchmarks, ours above and the paper's below. None where nobody was asked about any."""
    ours = {name: one["benchmarks"][side] for name, one in summaries.items() if side in (one.get("benchmarks") or {})}
    if not ours:
        return None
    first = next(iter(ours.values()))
    names = {entry["name"]: entry["title"] for entry in first["benchmarks"]}
    averages = {key: f"{key} average" for key in first["averages"]}
    partial = [title for key, title in averages.items() if not first["averages"][key]["complete"]]
    short = [e["title"] for e in first["benchmarks"] if e["rows"] != e["published_rows"]]
    rows = [_ours(name, one, averages) for name, one in ours.items()]
    for model, figures in first["published"].items():
        found = ("-" if figures.get(key) is None else f"{figures[key]:.2f}" for key in (*names, *averages))
        rows.append((f"{model} (paper)", *found))
    note = "averages are weighed by the number of labels."
    note += (
        f" Not all benchmarks were given: {', '.join(partial)} cannot be held against the paper's." if partial else ""
    )
    note += f" Another number of rows than the paper's: {', '.join(short)}." if short else ""
    if any(summaries[name]["mode"] == "strict" for name in ours):
        note += " Read strictly: an output of another form is wrong, in which the paper's rules look for a label."
    return Sheet(f"F1 of harmful {side}s, per cent", ("model", *names.values(), *averages.values()), tuple(rows), note)


def _ours(name: str, one: Mapping[str, Any], averages: Iterable[str]) -> tuple[str, ...]:
    found = [*one["benchmarks"], *(one["averages"][key] for key in averages)]
    return (name, *(f"{e['f1']:.2f} ({e['interval'][0]:.1f}-{e['interval'][1]:.1f})" for e in found))


def against(compared: Mapping[str, Any]) -> Sheet:
    """Ours minus theirs on the same rows."""
    names = ("recall", "false_positive_rate", "f1", "accuracy")
    rows = [
        (
            entry["source"],
            entry["side"],
            str(entry["rows"]),
            *(_change(entry[name]) for name in names),
            f"{entry['only_ours']} / {entry['only_theirs']}",
            f"{entry['p']:.3f}",
        )
        for entry in compared["sources"]
    ]
    means = compared["means"]
    rows.append(("mean over sources", "", str(compared["rows"]), *(_change(means.get(name)) for name in names), "", ""))
    columns = (
        "source",
        "judged",
        "rows",
        "recall",
        "false positives",
        "F1",
        "accuracy",
        "only ours right / theirs",
        "p",
    )
    title = f"{compared['ours']} minus {compared['theirs']}: points, with paired bootstrap intervals"
    return Sheet(title, columns, tuple(rows), "p: McNemar's exact test", left=2)


def _change(one: Mapping[str, Any] | None) -> str:
    if one is None or one["interval"] is None:
        return "-"
    low, high = one["interval"]
    return f"{100 * one['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def costs(summaries: Mapping[str, Summary]) -> Sheet:
    """Tokens and seconds per verdict; the paper's mean tokens where its benchmarks were asked about."""
    kinds = ("prompt", "completion", "reasoning")
    rows = [
        (
            name,
            *(_tokens(one["tokens"][kind]) for kind in kinds),
            _seconds(one["seconds"]),
            cell(one["format_compliance"]),
        )
        for name, one in summaries.items()
    ]
    if any(one.get("benchmarks") for one in summaries.values()):
        rows += [(f"{model} (paper)", "-", f"{mean:.1f} / - / -", "-", "-", "-") for model, mean in TOKENS.items()]
    columns = ("model", *(f"{kind} tokens" for kind in kinds), "seconds p50 / p95", "format compliance")
    return Sheet("tokens (mean / p50 / p95), seconds under load, format", columns, tuple(rows))


def _tokens(one: Mapping[str, Any] | None) -> str:
    return "-" if one is None else f"{one['mean']:.1f} / {one['median']} / {one['p95']}"


def _seconds(one: Mapping[str, Any]) -> str:
    return "-" if one["median"] is None else f"{one['median']:.2f} / {one['p95']:.2f}"


def all_sheets(summaries: Mapping[str, Summary], compared: Mapping[str, Any] | None) -> list[Sheet]:
    """What the terminal shows: the first model's sources, then everything that there is to compare."""
    sheets: Sequence[Sheet | None] = [
        sources(next(iter(summaries.values()))),
        models(summaries) if len(summaries) > 1 else None,
        *(benchmarks(summaries, side) for side in ("request", "response")),
        *(thresholds(summaries, side) for side in ("request", "response")),
        against(compared) if compared else None,
        costs(summaries),
    ]
    return [sheet for sheet in sheets if sheet is not None]
