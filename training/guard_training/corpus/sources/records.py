"""Opening a copy of a data set: its raw records, each with the place where it stands.

A copy is a file (.jsonl, .json, .csv or .tsv, each also .gz, or .parquet), a folder that holds such files, a folder
made by ``datasets.save_to_disk``, a folder of images (with or without the metadata file of ``datasets``), or ``hub``.
Images stay undecoded. A line that cannot be read is a record with an ``error``, and reading goes on after it.

Refuses: a copy without the files or the split that the source trains on; it never falls back to a test split.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, cast

import datasets
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet as parquet  # type: ignore[import-untyped]

from guard_training.corpus.rows import CorpusError, encodable

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
#: the longest CSV field; jailbreaks are longer than Python's default of 128 KiB
_LONGEST = 1 << 24
_BATCH = 64


@dataclass(frozen=True, slots=True)
class Record:
    """``where`` is ``file:line`` inside the copy (from 1), ``folder`` what its image paths are relative to, if any."""

    where: str
    folder: Path | None
    value: Mapping[str, Any]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Hub:
    """A data set on the hub: its id, its configuration, and the splits to train on."""

    id: str
    config: str | None
    splits: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Copy:
    """``total`` is the number of records where it is known beforehand."""

    records: Iterator[Record]
    total: int | None = None


def open_copy(place: Path, patterns: Sequence[str], splits: Sequence[str]) -> Copy:
    """A local copy. ``patterns`` name the training files inside a folder, best first; ``splits`` its saved splits."""
    if not place.exists():
        raise CorpusError(f"{place}: no such file or folder")
    if place.is_file():
        return Copy(_file(place, place.name))
    if (place / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(place))
        return _splits(saved, splits, place)
    if (place / "state.json").exists():
        return _saved([(place.name, datasets.load_from_disk(str(place)))], place)
    if files := training_files(place, patterns):
        return Copy(record for file in files for record in _file(file, str(file.relative_to(place))))
    if not _tables(place) and (pictures := _pictures(place)):
        return Copy(_folder(place, pictures), len(pictures))
    raise CorpusError(f"{place}: none of the files to train on ({', '.join(patterns) or 'images'}); name one of them")


def open_hub(hub: Hub, revision: str | None = None) -> Copy:
    """The training splits of a data set on the hub, through the cache of ``datasets``. Raises ``CorpusError``."""
    try:
        loaded = [
            (f"{hub.id}/{split}", datasets.load_dataset(hub.id, hub.config, split=split, revision=revision))
            for split in hub.splits
        ]
    except Exception as error:  # of many kinds: no connection, a gated data set, another revision or layout
        raise CorpusError(
            f"{hub.id}: cannot be had from the hub ({type(error).__name__}); accept its terms and `hf auth login` "
            "where it is gated, or give a copy"
        ) from error
    return _saved(loaded, None)


def training_files(place: Path, patterns: Sequence[str]) -> list[Path]:
    """The files in a folder that the first matching pattern names, in order."""
    for pattern in patterns:
        if files := sorted(file for file in place.glob(pattern) if file.is_file() and _is_table(file)):
            return files
    return []


def _is_table(file: Path) -> bool:
    return file.name.endswith(TABLES)


def _tables(place: Path) -> bool:
    return any(_is_table(file) for file in place.rglob("*") if file.is_file())


def _pictures(place: Path) -> list[Path]:
    # HOD's repository holds every image twice: by category, and all together without one.
    root = next((found for name in ("dataset/class", "class") if (found := place / name).is_dir()), place)
    return sorted(file for file in root.rglob("*") if file.suffix.lower() in IMAGES)


def _folder(place: Path, pictures: Sequence[Path]) -> Iterator[Record]:
    for file in pictures:
        path = file.relative_to(place)
        yield Record(str(path), place, {"image": str(path), "folders": path.parts[:-1]})


def _splits(saved: Any, splits: Sequence[str], place: Path) -> Copy:
    missing = [split for split in splits if split not in saved]
    if missing:
        raise CorpusError(f"{place}: no split {missing[0]!r}, only {', '.join(saved)}")
    return _saved([(split, saved[split]) for split in splits], place)


def _saved(parts: Sequence[tuple[str, Any]], folder: Path | None) -> Copy:
    def records() -> Iterator[Record]:
        for name, dataset in parts:
            for number, row in enumerate(_undecoded(dataset), 1):
                yield Record(f"{name}:{number}", folder, row)

    return Copy(records(), sum(len(dataset) for _, dataset in parts))


def _undecoded(dataset: Any) -> Any:
    """With images as the bytes that they are stored as: decoding and encoding again would lose some."""
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            dataset = dataset.cast_column(name, type(feature)(datasets.Image(decode=False)))
    return dataset


def _file(file: Path, name: str) -> Iterator[Record]:
    kind = file.name.removesuffix(".gz").rpartition(".")[2].lower()
    read = {"jsonl": _json_lines, "json": _json, "csv": _csv, "tsv": _csv, "parquet": _parquet}.get(kind)
    if read is None:
        raise CorpusError(f"{file}: neither {', '.join(TABLES)} nor a folder")
    records = _to_the_break(read, file, name)
    return map(_named, records) if file.name in _METADATA else records


def _to_the_break(read: Callable[[Path, str], Iterator[Record]], file: Path, name: str) -> Iterator[Record]:
    """As far as the file is whole; where it breaks off, a record that says so."""
    try:
        yield from read(file, name)
    except (EOFError, OSError, zlib.error, pyarrow.ArrowException) as error:
        # Arrow and gzip say with a bare OSError that data is spoilt; one with a number is the disk's.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        yield Record(f"{name}:end", file.parent, {}, f"the file is broken or cut off ({type(error).__name__})")


def _named(record: Record) -> Record:
    """A row of ``datasets``' metadata file: its image is named by ``file_name``."""
    value = {**record.value, "image": record.value["file_name"]} if "file_name" in record.value else record.value
    return Record(record.where, record.folder, value, record.error)


