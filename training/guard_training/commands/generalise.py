"""``guard-train generalise``."""

from __future__ import annotations

import argparse
from pathlib import Path

from guard_training.commands import count, subcommand, terminal

_ABOUT = """\
Leaves one source (or one group of sources) out of training, trains, and measures on what was left out: recall, false
positives and the area under the ROC curve per source, with 95 % intervals, beside the baseline of `guard-train
baseline` (TF-IDF and logistic regression). Each fold trains a whole nano, so a real run takes the recipe's time per
fold; --quick only fits the baseline. A stopped run goes on from OUTPUT when the same command is given again.

  guard-train generalise --data shared/data --quick
  guard-train generalise --data shared/data --groups advbench+self_instruct_user catqa_english+self_instruct_seed

Options of `guard-train nano` go after two dashes: ... --limit 200 -- --wordnet DIR

A group of a harmful and a harmless source shows both kinds of error on content that nobody trained on.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = subcommand(commands, "generalise", "train without a source and measure on it", _ABOUT)
    command.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the recipe's data files")
    command.add_argument("--recipe", type=Path, metavar="FILE", help="of the training (default: the recipe of nano)")
    command.add_argument(
        "--groups", nargs="+", metavar="SOURCE[+SOURCE]", help="what each fold leaves out (default: each source alone)"
    )
    command.add_argument("--quick", action="store_true", help="only the linear baseline")
    command.add_argument("--limit", type=count, default=500, metavar="N", help="rows of a source asked (default 500)")
    command.add_argument("--output", type=Path, default=Path("generalise"), metavar="DIR", help="default: generalise")
    command.add_argument("--concurrency", type=count, default=12, metavar="N", help="questions under way (default 12)")
    command.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    command.add_argument("options", nargs="*", metavar="-- OPTION", help="for `guard-train nano`")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:

    from guard_training.evaluation.generalise import generalise
    from guard_training.nano.recipe import default_recipe, read_recipe

    generalise(
        given.data,
        read_recipe(given.recipe or default_recipe()),
        given.output,
        groups=given.groups,
        quick=given.quick,
        limit=given.limit,
        options=given.options,
        concurrency=given.concurrency,
        seed=given.seed,
        console=terminal(160),
    )
