"""``guard-train baseline``."""

from __future__ import annotations

import argparse
from pathlib import Path

from guard_training.commands import subcommand, terminal

_ABOUT = """\
The baseline of the results table: TF-IDF of words with a logistic regression, trained on nano's rows (the bank and the
passages among them, sources weighed by the root of their size), its answers written for `guard-train evaluate`.

  guard-train baseline --data train.jsonl.gz train_benign_extra.jsonl.gz --evaluate dev.jsonl.gz --output tfidf.jsonl
  guard-train evaluate --data dev.jsonl.gz --model out/model --predictions tfidf=tfidf.jsonl

Training rows that an evaluation set holds too are left out. Images are not read, unless --read-images: then the words
drawn in them count as part of the request, through the reader that serves. It takes a minute or two; a run that was
stopped starts again (what the reader found is kept beside the output).
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    baseline = subcommand(commands, "baseline", "TF-IDF and logistic regression, for the same table", _ABOUT)
    arg = baseline.add_argument
    arg("--data", type=Path, nargs="+", required=True, metavar="FILE", help="labelled rows to train on")
    arg("--evaluate", type=Path, nargs="+", required=True, metavar="FILE", help="labelled rows to answer")
    arg("--output", type=Path, required=True, metavar="FILE", help="its answers, .jsonl")
    arg("--against", type=Path, nargs="+", default=[], metavar="FILE", help="further sets whose rows are left out")
    arg("--recipe", type=Path, metavar="FILE", help="nano's recipe, for seed and held-out rows (default: nano's own)")
    arg("--threshold", type=float, metavar="X", help="of the request (default: by the rule of nano's operating point)")
    arg("--read-images", action="store_true", help="read the words drawn in images")
    baseline.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    import json

    from rich.progress import Progress

    from guard_middleware.errors import GuardError
    from guard_middleware.guard.reader import Reader
    from guard_training.corpus.conversation import usable
    from guard_training.corpus.rows import Skipped, read_good_rows
    from guard_training.evaluation.tfidf import predict, train, training_rows
    from guard_training.nano.drawn import DrawnText
    from guard_training.nano.recipe import default_recipe, read_recipe
    from guard_training.rowfile import write_whole

    console = terminal()
    skipped = Skipped()
    recipe = read_recipe(given.recipe or default_recipe())
    asked = usable([row for path in given.evaluate for row in read_good_rows(path, skipped)], skipped)
    if not asked:
        raise ValueError(f"no usable row to answer; {skipped.summary()}")
    drawn: dict[str, str] = {}
    with Progress(console=console) as progress:
        task = progress.add_task("reading the training rows", total=3)
        rows = training_rows(given.data, recipe, [*given.evaluate, *given.against], skipped)
        progress.advance(task)
        if given.read_images:
            given.output.parent.mkdir(parents=True, exist_ok=True)
            read = DrawnText(given.output.with_name(f"{given.output.name}.drawn.jsonl"), Reader().read)
            for row in progress.track([row for row in asked if row.image], description="reading images"):
                try:
                    drawn[row.id] = read(row.image.read_bytes()) if row.image else ""
                except GuardError as error:
                    skipped(f"{row.name}: its image is not read ({error})")
        progress.update(task, description=f"fitting {len(rows.prompts)} requests and {len(rows.pairs)} answers")
        baseline = train(rows, recipe, given.threshold)
        progress.update(task, advance=1, description="answering")
        lines = [json.dumps(line) + "\n" for line in predict(baseline, asked, drawn)]
        progress.advance(task)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(given.output, "".join(lines).encode())
    console.print(
        f"{len(rows.prompts)} requests and {len(rows.pairs)} answers learnt; {len(lines)} rows answered, threshold "
        f"{baseline.request.threshold:.2f}: {given.output}",
        markup=False,
        highlight=False,
    )
    skipped.tell(console)
