"""Rows of a training file that an evaluation set also holds, and rows that a corpus holds twice.

Text rows are compared by their prompt, and pairs also as a whole (prompt and answer), because answers alone repeat
across data sets (refusals). Rows with an image are compared by the image alone: their questions repeat ("What does
this picture show?") over thousands of images.

- exact: the words of the text (NFKC, lower case, without punctuation), or the bytes of the image;
- near: Jaccard of 3-word shingles >= ``threshold``; for images, of the edges of a difference hash (dHash).

Both joins are exact: a text is indexed under its rarest shingles only, as many as any match must hit (prefix
filtering, Chaudhuri et al. 2006), so that nothing is missed as with MinHash, and it is also the faster of the two.

Never holds text: leaks name ids.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from guard_training.corpus.rows import Row, Skipped
from guard_training.journal import Journal

Kind = Literal["text exact", "text near", "image exact", "image near"]
Shingles = frozenset[int]
#: wraps a loop over rows, so that a caller can show how far it is: (rows, what is done) -> rows
Track = Callable[[Sequence[Row], str], Iterable[Row]]

#: words; scripts without spaces count by character
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
_SHINGLE = 3
#: dHash: 16 x 16 comparisons of neighbours, of which fewer than _EDGES edges say too little to compare by.
#: An edge is a step of more than _STEP grey levels, so that noise in a flat area makes none.
_SIDE, _STEP, _EDGES, _ALIKE = 16, 4, 24, 0.8
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Leak:
    """Row ``id`` holds what row ``other`` of ``where`` holds. ``similarity`` is 1 for exact copies."""

    id: str
    other: str
    where: str
    kind: Kind
    similarity: float


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """``digest`` is the SHA-256 of the image's bytes, ``edges`` its dHash (256 bits, packed)."""

    digest: str
    edges: bytes

    @property
    def comparable(self) -> bool:
        """Whether there is enough in the picture to call another one alike."""
        return int.from_bytes(self.edges, "big").bit_count() >= _EDGES


def words(text: str) -> tuple[str, ...]:
    """The words of a text; what has none (emoji, punctuation) is one word."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return tuple(_WORD.findall(plain)) or tuple(plain.split())


def shingles(text: str) -> Shingles:
    """Hashes of every run of three words; a shorter text is one shingle."""
    found = words(text)
    runs = zip(found, found[1:], found[2:], strict=False) if len(found) >= _SHINGLE else (found,)
    return frozenset(map(hash, runs))


class NearIndex:
    """Sets of shingles to be found again by similar sets."""

    def __init__(self, threshold: float, frequency: Mapping[int, int]) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"the threshold of similarity must lie above 0 and be at most 1, not {threshold}")
        self._threshold, self._frequency = threshold, frequency
        self._sets: list[tuple[str, Shingles]] = []
        self._index: dict[int, list[int]] = defaultdict(list)

    def add(self, key: str, text: Shingles) -> None:
        # A match shares at least ceil(threshold * size) shingles, so it hits one of all but that many, less one.
        needed = len(text) - math.ceil(self._threshold * len(text) - 1e-9) + 1
        for shingle in sorted(text, key=lambda s: (self._frequency.get(s, 0), s))[:needed]:
            self._index[shingle].append(len(self._sets))
        self._sets.append((key, text))

    def matches(self, text: Shingles) -> Iterator[tuple[str, float]]:
        """Keys of all sets with a Jaccard similarity of at least the threshold, in order of adding."""
        candidates = {number for shingle in text if shingle in self._index for number in self._index[shingle]}
        for number in sorted(candidates):
            key, other = self._sets[number]
            shared = len(text & other)
            similarity = shared / (len(text) + len(other) - shared)
            if similarity >= self._threshold - 1e-9:
                yield key, similarity


def fingerprint(path: Path) -> Fingerprint:
    """Of one image. Raises ``OSError`` where it cannot be opened."""
    with Image.open(path) as image:
        image.draft("L", (4 * _SIDE, 4 * _SIDE))
        small = image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX)
    grey = np.asarray(small, dtype=np.int16)
    edges = np.packbits(grey[:, 1:] - grey[:, :-1] > _STEP)
    return Fingerprint(hashlib.sha256(path.read_bytes()).hexdigest(), edges.tobytes())


class Fingerprints:
    """Fingerprints of rows' images, kept in a journal so that a second run need not decode them again.

    A context manager, to close the journal; without one (``cache`` None) that is not needed.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self._journal = Journal(cache) if cache else None
        kept: Iterable[dict[str, Any]] = self._journal or ()
        self._known = {line["id"]: Fingerprint(line["digest"], bytes.fromhex(line["edges"])) for line in kept}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._journal:
            self._journal.__exit__()

    def __call__(self, path: Path) -> Fingerprint:
        status = path.stat()
        key = f"{path}:{status.st_size}:{status.st_mtime_ns}"
        if key not in self._known:
            found = self._known[key] = fingerprint(path)
            if self._journal:
                self._journal.append({"id": key, "digest": found.digest, "edges": found.edges.hex()})
        return self._known[key]


def readable(
    rows: Sequence[Row], fingerprints: Fingerprints, skipped: Skipped, track: Track = lambda rows, _: rows
) -> list[Row]:
    """The rows without an image, or with one that can be opened; the others go to ``skipped``."""
    kept = []
    for row in track(rows, "images"):
        try:
            if row.image:
                fingerprints(row.image)
            kept.append(row)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            skipped(
                f"{row.name}: its image {row.image.name if row.image else ''} cannot be read ({type(error).__name__})"
            )
    return kept


