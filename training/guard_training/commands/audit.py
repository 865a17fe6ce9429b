"""``guard-train audit``."""

from __future__ import annotations

import argparse
from pathlib import Path

from guard_training.commands import count, subcommand, terminal

_ABOUT = """\
Asks whether a guard's reasoning bears on its verdict. Every row is judged once as it is served; then the label is
read again after the reasoning as written, that of another row, its first half, none, and that of a row with the
opposite verdict. Prints how often the verdict changes, how often the steps' conclusion contradicts it, how many
steps there are and how many quote the input, with 95 % intervals. The guard runs in this process, on the GPU where
there is one. A stopped run goes on from OUTPUT when the same command is given again.

  guard-train audit --data dev.jsonl.gz --model nano --limit 30

OUTPUT gets answers.jsonl, which holds the guard's reasoning and so quotes the data, and report.json and
report.html (figures only).
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = subcommand(commands, "audit", "does the reasoning bear on the verdict?", _ABOUT)
    command.add_argument("--data", type=Path, required=True, metavar="FILE", help="rows, .jsonl or .jsonl.gz")
    command.add_argument("--model", required=True, help="nano, a folder, or a hub id")
    command.add_argument("--limit", type=count, metavar="N", help="at most N rows of each source, drawn from the seed")
    command.add_argument("--output", type=Path, default=Path("audit"), metavar="DIR", help="default: audit")
    command.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:

    from guard_training.evaluation.audit import audit

    console = terminal(160)
    audit(given.data, given.model, given.output, limit=given.limit, seed=given.seed, console=console)
