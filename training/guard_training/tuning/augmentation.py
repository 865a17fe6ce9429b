"""The run behind ``guard-train augment``: reads rows, plans the mixes, writes rows and mixes into one journal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from guard_training.corpus.conversation import image_size
from guard_training.corpus.leakage import Fingerprints, readable
from guard_training.corpus.rows import CorpusError, Row, Skipped, held_out, labelled, read_good_rows, row_to_json
from guard_training.evaluation.tables import Sheet
from guard_training.journal import Journal
from guard_training.rowfile import begin, bring_image, digest
from guard_training.tuning.concatenation import Options, compose, count_for, plan


def augment(
    source: Path,
    output: Path,
    options: Options,
    *,
    share: float,
    seed: int,
    held_out_share: float,
    separator: str,
    console: Console,
) -> None:
    """Writes ``output`` (and the held-out rows beside it); goes on with one that was begun.

    Raises ``ValueError`` for a share outside its bounds and for rows that do not give enough pairs, ``OutputError`` for
    an output of another run.
    """
    if not 0 <= held_out_share < 1:
        raise ValueError("the share of held-out rows lies between 0 and 1, 1 excluded")
    skipped = Skipped()
    rows = _usable(read_good_rows(source, skipped), skipped)
    if not rows:
        raise CorpusError(f"{source}: no usable row; {skipped.summary()}")
    validation = [row for row in rows if held_out(row.id, held_out_share)]
    kept = [row for row in rows if not held_out(row.id, held_out_share)]
    mixes = plan(kept, count_for(len(kept), share), options, seed=seed)
    settings = {"command": "augment", "seed": seed, "share": share, "held_out": held_out_share, **asdict(options)}
    begin(output, {**settings, "separator": separator, "rows": digest(source)})

    with Journal(output) as journal, Progress(console=console) as progress:
        task = progress.add_task("mixing", total=len(kept) + len(mixes))
        for row in kept:
            if row.id not in journal.done:
                journal.append(row_to_json(bring_image(row, output.parent), output.parent))
            progress.advance(task)
        for mix in mixes:
            if mix.id not in journal.done:
                try:
                    made = compose(mix, output.parent, options, separator=separator)
                except CorpusError as error:
                    skipped(f"{mix.id}: {error}")
                else:
                    journal.append({**row_to_json(made, output.parent), "concatenation": mix.provenance()})
            progress.advance(task)
    if validation:
        with Journal(output.with_name(f"{output.stem}.validation.jsonl")) as journal:
            for row in validation:
                if row.id not in journal.done:
                    journal.append(row_to_json(bring_image(row, output.parent), output.parent))
    with Journal(output) as journal:
        console.print(_sheet(journal).rich())
    skipped.tell(console, output.with_name(f"{output.stem}.skipped.txt"))


def _usable(rows: Sequence[Row], skipped: Skipped) -> list[Row]:
    """Labelled rows whose image, where they have one, can be decoded and is not too large."""
    kept = []
    for row in readable(labelled(rows, skipped), Fingerprints(), skipped):
        try:
            if row.image is not None:
                image_size(row.image)
        except CorpusError as error:
            skipped(f"{row.name}: {error}")
        else:
            kept.append(row)
    return kept


def _sheet(lines: Iterable[dict[str, Any]]) -> Sheet:
    """Rows by what they are (plain, or the layout of the mix) and by label."""
    named = [(side, label) for side in ("request", "response") for label in ("harmful", "unharmful", None)]
    counts: dict[str, Counter[tuple[str, str | None]]] = {}
    for line in lines:
        mixed = line.get("concatenation")
        name = "as given" if mixed is None else f"mixed, {mixed['layout'] or 'text only'}"
        counts.setdefault(name, Counter()).update(
            [("rows", None), ("request", line["prompt_label"]), ("response", line["response_label"])]
        )
    rows = [(name, *(str(found[key]) for key in (("rows", None), *named))) for name, found in counts.items()]
    columns = ("rows", "number", *(f"{side}\n{label or 'none'}" for side, label in named))
    return Sheet("Rows by label", columns, tuple(rows))