def find_leaks(
    rows: Sequence[Row],
    against: Mapping[str, Sequence[Row]],
    *,
    threshold: float = 0.6,
    fingerprints: Fingerprints | None = None,
    track: Track = lambda rows, _: rows,
) -> list[Leak]:
    """Of every row, the closest match in each evaluation set (``against``: name to rows), in the order of the rows."""
    prints = fingerprints or Fingerprints()
    found: list[Leak] = []
    for name, evaluated in against.items():
        text = [
            leak for view in (_prompt, _whole) for leak in _text_leaks(rows, name, evaluated, view, threshold, track)
        ]
        image = _image_leaks(rows, name, evaluated, prints, track)
        best: dict[str, Leak] = {}
        for leak in (*text, *image):
            if leak.id not in best or leak.similarity > best[leak.id].similarity:
                best[leak.id] = leak
        found += best.values()
    order = {row.id: number for number, row in enumerate(rows)}
    return sorted(found, key=lambda leak: order[leak.id])


def _prompt(row: Row) -> str:
    return "" if row.image else row.prompt


def _whole(row: Row) -> str:
    return "" if row.image or not row.response else f"{row.prompt}\n{row.response}"


def _text_leaks(
    rows: Sequence[Row], name: str, evaluated: Sequence[Row], view: Callable[[Row], str], threshold: float, track: Track
) -> Iterator[Leak]:
    texts = [(row.id, view(row)) for row in evaluated]
    sets = [(id, shingles(text)) for id, text in texts if text.strip()]
    exact = {words(text): id for id, text in reversed(texts) if text.strip()}
    index = NearIndex(threshold, Counter(shingle for _, found in sets for shingle in found))
    for id, found in sets:
        index.add(id, found)
    for row in track(rows if sets else [], f"text against {name}"):
        text = view(row)
        if not text.strip():
            continue
        if other := exact.get(words(text)):
            yield Leak(row.id, other, name, "text exact", 1.0)
        elif near := max(index.matches(shingles(text)), key=lambda match: match[1], default=None):
            yield Leak(row.id, near[0], name, "text near", round(near[1], 3))


def _image_leaks(
    rows: Sequence[Row], name: str, evaluated: Sequence[Row], prints: Fingerprints, track: Track
) -> Iterator[Leak]:
    known = [(row.id, prints(row.image)) for row in track([row for row in evaluated if row.image], name) if row.image]
    pictured = [row for row in rows if row.image] if known else []
    found = [(row.id, prints(row.image)) for row in track(pictured, f"images against {name}") if row.image]
    exact = {print.digest: id for id, print in reversed(known)}
    others = [(id, print) for id, print in known if print.comparable]
    rest = []
    for id, print in found:
        if print.digest in exact:
            yield Leak(id, exact[print.digest], name, "image exact", 1.0)
        elif print.comparable:
            rest.append((id, print))
    for mine, theirs, similarity in alike([print for _, print in rest], [print for _, print in others]):
        yield Leak(rest[mine][0], others[theirs][0], name, "image near", round(similarity, 3))


def alike(left: Sequence[Fingerprint], right: Sequence[Fingerprint]) -> Iterator[tuple[int, int, float]]:
    """For each of ``left`` that has one: the closest of ``right`` by shared edges, as indices and Jaccard."""
    if not left or not right:
        return
    ours, theirs = _packed(left), _packed(right)
    sizes = np.bitwise_count(theirs).sum(axis=1, dtype=np.int32)
    for start in range(0, len(ours), _CHUNK):
        part = ours[start : start + _CHUNK]
        shared = np.zeros((len(part), len(theirs)), dtype=np.int32)
        for word in range(theirs.shape[1]):
            shared += np.bitwise_count(part[:, None, word] & theirs[None, :, word])
        union = np.bitwise_count(part).sum(axis=1, dtype=np.int32)[:, None] + sizes[None] - shared
        similarity = shared / np.maximum(union, 1)
        closest = similarity.argmax(axis=1)
        for row, other in enumerate(closest):
            if similarity[row, other] >= _ALIKE:
                yield start + row, int(other), float(similarity[row, other])


def _packed(prints: Sequence[Fingerprint]) -> NDArray[np.uint64]:
    return np.frombuffer(b"".join(print.edges for print in prints), dtype=np.uint64).reshape(len(prints), -1)


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Row ``id`` says again what row ``first`` says; ``contradicts`` where their labels differ."""

    id: str
    first: str
    contradicts: bool


def find_duplicates(
    rows: Sequence[Row],
    *,
    near: float | None = None,
    fingerprints: Fingerprints | None = None,
    track: Track = lambda rows, _: rows,
) -> list[Duplicate]:
    """Every row whose words (prompt and answer) and image bytes an earlier row has; with ``near``, also text rows
    of that similarity. A row that only says on which side it is unlabelled does not contradict."""
    prints = fingerprints or Fingerprints()
    seen: dict[tuple[object, ...], Row] = {}
    texts = {row.id: shingles(f"{row.prompt}\n{row.response or ''}") for row in rows if near and not row.image}
    index = NearIndex(near or 1.0, Counter(shingle for text in texts.values() for shingle in text))
    by_id: dict[str, Row] = {}
    found = []
    for row in track(rows, "duplicates"):
        digest = prints(row.image).digest if row.image else ""
        first = seen.setdefault((words(row.prompt), words(row.response or ""), digest), row)
        if first is row and row.id in texts:
            match = next(index.matches(texts[row.id]), None)
            first = by_id[match[0]] if match else row
            if not match:
                index.add(row.id, texts[row.id])
                by_id[row.id] = row
        if first is not row:
            found.append(Duplicate(row.id, first.id, _contradicts(row, first)))
    return found


def _contradicts(row: Row, other: Row) -> bool:
    pairs = ((row.request, other.request), (row.response_label, other.response_label))
    return any(mine and theirs and mine != theirs for mine, theirs in pairs)
