"""``guard-train nano``."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from guard_training.commands import count, subcommand, terminal

_ABOUT = """\
Makes nano, the small guard, from labelled data: draws typographic images and reads them, trains a tokenizer,
writes the reasoning with the deterministic teacher, and trains a Qwen2.5-VL-architecture model from scratch
with TRL's SFTTrainer. A stopped run goes on from its last checkpoint when the same command is given again, and is
refused where recipe, data or bank are others by then.

  guard-train nano --data shared/data --output out --against shared/data/dev.jsonl.gz
  guard-train evaluate --data shared/data/dev.jsonl.gz --model out/model --json dev.json
  guard-train card --model out/model --results dev.json
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    nano = subcommand(commands, "nano", "make nano from labelled data", _ABOUT)
    nano.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the labelled data")
    nano.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the run")
    nano.add_argument("--recipe", type=Path, metavar="FILE", help="constants of the run (default: the recipe of nano)")
    nano.add_argument(
        "--rationales",
        type=Path,
        metavar="FILE",
        help="a real teacher's, {id, reasoning} a line or what synthesize wrote; for rows shown unchanged",
    )
    nano.add_argument(
        "--wordnet",
        type=Path,
        default=Path("/usr/share/wordnet"),
        metavar="DIR",
        help="folder of WordNet's data files (default: where Debian's wordnet-base puts them)",
    )
    nano.add_argument(
        "--against",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="evaluation sets: training rows that one of them holds too are left out",
    )
    nano.add_argument("--stop-after", type=count, metavar="N", help="end after N steps of the schedule, to look early")
    nano.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    from guard_middleware.guard.reader import Reader
    from guard_training.corpus.rows import Skipped
    from guard_training.nano.pipeline import train_nano
    from guard_training.nano.recipe import default_recipe, read_recipe
    from guard_training.nano.teacher import read_rationales

    logging.getLogger("httpx").setLevel(logging.WARNING)
    recipe = read_recipe(given.recipe or default_recipe())
    skipped = Skipped()
    rationales = read_rationales(given.rationales, skipped) if given.rationales else {}
    folder = train_nano(
        given.data,
        given.output,
        recipe,
        Reader().read,
        rationales=rationales,
        skipped=skipped,
        wordnet=given.wordnet,
        against=given.against,
        stop_after=given.stop_after,
    )
    console = terminal()
    skipped.tell(console)
    console.print(str(folder), markup=False, highlight=False, soft_wrap=True)
