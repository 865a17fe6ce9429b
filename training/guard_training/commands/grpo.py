"""``guard-train grpo``."""

from __future__ import annotations

import argparse
from pathlib import Path

from guard_training.commands import subcommand, terminal

_ABOUT = """\
Online RL (GuardReasoner-VL, section 4): GRPO without KL, groups of 16, dynamic clipping, and the length-aware safety
reward, whose format gate is the gateway's own strict parser. Text and images train in one batch. Completions are
sampled with transformers or with vLLM, in this process or on a server. A stopped run goes on from its last checkpoint
when the same command is given again.

  guard-train reject --rows rows.jsonl --model out/sft --output hard.jsonl --max-rows 12000
  guard-train augment --rows hard.jsonl --output rl.jsonl
  guard-train grpo --rows rl.jsonl --model out/sft/model --recipe grpo-3b --output out/rl
  accelerate launch --num_processes 4 --no_python guard-train grpo --rows rl.jsonl --recipe grpo-3b --output out/rl

Alarms (template collapse, format drift, length run-away, modality imbalance, rollout drift) are measured on every
rollout and stop a run that games its reward, with a checkpoint; their limits stand in the recipe. Curves go to
<output>/runs for TensorBoard, and one line per completion to <output>/completions: labels, lengths, reward and a
digest, no texts. The guard is <output>/model.

--dry-run needs no weights: it builds the whole configuration with the real architecture on the meta device and
checks its shapes. --rehearse does two real updates with random weights, and prints seconds and memory.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    grpo = subcommand(commands, "grpo", "online RL with the length-aware safety reward", _ABOUT)
    arg = grpo.add_argument
    arg("--rows", type=Path, metavar="FILE", help="labelled rows, .jsonl or .jsonl.gz: what `augment` wrote")
    arg("--output", type=Path, required=True, metavar="DIR", help="folder of the run")
    arg("--recipe", default="grpo-nano", metavar="NAME", help="a file, or grpo-nano, grpo-3b, grpo-3b-eco, grpo-7b")
    arg("--model", help="the guard after SFT: a folder, nano, or a hub id (default: the recipe's)")
    arg("--set", action="append", default=[], metavar="KEY=VALUE", help="change a constant, e.g. reward.beta=0.5")
    arg("--keep-texts", action="store_true", help="write the completions' texts too; they quote what they judge")
    arg("--dry-run", action="store_true", help="check the configuration on the meta device and end")
    arg("--rehearse", action="store_true", help="two updates with random weights and end")
    arg("--cpu", action="store_true", help="do not use a GPU")
    grpo.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    import torch
    from accelerate import PartialState
    from transformers.utils import logging

    from guard_training.corpus.rows import Skipped, read_good_rows
    from guard_training.nano.drawn import reader
    from guard_training.tuning.grpo import GrpoSettings, train
    from guard_training.tuning.rehearsal import on_meta, with_weights
    from guard_training.tuning.settings import read_settings, recipe_path

    logging.disable_progress_bar()
    recipe = read_settings(GrpoSettings, recipe_path(given.recipe), given.set)
    cpu = given.cpu or not torch.cuda.is_available()
    console = terminal(quiet=not PartialState(cpu=cpu).is_main_process)
    skipped = Skipped()
    if given.rehearse:
        done = with_weights(recipe, given.output)
        seconds = ", ".join(f"{value:.2f}" for value in done["seconds"])
        console.print(
            f"{done['device']}: updates of {done['completions_per_update']} completions took {seconds} s (the first "
            f"with its rollout); peak memory {done['peak_bytes'] / 2**30:.2f} GiB",
            highlight=False,
        )
        return
    rows = read_good_rows(given.rows, skipped) if given.rows else None
    if given.dry_run:
        for line in on_meta(recipe, len(rows) if rows is not None else 12_000, given.output).lines():
            console.print(line, highlight=False)
        skipped.tell(console)
        return
    if rows is None:
        raise ValueError("nothing to train on; give --rows FILE")
    read = reader(recipe.reader)
    try:
        folder = train(
            recipe,
            given.model or recipe.model,
            given.rows,
            rows,
            given.output,
            skipped,
            console=console,
            read=read,
            raw=given.keep_texts,
            cpu=cpu,
        )
    finally:
        skipped.tell(console)
    console.print(str(folder), markup=False, highlight=False)
