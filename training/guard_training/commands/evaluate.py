"""``guard-train evaluate``."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from guard_training.commands import count, subcommand, terminal

if TYPE_CHECKING:
    from guard_training.corpus.rows import Row, Skipped
    from guard_training.evaluation.outcomes import Outcome

_ABOUT = """\
Starts the guard's worker, asks it about every row over its socket, and prints per source: recall, false positives,
precision and F1, each with its 95 % interval; then recall at fixed false-positive rates where the guard gives scores,
tokens and seconds. A guard error counts as wrong. A killed run goes on from its journal (beside the first of
--outcomes, --json, --report) when the same command is given again.

  guard-train evaluate --data dev.jsonl.gz --model nano --limit 200 --json dev.json --report dev.html

Row: {"id", "source", "prompt", "prompt_label"} and optionally "response", "response_label", "image" (a path
relative to the data file). Labels are "harmful", "unharmful" or null.

FigStep on its seven harmful topics, as others report it: --leave-out takes categories of rows.

  guard-train evaluate --data dev.jsonl.gz --model nano \\
      --leave-out "Financial Advice" "Health Consultation" "Legal Opinion"

The 14 benchmarks of GuardReasoner-VL, as its authors released them, beside the paper's figures:

  guard-train evaluate --benchmark data/benchmark --images yueliu1999/GuardReasoner-VLTest \\
      --model yueliu1999/GuardReasoner-VL-Eco-3B --report eco.html

Another guard or a baseline on the same rows. Predictions are lines of {"id", "request_score", "response_score"}, of
{"id", "request", "response"}, or of {"id", "output"} with a reasoning guard's whole text:

  guard-train evaluate --data dev.jsonl.gz --model out/model --outcomes new.jsonl \\
      --against old.jsonl --predictions tfidf=tfidf.jsonl --report new.html

Modes: strict (default) takes one verdict in the one form, anything else is wrong and counted. paper follows the
released evaluation: the first label anywhere, None is unharmful, no label is the opposite of the truth, and unharmful
for a response of SPA-VL-Eval. It needs whole outputs, which a worker does not give away: it is refused with --model,
and reads a file of {"id", "output"} that another program wrote (ids are those of --outcomes):

  guard-train evaluate --benchmark data/benchmark --predictions eco=outputs.jsonl --mode paper --report paper.html
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = subcommand(commands, "evaluate", "measure a guard", _ABOUT)
    option = command.add_argument
    option("--data", type=Path, metavar="FILE", help="labelled rows, .jsonl or .jsonl.gz")
    option(
        "--benchmark",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a released benchmark, or a folder of them; repeat for more",
    )
    option(
        "--images", metavar="WHERE", help="pictures of the benchmarks: a folder or a hub id (default: beside the files)"
    )
    option(
        "--model",
        help="nano, a folder, a hub id, or unix:SOCKET of a worker that runs (docs/guards.md); not needed where "
        "--predictions says it all",
    )
    option(
        "--predictions", action="append", default=[], metavar="NAME=FILE", help="another model's answers; repeatable"
    )
    option(
        "--against",
        type=Path,
        metavar="FILE",
        help="outcomes (or evaluate's JSON) of another guard: paired differences",
    )
    option("--mode", choices=("strict", "paper"), default="strict", help="how outputs are read and counted")
    option("--limit", type=count, metavar="N", help="at most N rows of each source, drawn from a fixed seed")
    option("--leave-out", nargs="+", default=[], metavar="CATEGORY", help="no rows of these categories")
    option("--concurrency", type=count, default=12, metavar="N", help="questions under way (default 12)")
    option("--json", type=Path, metavar="FILE", help="also write the figures here")
    option("--outcomes", type=Path, metavar="FILE", help="also write what was said about each row, without its text")
    option("--report", type=Path, metavar="FILE", help="also write an HTML page with tables and plots")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    from guard_training.corpus.rows import Skipped
    from guard_training.evaluation import tables
    from guard_training.evaluation.metrics import compare
    from guard_training.evaluation.outcomes import read_outcomes, write_outcomes
    from guard_training.evaluation.report import render, write_report
    from guard_training.rowfile import write_json

    console = terminal(200)
    skipped = Skipped()
    other = read_outcomes(_outcomes_of(given.against), skipped) if given.against else None
    rows = _rows(given, skipped)
    outcomes = _answers(given, rows, skipped, console)
    summaries = {name: _summary(name, found, given) for name, found in outcomes.items()}
    first = next(iter(outcomes))

    compared = None
    if other is not None:
        # two models of one name are told apart by their revisions
        theirs = f"{other[0].model} {other[0].revision}".strip()
        ours = f"{first} {summaries[first]['revision'] or ''}".strip()
        compared = {"ours": ours, "theirs": theirs, **compare(outcomes[first], other, mode=given.mode)}
    for sheet in tables.all_sheets(summaries, compared):
        console.print(sheet.rich())
    skipped.tell(console)

    if given.outcomes:
        write_outcomes(given.outcomes, outcomes[first])
    if given.json:
        others = {name: one for name, one in summaries.items() if name != first}
        where = os.path.relpath(given.outcomes, given.json.parent) if given.outcomes else None
        extra = {"others": others, "against": compared, "outcomes": where, "left_out": len(skipped.reasons)}
        write_json(given.json, {"data": _named(given), "limit": given.limit, **summaries[first], **extra})
    if given.report:
        facts, left_out = _facts(given, summaries[first]), skipped.summary(shown=50)
        page = render(summaries, outcomes, facts=facts, mode=given.mode, compared=compared, skipped=left_out)
        write_report(given.report, page)
    journal = _journal(given)
    if journal:
        journal.unlink(missing_ok=True)


