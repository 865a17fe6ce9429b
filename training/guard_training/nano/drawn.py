"""What the reader finds in training images, with its real errors, kept on disk.

Reading costs a third of a second per image on one core, so each image is read once and its text is kept in a JSONL
file by the digest of the image's bytes. The reader is the one that serves (``guard_middleware.guard.reader``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

Read = Callable[[bytes], str]


class DrawnText:
    """The texts drawn in images; ``read`` is only called for an image that the file does not know."""

    def __init__(self, file: Path, read: Read) -> None:
        self._file, self._read = file, read
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self._known: dict[str, str] = dict(json.loads(line) for line in lines)

    def __call__(self, image: bytes) -> str:
        digest = hashlib.sha256(image).hexdigest()
        if digest not in self._known:
            self._known[digest] = self._read(image)
            with self._file.open("a", encoding="utf-8") as out:
                out.write(json.dumps([digest, self._known[digest]]) + "\n")
        return self._known[digest]

    def missing(self, images: Iterable[bytes]) -> int:
        """How many of ``images`` have not been read yet."""
        return sum(hashlib.sha256(image).hexdigest() not in self._known for image in images)
