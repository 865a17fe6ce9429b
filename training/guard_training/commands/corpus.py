"""``guard-train corpus``: builds, checks and describes labelled corpora."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from guard_training.commands import subcommand, terminal
from guard_training.corpus.rows import CorpusError, Row, Skipped, read_good_rows, rows_to_jsonl
from guard_training.rowfile import bring_image, write_json, write_whole

if TYPE_CHECKING:
    from guard_training.corpus.leakage import Leak, Track
    from guard_training.corpus.sources.build import Built
    from guard_training.corpus.sources.parts import Given, Part

_T = TypeVar("_T")
_ABOUT = """\
Makes corpora of labelled rows from public data sets, keeps evaluation sets out of them, and describes them.

  guard-train corpus sources
  guard-train corpus build --source aegis=hub --against dev.jsonl.gz --output corpus
  guard-train corpus stats corpus/train.jsonl
"""
_SOURCES = """\
Lists the sources of GuardReasoner-VLTrain: modality, licence, where to get it, the share that the paper takes, its
schema and how a label is found.

  guard-train corpus sources
  guard-train corpus sources --json sources.json
"""
_BUILD = """\
Reads copies of data sets into one corpus: a folder with train.jsonl, images/ and report.json. Rows that say what an
earlier row says are left out, and so is every row that an evaluation set (--against) also holds, word for word,
nearly (3-word-shingle Jaccard), or with the same or nearly the same image.

  guard-train corpus build --source wildguard=wildguard_train.parquet --source unsafebench=hub \\
      --source hod=HOD-Benchmark-Dataset --paper-shares --against dev.jsonl.gz --output corpus

A copy is a .parquet, .jsonl, .json or .csv file, a folder of them, a folder of datasets.save_to_disk, a folder of
images, or `hub` (hub:REVISION). An evaluation set is a file of labelled rows, a benchmark of the paper as released
(ToxicChat.json), or a folder of those. One source may be given several times. Bad records are named and left out. A
build that was stopped goes on where it was when the same command is given again; the part-* files in the folder are
for that, and to try other shares without reading again.
"""
_CHECK = """\
Names every row of a training file that an evaluation set also holds, by ids, and fails where there is one, unless
--output writes the rows without them.

  guard-train corpus check --train corpus/train.jsonl --against dev.jsonl.gz --json leaks.json
  guard-train corpus check --train corpus/train.jsonl --against benchmarks \\
      --against-images yueliu1999/GuardReasoner-VLTest
"""
_STATS = """\
Prints the statistics of corpora: modalities and reasoning steps as in Table 6 of the paper, and labels by source.

  guard-train corpus stats corpus/train.jsonl --json stats.json
"""


class LeaksFound(ValueError):
    """A training file shares rows with an evaluation set, and nobody asked to write it without them."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    corpus = subcommand(commands, "corpus", "build and check training corpora", _ABOUT)
    parts = corpus.add_subparsers(dest="part", required=True)

    sources = subcommand(parts, "sources", "list the known sources", _SOURCES)
    sources.add_argument("--json", type=Path, metavar="FILE", help="also write the list here")
    sources.set_defaults(run=run_sources)

    build = subcommand(parts, "build", "make a corpus", _BUILD)
    build.add_argument("--source", action="append", required=True, metavar="NAME=COPY", help="a copy of a source")
    build.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the corpus")
    build.add_argument(
        "--images", type=Path, action="append", default=[], metavar="DIR", help="also look for images here"
    )
    build.add_argument("--against", type=Path, action="append", default=[], metavar="FILE", help="an evaluation set")
    build.add_argument("--keep-leaks", action="store_true", help="report leaks, and leave them in")
    build.add_argument(
        "--paper-shares",
        action="store_true",
        help="the paper's shares (text 0.5, hod 0.6, spa_vl 0.5; --image-test 0.2)",
    )
    build.add_argument("--share", action="append", default=[], metavar="NAME=PART", help="take this part of a source")
    build.add_argument("--image-test", type=float, metavar="PART", help="hold out this part of the images as a test")
    build.add_argument(
        "--near-duplicates",
        type=float,
        metavar="JACCARD",
        help="also leave out text rows this similar to an earlier one",
    )
    build.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws (default 0)")
    _comparison(build)
    build.set_defaults(run=run_build)

    check = subcommand(parts, "check", "find rows of evaluation sets", _CHECK)
    check.add_argument("--train", type=Path, nargs="+", required=True, metavar="FILE", help="rows to train on")
    check.add_argument("--against", type=Path, nargs="+", required=True, metavar="FILE", help="evaluation sets")
    check.add_argument("--output", type=Path, metavar="FILE", help="write the one training file without leaks here")
    check.add_argument("--json", type=Path, metavar="FILE", help="write the leaks here")
    check.add_argument(
        "--cache", type=Path, metavar="FILE", help="keep fingerprints of images here, to go on after a stop"
    )
    _comparison(check)
    check.set_defaults(run=run_check)

    stats = subcommand(parts, "stats", "describe corpora", _STATS)
    stats.add_argument("corpora", type=Path, nargs="+", metavar="FILE", help="labelled rows")
    stats.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    stats.set_defaults(run=run_stats)


