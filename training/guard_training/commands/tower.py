"""``guard-train tower``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard_training.commands import count, subcommand, terminal

if TYPE_CHECKING:
    from rich.console import Console

    from guard_training.corpus.rows import Row, Skipped
    from guard_training.evaluation.tables import Sheet
    from guard_training.nano.curriculum import Progressed
    from guard_training.nano.reading import ReadingTower

_ABOUT = """\
Trains a vision tower that reads drawn text by itself: nano's vision architecture, taught by the renderer which glyph
falls into which image token; single glyphs first, then strings, words and lines. Measured on texts and fonts that it
never saw. A stopped run goes on with --resume. No weights are shipped: training/TOWER.md says what came of it.

  guard-train tower --output out/tower --minutes 25
  guard-train tower --output out/tower --resume
  guard-train tower --output out/tower --resume --data dev.jsonl.gz --typographic out/held_out/held_out.jsonl

With --data and --typographic, after training: the verdicts of --model on the pictures when it is given the tower's
reading, RapidOCR's, and none. --data gives the rows of source figstep on its seven harmful topics.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    tower = subcommand(commands, "tower", "train a vision tower that reads by itself", _ABOUT)
    option = tower.add_argument
    option("--output", type=Path, required=True, metavar="DIR", help="folder of the run")
    option("--resume", action="store_true", help="go on from the folder's checkpoint")
    option("--minutes", type=float, metavar="N", help="end this call after N minutes of training, with a checkpoint")
    option("--steps", type=count, metavar="N", help="length of the whole schedule (default 7000)")
    option("--patches", type=count, metavar="N", help="patches of 14 x 14 pixels in a batch (default 1024)")
    option("--measured", type=count, metavar="N", help="held-out images of each kind that are measured (default 24)")
    option("--workers", type=int, default=0, metavar="N", help="processes that draw, to keep a GPU busy (default 0)")
    option("--data", type=Path, metavar="FILE", help="labelled rows with FigStep's pictures")
    option("--typographic", type=Path, metavar="FILE", help="held-out typographic rows, as `nano` writes them")
    option("--model", default="nano", help="the guard that judges what was read (default nano)")
    option("--limit", type=count, default=60, metavar="N", help="at most N pictures of each source (default 60)")
    tower.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    from rich.progress import Progress

    from guard_training.corpus.rows import Skipped
    from guard_training.nano.bank import default_bank
    from guard_training.nano.curriculum import TowerSettings, train_tower
    from guard_training.nano.glyphs import bank_texts
    from guard_training.nano.reading import measure
    from guard_training.nano.render import HELD_OUT_FONTS, TRAIN_FONTS
    from guard_training.rowfile import write_json

    console, skipped = terminal(120), Skipped()
    rows = _rows(given, skipped)  # before training, which takes long
    changed = {name: getattr(given, name) for name in ("steps", "patches", "measured") if getattr(given, name)}
    settings = TowerSettings(**changed)
    bank = default_bank()
    unseen = bank_texts(bank, held=True)
    with Progress(console=console) as progress:
        task = progress.add_task("training the tower", total=settings.steps)

        def tell(seen: Progressed, stage: str) -> None:
            loss = sum(seen.losses[-20:]) / len(seen.losses[-20:])
            progress.update(task, completed=seen.step, description=f"{stage}, loss {loss:.2f}")

        tower, seen = train_tower(
            given.output,
            settings,
            bank_texts(bank, held=False),
            unseen,
            resume=given.resume,
            minutes=given.minutes,
            workers=given.workers,
            tell=tell,
        )
    figures = {
        "curve": seen.curve,
        "training_fonts": measure(tower, unseen, TRAIN_FONTS, settings.measured),
        "held_out_fonts": measure(tower, unseen, HELD_OUT_FONTS, settings.measured),
    }
    write_json(given.output / "curve.json", figures)
    console.print(_curve(figures).rich())
    if seen.step < settings.steps:
        console.print(f"stopped at step {seen.step} of {settings.steps}; the same command with --resume goes on")
    if rows:
        _verdicts(given, rows, tower, seen.step, console)
    skipped.tell(console)


def _rows(given: argparse.Namespace, skipped: Skipped) -> list[Row]:
    from guard_training.corpus.conversation import judgeable
    from guard_training.corpus.rows import read_good_rows
    from guard_training.nano.unread import chosen

    figstep = [row for row in read_good_rows(given.data, skipped) if row.source == "figstep"] if given.data else []
    typographic = read_good_rows(given.typographic, skipped) if given.typographic else []
    rows = chosen(judgeable([*figstep, *typographic], skipped), given.limit)
    if (given.data or given.typographic) and not rows:
        raise ValueError("no labelled picture in --data or --typographic; --data needs rows of source figstep")
    return rows


def _curve(figures: dict[str, Any]) -> Sheet:
    from guard_training.evaluation.tables import Sheet
    from guard_training.nano.glyphs import KINDS

    rows = []
    for one in figures["curve"]:
        facts = (one["step"], one["stage"], one["images"], one["glyphs"], one["seconds"], f"{one['loss']:.2f}")
        rows.append((*map(str, facts), *_similarities(one["held_out"])))
    for fonts in ("held_out_fonts", "training_fonts"):
        rows.append(("now", fonts.replace("_", " "), *[""] * 4, *_similarities(figures[fonts])))
    columns = ("step", "stage", "images", "glyphs", "seconds", "loss", *KINDS)
    return Sheet("character similarity on unseen texts", columns, tuple(rows), left=2, totals=2)


def _similarities(figures: dict[str, Any]) -> list[str]:
    return [f"{one['similarity']:.3f}" for one in figures.values()]


def _verdicts(given: argparse.Namespace, rows: list[Row], tower: ReadingTower, step: int, console: Console) -> None:
    from rich.progress import Progress

    from guard_middleware.guard.reader import Reader
    from guard_middleware.worker.engine_transformers import TransformersEngine
    from guard_middleware.worker.weights import resolve
    from guard_training.evaluation.tables import Sheet
    from guard_training.nano.drawn import Read
    from guard_training.nano.reading import TowerReader
    from guard_training.nano.unread import Timed, compare
    from guard_training.rowfile import write_json

    readers: dict[str, Read] = {
        "RapidOCR": Timed(Reader().read, given.output / "drawn-rapidocr.jsonl"),
        "tower": Timed(TowerReader(tower).read, given.output / f"drawn-tower-{step}.jsonl"),
        "none": lambda image: "",
    }
    with Progress(console=console) as progress:
        task = progress.add_task("reading pictures", total=len(rows) * len(readers))
        found = compare(rows, lambda: TransformersEngine(resolve(given.model)), readers, lambda: progress.advance(task))
    columns = ("source", "reader", "harmful", "recall", "benign", "false positives", "similarity", "s/picture")
    lines = []
    for one in sorted(found, key=lambda one: one.source):
        recall, wrong = ("-" if share is None else f"{share:.1%}" for share in (one.recall, one.false_positives))
        figures = (one.harmful, recall, one.unharmful, wrong, f"{one.similarity:.3f}", f"{one.seconds:.2f}")
        lines.append((one.source, one.reader, *map(str, figures)))
    console.print(Sheet("verdicts by what was read", columns, tuple(lines), left=2).rich())
    write_json(given.output / "verdicts.json", [asdict(one) for one in found])
