"""``guard-train update``."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from guard_training.commands import count, date, subcommand, terminal

if TYPE_CHECKING:
    from rich.console import Console

_ABOUT = """\
Learns from operators' corrections: trains the current guard on them and on a replay share of its older training rows
(reasoning SFT, and online RL with --rl), measures both guards on the evaluation files and on a golden set, and writes
<output>/revision, unless a source loses more than --margin or the golden set breaks: then it says where and ends with
an error. A stopped update goes on when the same command is given again; --margin may be changed without training anew.

  guard-train update --model nano --corrections corrections.jsonl --log decisions.jsonl --replay train.jsonl.gz \\
      --evaluate dev.jsonl.gz --golden golden.jsonl --output out/update
  guard-train update --model out/7b --recipe sft-7b --rl grpo-7b --corrections c.jsonl --replay corpus.jsonl \\
      --evaluate dev.jsonl --golden golden.jsonl --output out/update \\
      --launch "accelerate launch --num_processes 4 --no_python guard-train"
  guard-train publish out/update/revision --to-hub owner/name --private

Correction, one JSON object per line:

  {"decision": "<id in the decision log>", "reviewer": "ana", "label": "unharmful",
   "content": "text" | {"text", "image", "response"} | {"messages": [{"role", "content"}, ...]}}

The label is that of what was judged: the answer where the content has one, else the request ("request_label" then
says the request's). "rationale" is the reviewer's own reasoning, "category" what the content is about. Two reviewers
who disagree about the same content are reported, and the content is left out; so is all that an evaluation or golden
file holds. Golden set: rows as of `guard-train evaluate` whose verdicts must keep, false positives above all.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    update = subcommand(commands, "update", "learn from operators' corrections", _ABOUT)
    arg = update.add_argument
    arg("--model", default="nano", help="the current guard: nano, a folder, or a hub id (default nano)")
    arg("--corrections", type=Path, nargs="+", default=[], metavar="FILE", help="what reviewers say, .jsonl")
    arg("--log", type=Path, nargs="+", default=[], metavar="FILE", help="the gateway's decision logs, to check ids by")
    arg("--replay", type=Path, nargs="+", default=[], metavar="FILE", help="rows that the guard was trained on")
    arg("--replay-share", type=float, default=0.8, metavar="X", help="of older rows among all lessons (default 0.8)")
    arg("--evaluate", type=Path, nargs="+", default=[], metavar="FILE", help="labelled rows to compare both guards on")
    arg("--golden", type=Path, metavar="FILE", help="labelled rows whose verdicts must keep")
    arg("--output", type=Path, metavar="DIR", help="folder of the update")
    arg("--recipe", default="sft-nano", metavar="NAME", help="of SFT: a file, sft-nano, sft-3b, sft-7b")
    arg("--set", action="append", default=[], metavar="KEY=VALUE", help="change a constant of the SFT recipe")
    arg("--rl", metavar="NAME", help="online RL after SFT, by this recipe (grpo-nano, grpo-3b, ...)")
    arg("--set-rl", action="append", default=[], metavar="KEY=VALUE", help="change a constant of the RL recipe")
    arg("--margin", type=float, default=0.02, metavar="X", help="what a source may lose, 0..1 (default 0.02)")
    arg("--allow-chance", action="store_true", help="refuse only losses that the paired 95 %% interval makes certain")
    arg("--limit", type=count, metavar="N", help="measure on at most N rows of each source")
    arg("--concurrency", type=count, default=12, metavar="N", help="questions under way (default 12)")
    arg("--date", type=date, default="now", metavar="ISO", help="date of the revision (default: now)")
    arg("--licence", help="of the revision (default: that of the current guard's card)")
    arg("--limits", type=Path, metavar="FILE", help="Markdown for the card's limits section")
    arg("--launch", metavar="COMMAND", help="how guard-train is started for training")
    arg("--cpu", action="store_true", help="do not use a GPU for training")
    arg("--stage", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    update.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    console = terminal()
    given.cpu = given.cpu or not torch.cuda.is_available()
    if given.stage:
        _stage(given)
        return
    missing = [name for name in ("corrections", "evaluate", "golden", "output") if not getattr(given, name)]
    if missing:
        raise ValueError(f"give {', '.join(f'--{name}' for name in missing)}; see `guard-train update --help`")
    _update(given, console)


def _stage(given: argparse.Namespace) -> None:
    from accelerate import PartialState

    from guard_training.nano.drawn import reader
    from guard_training.update.train import read_stage, train_lessons

    main = PartialState(cpu=given.cpu).is_main_process
    console = terminal(quiet=not main)
    train_lessons(given.stage, console=console, read=reader(read_stage(given.stage).reader), cpu=given.cpu)


def _update(given: argparse.Namespace, console: Console) -> None:
    from guard_training.corpus.rows import Skipped
    from guard_training.nano.drawn import reader
    from guard_training.process import LAUNCH
    from guard_training.tuning.grpo import GrpoSettings
    from guard_training.tuning.settings import SftSettings, read_settings, recipe_path
    from guard_training.update import pipeline, processes

    plan = pipeline.Plan(
        model=given.model,
        corrections=tuple(given.corrections),
        replay=tuple(given.replay),
        evaluation=tuple(given.evaluate),
        golden=given.golden,
        output=given.output,
        sft=read_settings(SftSettings, recipe_path(given.recipe), given.set),
        rl=read_settings(GrpoSettings, recipe_path(given.rl), given.set_rl) if given.rl else None,
        logs=tuple(given.log),
        replay_share=given.replay_share,
        limit=given.limit,
        margin=given.margin,
        allow_chance=given.allow_chance,
        made=given.date,
        licence=given.licence,
        limits=given.limits.read_text("utf-8") if given.limits else None,
    )
    launch = shlex.split(given.launch) if given.launch else LAUNCH
    skipped = Skipped()
    try:
        folder = pipeline.run(
            plan,
            console=console,
            skipped=skipped,
            train=processes.trainer(console, skipped, launch, cpu=given.cpu),
            measure=processes.measurer(console, given.concurrency),
            ask=processes.asker(console, given.concurrency),
            read=reader(plan.sft.reader),
        )
    finally:
        skipped.tell(console, shown=20)
    console.print(str(folder), markup=False, highlight=False)
