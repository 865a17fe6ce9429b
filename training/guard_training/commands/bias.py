"""``guard-train bias``."""

from __future__ import annotations

import argparse
from pathlib import Path

from guard_training.commands import subcommand, terminal

_ABOUT = """\
Compares a guard's verdicts with the labels of its data and with those of its teacher: how often each is right, how
well they agree, and how many of the guard's errors are its teacher's. Prints one line per source and side, with 95 %
intervals.

  guard-train evaluate --data dev.jsonl.gz --model nano --outcomes nano.jsonl
  guard-train bias --outcomes nano.jsonl --teacher teacher.jsonl --json bias.json

TEACHER holds one {"id", "request", "response"} per line, labels "harmful", "unharmful" or null, ids of the data's
rows; rows of data ("prompt_label", "response_label") and outcomes of the teacher as a guard will do too.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = subcommand(commands, "bias", "compare a guard's errors with its teacher's", _ABOUT)
    command.add_argument("--outcomes", type=Path, required=True, metavar="FILE", help="what evaluate wrote")
    command.add_argument("--teacher", type=Path, required=True, metavar="FILE", help="JSONL of the teacher's labels")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    command.add_argument(
        "--report", type=Path, metavar="FILE", help="also write an HTML page with the table and a plot"
    )
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:

    from guard_training.evaluation.bias import report_bias

    console = terminal(190)
    report_bias(given.outcomes, given.teacher, json_file=given.json, page=given.report, console=console)
