"""``guard-train card``."""

from __future__ import annotations

import argparse
from pathlib import Path

from guard_training.commands import subcommand

_ABOUT = """\
Writes the figures of `guard-train evaluate --json` into a model card (README.md in the model's folder), between
the lines `<!-- results:begin -->` and `<!-- results:end -->`. What --predictions of other models gave stands beside
the guard's, source by source.

  guard-train evaluate --data dev.jsonl.gz --model out/model --predictions tfidf=tfidf.jsonl --json dev.json
  guard-train card --model out/model --results dev.json
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    card = subcommand(commands, "card", "write results into a model card", _ABOUT)
    card.add_argument("--model", type=Path, required=True, metavar="DIR", help="the model's folder")
    card.add_argument("--results", type=Path, required=True, nargs="+", metavar="FILE", help="evaluate's JSON files")
    card.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    from guard_training.evaluation.card import write_results

    card = given.model / "README.md"
    write_results(card, given.results)
    print(f"{card}: the figures of {', '.join(file.name for file in given.results)}")
