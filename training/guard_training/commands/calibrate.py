"""``guard-train calibrate``."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard_training.commands import count, subcommand, terminal

if TYPE_CHECKING:
    from guard_middleware.worker.weights import ModelFacts
    from guard_training.corpus.rows import Row, Skipped
    from guard_training.evaluation.outcomes import Outcome

_ABOUT = """\
Fits a temperature to a guard's scores on rows that it was not trained on, for requests and responses, with reasoning
and without, and writes calibration.json; beside the weights, the worker applies it to every score. The order of scores
stays, and so does every label with reasoning; what changes is how far from 0 and 1 scores are, so that a threshold, and
the range in which the mode `hybrid` thinks, mean the same for every mode and guard. Scores without reasoning are also
shifted to where those with it stand.

  guard-train calibrate --model out/model --data train.jsonl.gz --against dev.jsonl.gz \\
      --output out/model/calibration.json --report calibration.html

Of --data it takes the rows that `guard-train nano` and `update` hold back from training (3 in 100, by the digest of
their ids). --every-row takes all of a file that no training has seen. A file that is named as one to measure on (dev,
test, eval, golden, benchmark) is refused: figures of rows that the scores were fitted to are worth nothing. For the
same reason name every evaluation set with --against: a row that one of them holds too is left out.

A killed run goes on from its journal (beside --output) when the same command is given again.
"""
_MEASURED_ON = re.compile(r"(^|[^a-z])(dev|test|eval|evaluation|golden|benchmark|validation)([^a-z]|$)", re.IGNORECASE)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = subcommand(commands, "calibrate", "calibrate a guard's scores", _ABOUT)
    option = command.add_argument
    option("--model", type=Path, required=True, metavar="DIR", help="the guard's folder")
    option("--data", type=Path, required=True, nargs="+", metavar="FILE", help="labelled rows")
    option(
        "--against", type=Path, nargs="+", default=[], metavar="FILE", help="evaluation sets, to leave out their rows"
    )
    option("--output", type=Path, required=True, metavar="FILE", help="where to write, such as DIR/calibration.json")
    option("--every-row", action="store_true", help="all rows of --data: the guard was trained on none of them")
    option("--limit", type=count, default=200, metavar="N", help="at most N rows of each source (default 200)")
    option("--report", type=Path, metavar="FILE", help="also write an HTML page with reliability plots")
    option("--concurrency", type=count, default=12, metavar="N", help="questions under way (default 12)")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    from guard_middleware.worker.weights import load
    from guard_training.corpus.rows import Skipped
    from guard_training.evaluation.measure import measure
    from guard_training.evaluation.tables import Sheet
    from guard_training.rowfile import write_json
    from guard_training.update.calibration import calibration, kinds

    console = terminal(150)
    skipped = Skipped()
    rows = _rows(given, skipped)
    facts = load(given.model, name=given.model.resolve().name).facts
    outcomes: dict[str, list[Outcome]] = {}
    journal = given.output.with_name(f"{given.output.name}.journal")
    for kind, judging in kinds(facts).items():
        console.print(f"mode {kind}: {len(rows)} rows")
        outcomes[kind] = measure(
            rows,
            str(given.model),
            concurrency=given.concurrency,
            console=console,
            journal=journal,
            judging=judging,
            calibrated=False,
        )
    if "label" not in outcomes:
        console.print(f"{facts.name} has no form without reasoning; its label scores are not calibrated", markup=False)
    found = calibration(facts.revision, **outcomes)
    columns = (
        "mode",
        "side",
        "rows",
        "harmful",
        "shift",
        "temperature",
        "ECE before",
        "after",
        "Brier before",
        "after",
    )
    sheet = Sheet(f"Calibration of {facts.name} {facts.revision}", columns, tuple(_lines(found)), left=2)
    console.print(sheet.rich())
    skipped.tell(console)
    write_json(given.output, found)
    if given.report:
        _report(given, facts, found, outcomes, sheet, skipped)
    journal.unlink(missing_ok=True)


def _rows(given: argparse.Namespace, skipped: Skipped) -> list[Row]:
    from guard_training.corpus.conversation import usable
    from guard_training.corpus.leakage import Fingerprints, readable
    from guard_training.corpus.rows import held_out, read_good_rows, sample
    from guard_training.evaluation.against import evaluation_sets
    from guard_training.update.lessons import HELD_BACK, without_leaks

    for path in given.data:
        if _MEASURED_ON.search(path.name):
            raise ValueError(f"{path}: named as a file to measure on; calibrate on held-back training rows")
    rows = [row for path in given.data for row in read_good_rows(path, skipped)]
    kept = [row for row in rows if given.every_row or held_out(row.id, HELD_BACK)]
    if not kept:
        raise ValueError(f"none of the {len(rows)} rows is held back; --every-row takes them all")
    prints = Fingerprints()
    against = evaluation_sets(given.against, prints, skipped)
    kept = without_leaks(usable(readable(kept, prints, skipped), skipped), against, skipped, fingerprints=prints)
    if not kept:
        raise ValueError(f"no row is left to calibrate on; {skipped.summary()}")
    return sample(kept, given.limit)


def _lines(found: dict[str, Any]) -> list[tuple[str, ...]]:
    from guard_middleware.worker.calibration import KINDS, SIDES

    lines = []
    for kind, side in ((kind, side) for kind in KINDS if kind in found for side in SIDES):
        one = found[kind][side]
        if one is None:
            lines.append((kind, side, "too few", *[""] * 7))
            continue
        counts = (str(one["rows"]), str(one["harmful"]), f"{one['shift']:.2f}", f"{one['temperature']:.2f}")
        before = [f"{value:.3f}" for value in (*one["calibration_error"], *one["brier"])]
        lines.append((kind, side, *counts, *before))
    return lines


def _report(
    given: argparse.Namespace,
    facts: ModelFacts,
    found: dict[str, Any],
    outcomes: dict[str, list[Outcome]],
    sheet: Any,
    skipped: Skipped,
) -> None:
    from guard_training.evaluation import plots
    from guard_training.evaluation.outcomes import SIDES
    from guard_training.evaluation.report import Plot, Section, page, write_report
    from guard_training.rowfile import digest
    from guard_training.update.calibration import calibrated

    sections = [Section("Figures", (sheet,))]
    for kind, given_scores in outcomes.items():
        both = {"before": given_scores, "calibrated": calibrated(given_scores, found[kind])}
        drawn = [(side, plots.calibration(both, side)) for side in SIDES]
        shown = tuple(Plot(f"Reliability of the {side} score", address) for side, address in drawn if address)
        sections.append(Section(f"Mode {kind}", (), shown))
    about = [("Model", f"{facts.name}, revision {facts.revision}")]
    about += [("Data", f"{path.name} (SHA-256 {digest(path)[:16]})") for path in given.data]
    rows = "every row" if given.every_row else "rows held back from training"
    about += [("Rows", f"{rows}, at most {given.limit} of a source")]
    write_report(
        given.report,
        page(f"Calibration of {facts.name}", sections, facts=about, skipped=skipped.summary(shown=50)),
    )
