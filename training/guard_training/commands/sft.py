"""``guard-train sft``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from guard_training.commands import count, subcommand, terminal

if TYPE_CHECKING:
    from rich.console import Console

    from guard_training.tuning.settings import SftSettings

#: Rows of GuardReasoner-VLTrain (paper, Table 6), for a dry run without data.
_PAPER_ROWS = 123_096
#: GPUs of the paper's recipe.
_PAPER_DEVICES = 4

_ABOUT = """\
Reasoning SFT (GuardReasoner-VL, section 3): the guard learns to write each row's rationale and then its labels. The
loss counts the answer only; prompts and images stand exactly as the worker serves them. A stopped run goes on from
its last checkpoint when the same command is given again.

  guard-train synthesize --rows rows.jsonl --output corpus.jsonl ...
  guard-train sft --recipe sft-3b --dry-run
  guard-train sft --recipe sft-3b --random-weights --steps 2
  accelerate launch --config_file training/recipes/accelerate/zero3.yaml -m guard_training \\
      sft --recipe sft-3b --data corpus.jsonl --output runs/sft
  guard-train sft --recipe sft-nano --data corpus.jsonl --output runs/nano --set epochs=1 \\
      --set 'lora={rank: 16, scale: 32, dropout: 0.05, targets: [q_proj, v_proj]}'

Row: as of `guard-train corpus`, with "rationale". Rows without one, without a label of the request or longer than the
cutoff are left out and counted. Curves go to <output>/checkpoints/runs for TensorBoard, where it is installed, and as
gauges to OTEL_EXPORTER_OTLP_ENDPOINT, where it is set. The guard is <output>/model; a LoRA run also keeps its
<output>/adapter.

--dry-run needs no weights: it builds the real architecture on the meta device, checks the shapes of a micro-batch and
prints parameters, steps and memory by part. --random-weights trains for real, from random weights of the real
architecture on made rows that fill the cutoff, and prints seconds and memory.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sft = subcommand(commands, "sft", "reasoning SFT on rows with rationales", _ABOUT)
    arg = sft.add_argument
    arg("--recipe", default="sft-nano", metavar="NAME", help="a file, or sft-nano, sft-3b, sft-7b (default sft-nano)")
    arg("--data", type=Path, metavar="FILE", help="labelled rows with rationales, .jsonl or .jsonl.gz")
    arg("--output", type=Path, metavar="DIR", help="folder of the run")
    arg("--set", action="append", default=[], metavar="KEY=VALUE", help="change a constant, e.g. epochs=1")
    arg("--steps", type=count, metavar="N", help="end after N steps of the schedule; the same command goes on")
    arg("--dry-run", action="store_true", help="check the configuration on the meta device and end")
    arg("--random-weights", action="store_true", help="train the real architecture from random weights, to measure it")
    arg("--devices", type=count, default=_PAPER_DEVICES, metavar="N", help="GPUs that a dry run plans for (default 4)")
    arg("--cpu", action="store_true", help="do not use a GPU")
    sft.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    if not (given.dry_run or given.random_weights) and (given.data is None or given.output is None):
        raise ValueError("give --data FILE and --output DIR, or --dry-run, or --random-weights")

    import torch
    from accelerate import PartialState
    from transformers.utils import logging

    from guard_training.tuning.settings import SftSettings, read_settings, recipe_path

    logging.disable_progress_bar()
    recipe = read_settings(SftSettings, recipe_path(given.recipe), given.set)
    cpu = given.cpu or not torch.cuda.is_available()
    console = terminal(quiet=not PartialState(cpu=cpu).is_main_process)
    if given.dry_run:
        _dry_run(given, recipe, console)
    elif given.random_weights:
        from guard_training.tuning.plan import rehearse

        console.print(rehearse(recipe, given.steps or 2, cpu=cpu), highlight=False)
    else:
        _train(given, recipe, console, cpu=cpu)


def _dry_run(given: argparse.Namespace, recipe: SftSettings, console: Console) -> None:
    from tempfile import TemporaryDirectory

    from guard_training.corpus.rows import Skipped, read_good_rows
    from guard_training.tuning.plan import plan

    skipped = Skipped()
    rows = len(read_good_rows(given.data, skipped)) if given.data else _PAPER_ROWS
    with TemporaryDirectory() as folder:
        made = plan(recipe, rows, given.devices, Path(folder))
    for line in made.lines(recipe):
        console.print(line, highlight=False)
    console.print(made.table())
    skipped.tell(console)


def _train(given: argparse.Namespace, recipe: SftSettings, console: Console, *, cpu: bool) -> None:
    from guard_training.corpus.rows import Skipped, read_good_rows
    from guard_training.nano.drawn import reader
    from guard_training.tuning.sft import train

    skipped = Skipped()
    rows = read_good_rows(given.data, skipped)
    read = reader(recipe.reader)
    try:
        folder = train(
            recipe, given.data, rows, given.output, skipped, console=console, read=read, steps=given.steps, cpu=cpu
        )
    finally:
        skipped.tell(console, given.output / "skipped.txt")
    console.print(str(folder) if folder else "stopped; the same command goes on", markup=False, highlight=False)
