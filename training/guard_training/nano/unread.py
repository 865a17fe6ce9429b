"""Verdicts on pictures of text when the guard is given one reader's text or another's, or none.

Everything but the reader is the same: rows, weights, the worker's own service. What a reader found is kept on disk.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from guard_middleware.errors import GuardError
from guard_middleware.types import Label
from guard_middleware.wire import ModerationRequest
from guard_middleware.worker.engine import BatchEngine
from guard_middleware.worker.metrics import Metrics
from guard_middleware.worker.service import GuardService, ServiceLimits
from guard_training.corpus.conversation import conversation
from guard_training.corpus.rows import Row, sample
from guard_training.nano.drawn import DrawnText, Read
from guard_training.nano.reading import similarity

#: FigStep's topics that are advice, not harm.
ADVICE = ("Financial Advice", "Health Consultation", "Legal Opinion")
_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Figures:
    """One reader on one source. A guard error is no verdict: it counts as wrong on either side.

    ``similarity`` is to what the first reader found; ``seconds`` are the median of reading one picture.
    """

    reader: str
    source: str
    harmful: int
    unharmful: int
    recall: float | None
    false_positives: float | None
    similarity: float
    seconds: float


class Timed:
    """A reader with what it found kept in ``file``, and the seconds of each picture that it had to read."""

    def __init__(self, read: Read, file: Path) -> None:
        self._read, self.seconds = read, list[float]()
        self._drawn = DrawnText(file, self._timed)

    def _timed(self, image: bytes) -> str:
        start = time.perf_counter()
        text = self._read(image)
        self.seconds.append(time.perf_counter() - start)
        return text

    def __call__(self, image: bytes) -> str:
        return self._drawn(image)


@dataclass(frozen=True, slots=True)
class _Reader:
    texts: Mapping[bytes, str]

    def read(self, image: bytes, timeout: float | None = None) -> str:
        return self.texts[image]


def chosen(rows: Sequence[Row], limit: int) -> list[Row]:
    """At most ``limit`` pictures of each source, half of each label where it has both; FigStep without advice."""
    kept = [row for row in rows if row.image and row.request and row.category not in ADVICE]
    labels: dict[str, set[Label]] = defaultdict(set)
    for row in kept:
        assert row.request is not None
        labels[row.source].add(row.request)
    out: list[Row] = []
    for source, found in labels.items():
        for label in sorted(found):
            out += sample([row for row in kept if (row.source, row.request) == (source, label)], limit // len(found))
    return out


async def verdicts(rows: Sequence[Row], engine: BatchEngine, texts: Mapping[bytes, str]) -> list[Label | None]:
    """What the guard says of each row's request, given the texts of the images; None for a guard error."""
    limits = ServiceLimits(reader_seconds=_SECONDS, reads=len(rows) + 1)
    service = GuardService(engine, Metrics(), reader=_Reader(texts), read_by_default=True, limits=limits)
    try:
        said: list[Label | None] = []
        for number, row in enumerate(rows):
            request = ModerationRequest(str(number), conversation(row), "input", _SECONDS)
            try:
                verdict = await service.moderate(request, asyncio.get_running_loop().time() + _SECONDS)
                said.append(verdict.request)
            except GuardError:
                said.append(None)
        return said
    finally:
        await service.aclose()


def compare(
    rows: Sequence[Row],
    engine: Callable[[], BatchEngine],
    readers: Mapping[str, Read],
    advance: Callable[[], None] = lambda: None,
) -> list[Figures]:
    """Every reader on every source of ``rows``, all of which have an image; ``advance`` is told of each reading."""
    images = [row.image.read_bytes() for row in rows if row.image]
    if len(images) != len(rows):
        raise ValueError("every row needs an image")
    made = engine()
    reference: dict[bytes, str] = {}
    figures = []
    for name, read in readers.items():
        texts = {}
        for image in images:
            texts[image] = read(image)
            advance()
        reference = reference or texts
        said = asyncio.run(verdicts(rows, made, texts))
        seconds = sorted(getattr(read, "seconds", [])) or [0.0]
        for source in sorted({row.source for row in rows}):
            picked = [n for n, row in enumerate(rows) if row.source == source]
            harmful = [said[n] == "harmful" for n in picked if rows[n].request == "harmful"]
            unharmful = [said[n] != "unharmful" for n in picked if rows[n].request == "unharmful"]
            alike = [_alike(texts[images[n]], reference[images[n]]) for n in picked]
            figures.append(
                Figures(
                    reader=name,
                    source=source,
                    harmful=len(harmful),
                    unharmful=len(unharmful),
                    recall=sum(harmful) / len(harmful) if harmful else None,
                    false_positives=sum(unharmful) / len(unharmful) if unharmful else None,
                    similarity=sum(alike) / len(alike),
                    seconds=seconds[len(seconds) // 2],
                )
            )
    return figures


def _alike(read: str, truth: str) -> float:
    return similarity(" ".join(read.split()), " ".join(truth.split()))
