"""``guard-train``: makes guards and measures them."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from guard_training.corpus.rows import CorpusError
from guard_training.nano.recipe import RecipeError

#: Columns of a table that goes to a file or a pipe.
_WIDTH = 150

_NANO = """\
Makes nano, the small guard, from labelled data: draws typographic images and reads them, trains a tokenizer,
writes the reasoning with the deterministic teacher, and trains a Qwen2.5-VL-architecture model from scratch
with TRL's SFTTrainer. A stopped run goes on from its last checkpoint when the same command is given again.

  guard-train nano --data shared/data --output out
  guard-train evaluate --data shared/data/dev.jsonl.gz --model out/model --json dev.json
  guard-train card --model out/model --results dev.json
"""
_EVALUATE = """\
Starts the guard's worker, asks it about every row over its socket, and prints per source: recall, false
positives, precision and F1, each with its 95 % interval. A guard error counts as wrong.

  guard-train evaluate --data dev.jsonl.gz --model nano --limit 200 --json dev.json

Row: {"id", "source", "prompt", "prompt_label"} and optionally "response", "response_label", "image" (a path
relative to the data file). Labels are "harmful", "unharmful" or null.
"""
_CARD = """\
Writes the figures of `guard-train evaluate --json` into a model card (README.md in the model's folder), between
the lines `<!-- results:begin -->` and `<!-- results:end -->`.
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="guard-train", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    raw = argparse.RawDescriptionHelpFormatter

    nano = commands.add_parser("nano", help="make nano from labelled data", description=_NANO, formatter_class=raw)
    nano.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the labelled data")
    nano.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the run")
    nano.add_argument("--recipe", type=Path, metavar="FILE", help="constants of the run (default: the recipe of nano)")
    nano.add_argument(
        "--rationales", type=Path, metavar="FILE", help="JSONL of a real teacher's {id, reasoning}, used where given"
    )
    nano.add_argument("--stop-after", type=int, metavar="N", help="end after N steps of the schedule, to look early")
    nano.set_defaults(run=_nano)

    evaluate = commands.add_parser("evaluate", help="measure a guard", description=_EVALUATE, formatter_class=raw)
    evaluate.add_argument("--data", type=Path, required=True, metavar="FILE", help="labelled rows, .jsonl or .jsonl.gz")
    evaluate.add_argument("--model", required=True, help="nano, a folder, or a hub id")
    evaluate.add_argument(
        "--limit", type=int, metavar="N", help="at most N rows of each source, drawn from a fixed seed"
    )
    evaluate.add_argument("--concurrency", type=int, default=12, metavar="N", help="questions under way (default 12)")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    evaluate.set_defaults(run=_evaluate)

    card = commands.add_parser("card", help="write results into a model card", description=_CARD, formatter_class=raw)
    card.add_argument("--model", type=Path, required=True, metavar="DIR", help="the model's folder")
    card.add_argument("--results", type=Path, required=True, nargs="+", metavar="FILE", help="evaluate's JSON files")
    card.set_defaults(run=_card)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 done, 1 an input that cannot be used, 2 a wrong command line."""
    given = parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = given.run
    try:
        run(given)
    except (CorpusError, RecipeError, FileNotFoundError, ValueError) as error:
        print(f"guard-train: {error}", file=sys.stderr)
        return 1
    return 0


def _nano(given: argparse.Namespace) -> None:
    from guard_middleware.guard.reader import Reader
    from guard_training.nano.pipeline import train_nano
    from guard_training.nano.recipe import default_recipe, read_recipe
    from guard_training.nano.teacher import read_rationales

    logging.getLogger("httpx").setLevel(logging.WARNING)
    recipe = read_recipe(given.recipe or default_recipe())
    rationales = read_rationales(given.rationales) if given.rationales else {}
    folder = train_nano(
        given.data, given.output, recipe, Reader().read, rationales=rationales, stop_after=given.stop_after
    )
    print(folder)


def _evaluate(given: argparse.Namespace) -> None:
    from guard_training.evaluation.measure import WorkerFailed, evaluate, write_json

    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    try:
        summary = evaluate(given.data, given.model, limit=given.limit, concurrency=given.concurrency, console=console)
    except WorkerFailed as error:
        raise ValueError(str(error)) from None
    if given.json:
        write_json(summary, given.json)


def _card(given: argparse.Namespace) -> None:
    from guard_training.evaluation.card import write_results

    write_results(given.model / "README.md", given.results)