def _comparison(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against-images", metavar="WHERE", help="pictures of benchmarks: a folder or a hub id (default: beside them)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.6,
        metavar="JACCARD",
        help="from which texts are nearly the same (default 0.6)",
    )


def run_sources(given: argparse.Namespace) -> None:
    from guard_training.corpus.sources.registry import SOURCES

    table = Table(title="Sources of GuardReasoner-VLTrain", title_justify="left", show_lines=True)
    for name in ("source", "modality", "share", "licence", "where", "schema and label rule"):
        table.add_column(name, no_wrap=name in ("source", "modality"), overflow="fold")
    listed = [source.to_json() for source in SOURCES.values()]
    for line in listed:
        shown = (line["name"], line["modality"], f"{line['share']:g}", line["licence"], line["home"], line["rule"])
        table.add_row(*map(escape, shown))
    terminal().print(table)
    if given.json:
        write_json(given.json, listed)


def run_build(given: argparse.Namespace) -> None:
    from guard_training.corpus.leakage import Fingerprints
    from guard_training.corpus.sources.build import PAPER_IMAGE_TEST, Plan, build, write_corpus
    from guard_training.corpus.sources.parts import read_part
    from guard_training.corpus.statistics import statistics, steps_table
    from guard_training.evaluation.against import evaluation_sets

    copies = _copies(given.source, tuple(given.images))
    paper = {copy.source.name: copy.source.share for copy in copies} if given.paper_shares else {}
    image_test = given.image_test if given.image_test is not None else PAPER_IMAGE_TEST if given.paper_shares else 0.0
    shares = paper | _shares(given.share, {copy.source.name for copy in copies})
    skipped = Skipped()
    given.output.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[Part]] = {}
    with _progress() as progress, Fingerprints(given.output / "fingerprints.jsonl") as prints:
        track = _track(progress)
        plan = Plan(
            seed=given.seed,
            shares=shares,
            image_test=image_test,
            against=evaluation_sets(given.against, prints, skipped, images=given.against_images, track=track),
            threshold=given.threshold,
            remove_leaks=not given.keep_leaks,
            near=given.near_duplicates,
        )
        for copy in copies:
            parts.setdefault(copy.source.name, []).append(read_part(copy, given.output, _watch(progress)))
        built = build(parts, plan, prints, track)
    write_corpus(built, plan, given.output)
    console = terminal()
    console.print(_counts_table(built), steps_table(statistics(built.train)))
    skipped.reasons += built.bad
    skipped.tell(console, given.output / "skipped.txt")
    console.print(f"{given.output / 'train.jsonl'}: {len(built.train):,} rows", markup=False, highlight=False)