def _rows(given: argparse.Namespace, skipped: Skipped) -> list[Row]:
    from guard_training.corpus.conversation import usable
    from guard_training.corpus.rows import read_good_rows, sample
    from guard_training.evaluation.benchmarks import fetch_images, find, read_benchmark

    if not given.data and not given.benchmark:
        raise ValueError("nothing to ask about; give --data FILE or --benchmark NAME=FILE")
    rows = read_good_rows(given.data, skipped) if given.data else []
    wanted = find(given.benchmark)
    images = None
    if given.images and any(benchmark.hub_label is not None for benchmark, _ in wanted):
        images = Path(given.images) if Path(given.images).is_dir() else fetch_images(given.images)
    for benchmark, file in wanted:
        rows += read_benchmark(benchmark, file, skipped, images=images)
    unknown = sorted(set(given.leave_out) - {row.category for row in rows})
    if unknown:
        raise ValueError(f"--leave-out: no row is of the category {', '.join(unknown)}")
    rows = sample(usable([row for row in rows if row.category not in given.leave_out], skipped), given.limit)
    if not rows:
        raise ValueError(f"no usable row; {skipped.summary()}")
    return rows


def _answers(
    given: argparse.Namespace, rows: list[Row], skipped: Skipped, console: Console
) -> dict[str, list[Outcome]]:
    """Outcomes by model; the one that was asked comes first."""
    from guard_training.evaluation.measure import measure
    from guard_training.evaluation.predictions import read_predictions

    if not given.model and not given.predictions:
        raise ValueError("nobody to ask; give --model, or --predictions NAME=FILE")
    if given.model and given.mode == "paper":
        raise ValueError(
            "--mode paper reads whole outputs, and a worker gives verdicts, read strictly; leave --mode out (another "
            'form is then wrong), or give the outputs as --predictions NAME=FILE of {"id", "output"}, without --model'
        )
    named = [one.partition("=") for one in given.predictions]
    if any(not (name and file) for name, _, file in named):
        raise ValueError("--predictions takes NAME=FILE")
    # read before the guard is asked, which may take hours
    answers = {name: read_predictions(Path(file), name, rows, given.mode, skipped) for name, _, file in named}
    if len(answers) < len(named):
        raise ValueError("two --predictions of one name; give each its own")
    if not given.model:
        return answers
    asked = measure(rows, given.model, concurrency=given.concurrency, console=console, journal=_journal(given))
    name = asked[0].model
    return {name if name not in answers else f"{name} {asked[0].revision}": asked, **answers}


def _summary(name: str, outcomes: list[Outcome], given: argparse.Namespace) -> dict[str, Any]:
    from guard_training.evaluation.benchmarks import paper_table
    from guard_training.evaluation.metrics import summarise

    figures = summarise(outcomes, model=name, revision=outcomes[0].revision or None, mode=given.mode)
    return {**figures, "benchmarks": paper_table(outcomes, given.mode)}


def _journal(given: argparse.Namespace) -> Path | None:
    for path in (given.outcomes, given.json, given.report):
        if path:
            beside: Path = path.with_name(f"{path.name}.journal")
            return beside
    return None


def _outcomes_of(path: Path) -> Path:
    """The file itself, or the one that evaluate's JSON names."""
    if path.suffix != ".json":
        return path
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["outcomes"]
    except (ValueError, KeyError, TypeError):
        named = None
    if not named:
        raise ValueError(
            f"{path}: names no outcomes; write them with `guard-train evaluate --outcomes FILE --json ...`"
        )
    return path.parent / named


def _named(given: argparse.Namespace) -> str:
    files = [*([given.data.name] if given.data else []), *(one.rpartition("/")[2] for one in given.benchmark)]
    return ", ".join(files) + (f" without {', '.join(given.leave_out)}" if given.leave_out else "")


def _facts(given: argparse.Namespace, summary: dict[str, Any]) -> list[tuple[str, str]]:
    digest = hashlib.sha256(given.data.read_bytes()).hexdigest()[:16] if given.data else None
    return [
        ("Data", _named(given) + (f" (SHA-256 {digest})" if digest else "")),
        ("Rows", f"{summary['rows']}" + (f", at most {given.limit} of a source" if given.limit else "")),
        ("Model", f"{summary['model']}, revision {summary['revision'] or 'not named'}"),
        ("Mode", given.mode),
        ("Made", datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")),
    ]
