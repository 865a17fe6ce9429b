"""Copies of data sets read into rows, one part file each.

A part is a journal: a killed build goes on behind the last row that it wrote, and a copy that was read to its end
is not opened again until it changes. Images are copied into ``images/<source>/`` beside the parts, under the digest
of their bytes; what is no PNG, JPEG or WebP (the formats of the guard) becomes PNG.

Ids are ``source:copy/file:line``, so that every row can be found in the copy that it came from.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from guard_training.corpus.rows import CorpusError, Row, Skipped, encodable, read_good_rows, row_to_json
from guard_training.corpus.sources.fields import Fields, Foreign, Picture, Unusable
from guard_training.corpus.sources.records import Copy, Record, open_copy, open_hub
from guard_training.corpus.sources.registry import Source
from guard_training.journal import Journal
from guard_training.rowfile import write_json, write_whole

_SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
_IMAGES = "images"
_HUB = "hub"
_MISSING = "its image is not in the copy (--images names another folder to look in)"
#: wraps the loop over a copy's records: (records, how many or None, name) -> records
Watch = Callable[[Iterable[Record], int | None, str], Iterable[Record]]


@dataclass(frozen=True, slots=True)
class Given:
    """A source and where its copy lies: a path, ``hub`` or ``hub:REVISION``."""

    source: Source
    place: str
    images: tuple[Path, ...] = ()

    @property
    def from_hub(self) -> bool:
        return self.place == _HUB or self.place.startswith(_HUB + ":")

    @property
    def name(self) -> str:
        """What tells two copies of one source apart."""
        return self.place.replace(":", "@") if self.from_hub else Path(self.place).name

    def open(self) -> Copy:
        if not self.from_hub:
            hub = self.source.hub
            return open_copy(Path(self.place), self.source.files, hub.splits if hub else ("train",))
        if self.source.hub is None:
            raise CorpusError(
                f"{self.source.name} cannot be read straight from the hub: download and unpack "
                f"{self.source.home}, and give its path"
            )
        return open_hub(self.source.hub, self.place.partition(":")[2] or None)

    def state(self) -> str:
        """What changes when the copy does."""
        if self.from_hub:
            return self.place
        place = Path(self.place)
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        seen = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
        return hashlib.sha256(json.dumps([seen, [str(path) for path in self.images]]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Part:
    """What one copy gave: rows, reasons of bad records, and how many sound ones belong elsewhere, by where."""

    rows: list[Row]
    bad: list[str]
    foreign: Counter[str]


def read_part(given: Given, folder: Path, watch: Watch = lambda records, total, name: records) -> Part:
    """All rows of a copy, through its part file in ``folder``. Raises ``CorpusError`` where not one can be used."""
    stem = f"part-{given.source.name}-{given.name}"
    good, rest, done = (folder / f"{stem}{end}" for end in (".jsonl", ".rest.jsonl", ".state.json"))
    state = given.state()
    before = json.loads(done.read_text()) if done.exists() else {}
    if before.get("state") != state:
        good.unlink(missing_ok=True)
        write_json(done, {"state": state, "complete": False})
    if before != {"state": state, "complete": True}:
        # What was of no use is looked at again: its image may have been unpacked since.
        rest.unlink(missing_ok=True)
        complete = _fill(given, good, rest, watch)
        write_json(done, {"state": state, "complete": complete})
    with Journal(rest) as lines:
        others = list(lines)
    skipped = Skipped([f"{line['id']}: {line['reason']}" for line in others if "reason" in line])
    rows = read_good_rows(good, skipped)
    if not rows:
        found = skipped.reasons[0] if skipped.reasons else "it is empty, or all of it belongs to other sources"
        raise CorpusError(f"{given.source.name}: no row to use in {given.place}: {found}\n{given.source.rule}")
    return Part(rows, skipped.reasons, Counter(line["foreign"] for line in others if "foreign" in line))


def _fill(given: Given, good: Path, rest: Path, watch: Watch) -> bool:
    """Reads the copy behind what was read of it. False where images are missing, so that it is worth another try."""
    copy, folder, complete = given.open(), good.parent, True
    with Journal(good) as rows, Journal(rest) as others:
        for record in watch(copy.records, copy.total, given.source.name):
            id = f"{given.source.name}:{given.name}/{record.where}"
            if id in rows.done or id in others.done:
                continue
            try:
                rows.append(row_to_json(_row(id, given, record, folder), folder))
            except Foreign as other:
                others.append({"id": id, "foreign": str(other)})
            except Unusable as reason:
                others.append({"id": id, "reason": str(reason)})
                complete = complete and str(reason) != _MISSING
    return complete


def _row(id: str, given: Given, record: Record, folder: Path) -> Row:
    if record.error:
        raise Unusable(record.error)
    found = given.source.read(record.value)
    if given.source.labelled and found.request is None and found.response_label is None:
        raise Unusable("no label on either side")
    if not found.prompt and found.image is None:
        raise Unusable("neither a prompt nor an image")
    for words in (found.prompt, found.response, found.category, found.rationale):
        if words and not encodable(words):
            raise Unusable("its text holds half of a surrogate pair")
    target = folder / _IMAGES / given.source.name
    image = None if found.image is None else _keep(_bytes(found.image, record, given), target)
    return _to_row(id, given.source, found, image)


def _to_row(id: str, source: Source, found: Fields, image: Path | None) -> Row:
    return Row(
        id=id,
        source=source.name,
        prompt=found.prompt,
        request=found.request,
        response=found.response,
        response_label=found.response_label,
        category=found.category,
        licence=source.licence,
        image=image,
        rationale=found.rationale,
    )


def _bytes(picture: Picture, record: Record, given: Given) -> bytes:
    if isinstance(picture, bytes):
        return picture
    # VLGuard's train.json names its images from inside train/.
    inside = Path(record.where.rpartition(":")[0]).stem.partition(".")[0]
    own = [record.folder, record.folder / inside] if record.folder else []
    roots = [root.resolve() for root in (*given.images, *own)]
    for root in roots:
        try:
            path = (root / picture).resolve()
            if path.is_relative_to(root) and path.is_file():
                return path.read_bytes()
        except (OSError, ValueError):  # a name too long, or with a null byte
            continue
    raise Unusable(_MISSING)


def _keep(data: bytes, target: Path) -> Path:
    """The image's file in ``target``, made if it is not there yet. Raises ``Unusable`` for what is no image."""
    try:
        with Image.open(BytesIO(data)) as image:
            image.load()
            suffix = _SUFFIXES.get(image.format or "")
            if suffix is None:
                converted = BytesIO()
                image.convert("RGB").save(converted, "PNG")
                data, suffix = converted.getvalue(), ".png"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unusable(f"its image cannot be decoded ({type(error).__name__})") from None
    path = target / f"{hashlib.sha256(data).hexdigest()[:32]}{suffix}"
    if not path.exists():
        write_whole(path, data)
    return path