def _open(file: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb"))


def _json_lines(file: Path, name: str) -> Iterator[Record]:
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _json_record(line, f"{name}:{number}", file.parent)


def _json_record(line: bytes, where: str, folder: Path) -> Record:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return Record(where, folder, {}, "not JSON, or cut off")
    return _object(found, where, folder)


def _object(found: Any, where: str, folder: Path) -> Record:
    return Record(where, folder, found) if isinstance(found, dict) else Record(where, folder, {}, "not a JSON object")


def _json(file: Path, name: str) -> Iterator[Record]:
    """One list of objects, alone or as the only list of an object; or JSON lines under the wrong name."""
    with _open(file) as opened:
        written = opened.read()
    try:
        found = json.loads(written)
    except (ValueError, RecursionError) as error:
        if "Extra data" not in str(error):
            raise CorpusError(f"{file}: not JSON ({type(error).__name__}); is the file complete?") from None
        yield from _json_lines(file, name)
        return
    lists = [part for part in found.values() if isinstance(part, list)] if isinstance(found, dict) else [found]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise CorpusError(f"{file}: not one list of records")
    for number, part in enumerate(lists[0], 1):
        yield _object(part, f"{name}:{number}", file.parent)


def _csv(file: Path, name: str) -> Iterator[Record]:
    csv.field_size_limit(_LONGEST)
    with _open(file) as opened:
        # A byte that is no UTF-8 becomes half of a surrogate pair, by which its row is told.
        lines = TextIOWrapper(opened, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.DictReader(lines, delimiter="\t" if ".tsv" in file.name else ",")
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Record(f"{name}:{reader.line_num}", file.parent, {}, f"not CSV ({error})")
                continue
            uneven = None in row or None in row.values()
            reason = "another number of columns than its header" if uneven else None
            if not encodable("".join(value for value in row.values() if isinstance(value, str))):
                reason = "not UTF-8"
            yield Record(f"{name}:{reader.line_num}", file.parent, row, reason)


def _parquet(file: Path, name: str) -> Iterator[Record]:
    number = 0
    with parquet.ParquetFile(file) as opened:
        for batch in opened.iter_batches(batch_size=_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield Record(f"{name}:{number}", file.parent, row)
