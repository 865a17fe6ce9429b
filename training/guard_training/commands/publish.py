"""``guard-train publish``."""

from __future__ import annotations

import argparse
from pathlib import Path

from guard_training.commands import count, date, subcommand, terminal

_ABOUT = """\
Checks a revision of a guard (every file against SHA256SUMS, the weights load completely, the card has results measured
with these weights, the lineage is there), and copies it to a folder or pushes it to the Hugging Face hub.

  guard-train publish out/update/revision
  guard-train publish out/update/revision --output /srv/guards/2026-11 --to-hub owner/name --private

With --results it first makes the revision of a bare guard's folder in --output: card (facts of the model from its
config, data sources and licences from --data, recipe, results, limits), lineage, checksums.

  guard-train evaluate --data dev.jsonl.gz --model out/model --json dev.json
  guard-train publish out/model --results dev.json --recipe training/recipes/nano.yaml --data train.jsonl.gz --bank \\
      --licence apache-2.0 --output out/revision

The hub's token is that of HF_TOKEN or of `hf auth login`. What is made or copied already is not done again: a stopped
command goes on when it is given again.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    publish = subcommand(commands, "publish", "check a revision, copy it or push it to the hub", _ABOUT)
    arg = publish.add_argument
    arg("revision", type=Path, metavar="REVISION", help="the revision's folder, or with --results a guard's")
    arg("--output", type=Path, metavar="DIR", help="copy it here (with --results: make it here)")
    arg("--to-hub", metavar="OWNER/NAME", help="push it to this repository of the hub")
    arg("--private", action="store_true", help="make the repository private where it does not exist yet")
    arg("--results", type=Path, nargs="+", default=[], metavar="FILE", help="evaluate's JSON of this guard")
    arg("--data", type=Path, nargs="+", default=[], metavar="FILE", help="rows that it was trained on, for the card")
    arg("--bank", action="store_true", help="it was trained on the bank too")
    arg("--recipe", type=Path, metavar="FILE", help="the recipe that made it")
    arg("--calibration", type=Path, metavar="FILE", help="rows it was not trained on, to calibrate its scores")
    arg("--licence", help="of the weights (default: that of the folder's card)")
    arg("--limits", type=Path, metavar="FILE", help="Markdown for the card's limits section")
    arg("--date", type=date, default="now", metavar="ISO", help="date of the revision (default: now)")
    arg("--concurrency", type=count, default=12, metavar="N", help="questions under way (default 12)")
    publish.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    from rich.progress import Progress
    from transformers.utils import logging

    from guard_training.corpus.rows import Skipped
    from guard_training.update import hub, publish, revision
    from guard_training.update.processes import measurer

    logging.disable_progress_bar()
    console = terminal()
    folder = given.revision
    if given.results:
        if given.output is None:
            raise ValueError("--results makes a revision; say where with --output DIR")
        making = publish.Making(
            guard=folder,
            results=tuple(given.results),
            made=given.date,
            licence=given.licence,
            recipe=given.recipe,
            data=tuple(given.data),
            bank=given.bank,
            calibration=given.calibration,
            limits=given.limits.read_text("utf-8") if given.limits else None,
        )
        skipped = Skipped()
        try:
            publish.make(making, given.output, skipped, measurer(console, given.concurrency))
        finally:
            skipped.tell(console)
        folder = given.output
    copied = given.output if not given.results else None
    with Progress(console=console) as progress:
        files = sum(path.is_file() for path in folder.rglob("*")) if copied else 0
        task = progress.add_task("checking", total=1 + files)
        facts = revision.verify(folder)
        progress.update(task, advance=1, description="copying" if copied else "checked")
        if copied:
            publish.copy(folder, copied, lambda: progress.advance(task))
        progress.update(task, completed=1 + files)
    console.print(f"{folder}: {facts.name}, revision {facts.revision}, is whole", markup=False, highlight=False)
    if copied:
        console.print(str(copied), markup=False, highlight=False)
    if given.to_hub:
        logging.enable_progress_bar()  # the hub's own
        console.print(hub.push(folder, given.to_hub, facts, private=given.private), highlight=False)
