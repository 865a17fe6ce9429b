"""``guard-train sweep``."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from guard_training.commands import count, subcommand, terminal

_ABOUT = """\
The ablations of online RL in one command: trains the recipe in full, without augmented rows, without dynamic clipping,
without the length reward (r = -1 + r_safety), as Eco (beta = 1/6), on RL's rows of text alone and of images alone,
measures each and the guard before RL on a labelled file, and writes <output>/ablations.json, .svg and .png with the
table. Rows that a variant leaves out are not replaced: it has fewer rollouts. A stopped sweep goes on when the same
command is given again.

  guard-train sweep --rows rl.jsonl --model out/sft/model --recipe grpo-nano --data dev.jsonl.gz --output out/sweep
  guard-train sweep --rows rl.jsonl --recipe grpo-3b --data dev.jsonl.gz --output out/sweep \\
      --variants full "no dynamic clipping" --launch "accelerate launch --num_processes 4 --no_python guard-train"
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sweep = subcommand(commands, "sweep", "the ablations of online RL", _ABOUT)
    arg = sweep.add_argument
    arg("--rows", type=Path, required=True, metavar="FILE", help="rows to train on: what `augment` wrote")
    arg("--data", type=Path, required=True, metavar="FILE", help="labelled rows to measure on")
    arg("--output", type=Path, required=True, metavar="DIR", help="folder of the sweep, one folder per variant in it")
    arg("--recipe", default="grpo-nano", metavar="NAME", help="the full recipe (default grpo-nano)")
    arg("--model", help="the guard after SFT: a folder, nano, or a hub id (default: the recipe's)")
    arg("--set", action="append", default=[], metavar="KEY=VALUE", help="change a constant of the recipe")
    arg("--variants", nargs="+", metavar="NAME", help="only these (default: all)")
    arg("--limit", type=count, metavar="N", help="measure on at most N rows of each source")
    arg("--concurrency", type=count, default=12, metavar="N", help="questions under way (default 12)")
    arg("--launch", metavar="COMMAND", help="how guard-train is started for training")
    sweep.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:

    from guard_training.corpus.conversation import usable
    from guard_training.corpus.rows import Skipped, read_good_rows, sample
    from guard_training.tuning import ablation
    from guard_training.tuning.grpo import GrpoSettings
    from guard_training.tuning.settings import read_settings, recipe_path

    recipe = read_settings(GrpoSettings, recipe_path(given.recipe), given.set)
    variants = given.variants or list(ablation.VARIANTS)
    unknown = sorted(set(variants) - set(ablation.VARIANTS))
    if unknown:
        raise ValueError(f"no variant {', '.join(unknown)}; there are {', '.join(ablation.VARIANTS)}")
    if not given.rows.is_file():
        raise FileNotFoundError(f"{given.rows}: no such file; make it with `guard-train augment`")
    console = terminal()
    skipped = Skipped()
    # each variant reads them for itself and says so in its log.txt
    if not read_good_rows(given.rows, skipped):
        raise ValueError(f"{given.rows}: no usable row to train on; {skipped.summary()}")
    rows = sample(usable(read_good_rows(given.data, skipped), skipped), given.limit)
    if not rows:
        raise ValueError(f"{given.data}: no usable row to measure on")
    model = given.model or recipe.model
    launch = {"launch": shlex.split(given.launch)} if given.launch else {}
    try:
        results = ablation.run(
            recipe,
            model,
            given.output,
            variants,
            train=ablation.trainer(given.rows, model, **launch),
            ask=ablation.asker(rows, concurrency=given.concurrency, console=console),
        )
        console.print(ablation.sheet(results).rich())
        for file in ablation.write(results, recipe, given.output):
            console.print(str(file), markup=False, highlight=False)
    finally:
        skipped.tell(console)
