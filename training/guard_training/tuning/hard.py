"""The run behind ``guard-train reject``: samples in batches that repeat, counts into a journal, then the selection."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import Progress

from guard_middleware.errors import GuardError
from guard_training.corpus.rows import CorpusError, Row, Skipped, labelled, read_good_rows, row_to_json
from guard_training.evaluation.tables import Sheet
from guard_training.journal import Journal
from guard_training.nano.drawn import Read
from guard_training.rowfile import OutputError, begin, bring_image, digest, write_json, write_whole
from guard_training.tuning.contract import Contract, pictures
from guard_training.tuning.rejection import (
    Counts,
    Group,
    count,
    from_json,
    read_range,
    select,
    statistics,
    to_json,
)
from guard_training.tuning.sampling import Prompt, Sampler, Sampling, row_seed


@dataclass(frozen=True, slots=True)
class Selection:
    """What is kept of the counted rows; it can be changed without sampling again."""

    keep: str | None = None
    all_images: bool = False
    balance: bool = False
    max_rows: int | None = None


def reject(
    source: Path,
    output: Path,
    contract: Contract,
    sampling: Sampling,
    selection: Selection,
    make_sampler: Callable[[], Sampler],
    *,
    engine: str,
    sequences: int,
    seed: int,
    read: Read | None,
    report: Path | None,
    console: Console,
) -> None:
    """Counts right samples of every row and writes the hard ones; goes on with counts that were begun.

    ``read`` finds drawn text for a guard that is served with a reader. ``make_sampler`` is called only where rows are
    left. Raises ``ValueError`` for a range outside k, ``CorpusError`` without a usable row, and ``OutputError`` for
    counts of another run or an output of none.
    """
    wrong = read_range(selection.keep, sampling.k)
    skipped = Skipped()
    rows = labelled(read_good_rows(source, skipped), skipped)
    if not rows:
        raise CorpusError(f"{source}: no usable row; {skipped.summary()}")
    journal_path = output.with_name(f"{output.stem}.counts.jsonl")
    if output.exists() and not journal_path.exists():
        raise OutputError(f"{output} exists and no {journal_path.name} says how it was made; give another --output")
    settings = {"command": "reject", "model": contract.facts.revision, "engine": engine, "seed": seed}
    size = max(1, sequences // sampling.k)
    settings |= {
        "max_pixels": contract.facts.max_pixels,
        "reader": read is not None,
        "rows": digest(source),
        "batch": size,
    }
    begin(journal_path, {**settings, **asdict(sampling)})

    with Journal(journal_path) as journal:
        with Progress(console=console) as progress:
            task = progress.add_task("sampling", total=len(rows))
            sampler: Sampler | None = None
            for batch in batches(rows, size):
                if any(row.id not in journal.done for row in batch):
                    asked = askable(batch, contract, skipped, seed=seed, read=read)
                    if any(one.row.id not in journal.done for one in asked):
                        sampler = sampler or make_sampler()
                        for line in sample(asked, sampler):
                            if line["id"] not in journal.done:
                                journal.append(line)
                progress.advance(task, len(batch))
        counts = {line["id"]: from_json(line) for line in journal}
    kept = select(
        rows,
        counts,
        wrong,
        all_images=selection.all_images,
        balance=selection.balance,
        max_rows=selection.max_rows,
        seed=seed,
    )
    chosen = (json.dumps(_line(row, counts[row.id], output.parent), ensure_ascii=False) for row in kept)
    write_whole(output, "".join(f"{line}\n" for line in chosen).encode())
    groups = statistics(rows, counts, kept, sampling.k)
    if report is not None:
        write_json(report, [asdict(group) for group in groups])
    console.print(_sheet(groups, sampling.k).rich())
    console.print(f"{len(kept)} rows kept in {output}", markup=False, soft_wrap=True)
    skipped.tell(console, output.with_name(f"{output.stem}.skipped.txt"))


def batches(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """Rows of about one length together, longest first: what does not fit into memory fails at once."""
    order = sorted(rows, key=lambda row: (-len(row.prompt) - len(row.response or ""), row.image is None, row.id))
    return [order[start : start + size] for start in range(0, len(order), size)]


@dataclass(frozen=True, slots=True)
class Asked:
    """A row as the guard is asked about it; ``answered`` where it judges an answer too."""

    row: Row
    prompt: Prompt
    answered: bool


def askable(rows: Sequence[Row], contract: Contract, skipped: Skipped, *, seed: int, read: Read | None) -> list[Asked]:
    """The rows that the guard can be asked about. The others go to ``skipped`` and into no journal: an image that is
    not there yet may be there when the command is given again."""
    asked = []
    for row in rows:
        try:
            asked.append(Asked(row, *_prompt(row, contract, seed=seed, read=read)))
        except (GuardError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            skipped(f"{row.name}: {str(error).removeprefix(f'{row.name}: ')}")
    return asked


def sample(asked: Sequence[Asked], sampler: Sampler) -> list[dict[str, Any]]:
    """A journal line per row: the counts of its samples."""
    found = sampler.sample([one.prompt for one in asked])
    return [to_json(count(one.row, samples, answered=one.answered)) for one, samples in zip(asked, found, strict=True)]


def _prompt(row: Row, contract: Contract, *, seed: int, read: Read | None) -> tuple[Prompt, bool]:
    drawn = [read(row.image.read_bytes())] if read and row.image else []
    encoded, images = contract.encode(row, drawn), tuple(pictures(row))
    length = len(contract.expand(encoded.ids, images))
    if length > contract.facts.max_input_tokens:
        raise CorpusError(f"a prompt of {length} tokens; the guard takes {contract.facts.max_input_tokens}")
    return Prompt(encoded.ids, images, row_seed(seed, row.id)), encoded.answered


def _line(row: Row, counts: Counts, folder: Path) -> dict[str, Any]:
    found = {"samples": counts.samples, "wrong": counts.wrong, "malformed": counts.malformed}
    return {**row_to_json(bring_image(row, folder), folder), "rejection": found}


def _sheet(groups: Sequence[Group], k: int) -> Sheet:
    """The statistics as the terminal shows them."""
    counts = ("rows", *map(str, range(k + 1)), "malformed %", "cut off %", "mean tokens", "kept")
    rows = [
        (
            group.source,
            group.modality,
            str(group.rows),
            *map(str, group.right),
            f"{100 * group.malformed:.1f}",
            f"{100 * group.cut:.1f}",
            f"{group.length:.1f}",
            str(group.kept),
        )
        for group in groups
    ]
    title, totals = "Rows by the number of samples that were right", sum(group.source == "all" for group in groups)
    return Sheet(title, ("source", "modality", *counts), tuple(rows), left=2, totals=totals)
