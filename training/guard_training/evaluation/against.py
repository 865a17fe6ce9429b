"""The sets that a model is measured on, as the commands take them with ``--against``: to keep their rows out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from guard_training.corpus.leakage import Fingerprints, Track, readable
from guard_training.corpus.rows import CorpusError, Row, Skipped, read_good_rows
from guard_training.evaluation.benchmarks import BENCHMARKS, fetch_images, read_benchmark

_RELEASED = {f"{name}.json": benchmark for name, benchmark in BENCHMARKS.items()}


def evaluation_files(places: Sequence[Path]) -> list[Path]:
    """Files as they are named, and the paper's benchmarks in a folder; raises ``CorpusError`` for one without any."""
    files: list[Path] = []
    for place in places:
        inside = [place / name for name in _RELEASED if (place / name).is_file()] if place.is_dir() else [place]
        if not inside:
            raise CorpusError(f"--against {place}: no {', '.join(_RELEASED)} in it; name its files")
        files += inside
    return files


def evaluation_sets(
    places: Sequence[Path],
    prints: Fingerprints,
    skipped: Skipped,
    *,
    images: str | None = None,
    track: Track = lambda rows, _: rows,
) -> dict[str, list[Row]]:
    """The rows of labelled files and of the paper's benchmarks as released, by file name, or by path where two have
    the same name. ``images``: a folder or a hub id with the benchmarks' pictures, where they are not beside them.

    Raises ``CorpusError`` where a file has no row to compare with: it would find no leak, whatever leaks.
    """
    files = evaluation_files(places)
    names, pictures = [file.name for file in files], None
    if images and any(name in _RELEASED and _RELEASED[name].hub_label is not None for name in names):
        pictures = Path(images) if Path(images).is_dir() else fetch_images(images)
    sets = {}
    for file in files:
        bad = len(skipped.reasons)
        benchmark = _RELEASED.get(file.name)
        read = read_benchmark(benchmark, file, skipped, images=pictures) if benchmark else read_good_rows(file, skipped)
        rows = readable(read, prints, skipped, track)
        if not rows:
            why = f": {skipped.reasons[bad]}" if len(skipped.reasons) > bad else ""
            raise CorpusError(f"--against {file}: no row to compare with{why}")
        sets[str(file) if names.count(file.name) > 1 else file.name] = rows
    return sets