def run_check(given: argparse.Namespace) -> None:
    from guard_training.corpus.leakage import Fingerprints, find_leaks, readable
    from guard_training.evaluation.against import evaluation_sets

    if given.output and len(given.train) > 1:
        raise CorpusError("--output writes one training file: check them one by one")
    skipped = Skipped()
    with _progress() as progress, Fingerprints(given.cache) as prints:
        track = _track(progress)
        rows = readable([row for file in given.train for row in read_good_rows(file, skipped)], prints, skipped, track)
        against = evaluation_sets(given.against, prints, skipped, images=given.against_images, track=track)
        leaks = find_leaks(rows, against, threshold=given.threshold, fingerprints=prints, track=track)
    console = terminal()
    console.print(_leaks_table(rows, leaks))
    skipped.tell(console, given.output and given.output.with_name(f"{given.output.stem}.skipped.txt"))
    if given.json:
        write_json(given.json, [asdict(leak) for leak in leaks])
    gone = {leak.id for leak in leaks}
    if given.output:
        folder = given.output.parent
        kept = [bring_image(row, folder) for row in rows if row.id not in gone]
        write_whole(given.output, rows_to_jsonl(kept, folder).encode())
    elif gone:
        raise LeaksFound(
            f"{len(gone)} of {len(rows)} training rows are in an evaluation set; --output FILE writes the others"
        )


def run_stats(given: argparse.Namespace) -> None:
    from guard_training.corpus.statistics import labels_table, statistics, steps_table

    skipped = Skipped()
    with _progress() as progress:
        files = progress.track(given.corpora, description="reading")
        rows = [row for file in files for row in read_good_rows(file, skipped)]
        found = statistics(_track(progress)(rows, "counting"))
    console = terminal()
    console.print(steps_table(found), labels_table(found))
    skipped.tell(console)
    if given.json:
        write_json(given.json, found.to_json())


def _copies(given: Sequence[str], images: tuple[Path, ...]) -> list[Given]:
    from guard_training.corpus.sources.parts import Given
    from guard_training.corpus.sources.registry import find

    copies = []
    for each in given:
        name, equals, place = each.partition("=")
        if not equals or not place:
            raise CorpusError(f"--source {each}: it takes the form NAME=COPY; `guard-train corpus sources` lists names")
        copies.append(Given(find(name), place, images))
    names = [(copy.source.name, copy.name) for copy in copies]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise CorpusError(f"two copies of {twice[0]} are called {twice[1]}: rename one, so that ids stay apart")
    return copies


def _shares(given: Sequence[str], known: set[str]) -> dict[str, float]:
    shares = {}
    for each in given:
        name, _, part = each.partition("=")
        try:
            shares[name] = float(part)
        except ValueError:
            raise CorpusError(f"--share {each}: it takes the form NAME=PART, such as hod=0.6") from None
        if name not in known:
            raise CorpusError(f"--share {each}: no --source of that name")
    return shares


def _counts_table(built: Built) -> Table:
    table = Table(title="From copies to corpus", title_justify="left")
    for name in ("source", "read", "bad", "elsewhere", "duplicates", "leaks", "train", "test"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for name, count in built.counts.items():
        figures = (
            count.read, count.bad, sum(count.foreign.values()), count.duplicates, count.leaks, count.train, count.test,
        )  # fmt: skip
        table.add_row(name, *(f"{figure:,}" for figure in figures))
    return table


def _leaks_table(rows: Sequence[Row], leaks: Sequence[Leak]) -> Table:
    sources = {row.id: row.source for row in rows}
    groups = Counter((leak.where, sources[leak.id], leak.kind) for leak in leaks)
    table = Table(title=f"{len(leaks):,} leaks", title_justify="left")
    for name in ("evaluation set", "source", "kind", "rows", "such as"):
        table.add_column(name, justify="right" if name == "rows" else "left")
    for group, count in sorted(groups.items()):
        example = next(leak for leak in leaks if (leak.where, sources[leak.id], leak.kind) == group)
        table.add_row(*map(escape, group), f"{count:,}", escape(f"{example.id} = {example.other}"))
    return table


def _progress() -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _watch(progress: Progress) -> Callable[[Iterable[_T], int | None, str], Iterable[_T]]:
    return lambda items, total, name: progress.track(items, total=total, description=name)


def _track(progress: Progress) -> Track:
    return lambda rows, name: progress.track(rows, total=len(rows), description=name)
