"""``guard-train robustness``."""

from __future__ import annotations

import argparse
from pathlib import Path

from guard_training.commands import count, subcommand, terminal

_ABOUT = """\
Asks a guard about every row as it is and in other writings: drawn into an image, with invisible characters, with
look-alike letters, in base64, rot13 and leetspeak, translated, beside texts that imitate a verdict or order the
guard, and with 1, 2, 4 or 8 harmless texts around it. Prints recall and false positives for each, with 95 %
intervals and the paired change. A stopped run goes on from OUTPUT when the same command is given again.

  guard-train robustness --data dev.jsonl.gz --model nano --limit 50
  guard-train robustness --data dev.jsonl.gz --model nano --groups translation --translations dev.ko.jsonl

Translations are yours: one {"id", "language", "text"} per line, by the id of the row. OUTPUT gets answers.jsonl
(no text), images/ (drawn rows), report.json (also by source) and report.html.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from guard_training.evaluation.perturb import GROUPS

    command = subcommand(commands, "robustness", "measure a guard on rewritten, hidden and surrounded texts", _ABOUT)
    command.add_argument("--data", type=Path, required=True, metavar="FILE", help="labelled rows, .jsonl or .jsonl.gz")
    command.add_argument("--model", required=True, help="nano, a folder, or a hub id")
    command.add_argument("--limit", type=count, metavar="N", help="at most N rows of each source, drawn from the seed")
    command.add_argument(
        "--groups", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=f"of {', '.join(GROUPS)}"
    )
    command.add_argument("--side", choices=("request", "response"), default="request", help="which text is rewritten")
    command.add_argument("--translations", type=Path, metavar="FILE", help="JSONL of {id, language, text}")
    command.add_argument("--output", type=Path, default=Path("robustness"), metavar="DIR", help="default: robustness")
    command.add_argument("--concurrency", type=count, default=12, metavar="N", help="questions under way (default 12)")
    command.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:

    from guard_training.evaluation.robustness import measure_robustness

    measure_robustness(
        given.data,
        given.model,
        given.output,
        side=given.side,
        limit=given.limit,
        groups=given.groups,
        translations=given.translations,
        concurrency=given.concurrency,
        seed=given.seed,
        console=terminal(190),
    )
