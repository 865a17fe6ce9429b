"""What the reader finds in training images, with its real errors, kept on disk.

Reading costs a third of a second per image on one core, so each image is read once and its text is kept in a JSONL
file by the digest of the image's bytes. The reader is the one that serves (``guard_middleware.guard.reader``).

Several processes may append to one file, so no line is ever taken out of it: one that was cut off by a kill stays,
counts as not there, and its image is read again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from guard_middleware.guard.reader import Reader

Read = Callable[[bytes], str]


class DrawnText:
    """The texts drawn in images; ``read`` is only called for an image that the file does not know."""

    def __init__(self, file: Path, read: Read) -> None:
        self._file, self._read = file, read
        data = file.read_bytes() if file.exists() else b""
        self._known: dict[str, str] = dict(filter(None, map(_pair, data.splitlines())))
        self._cut_off = bool(data) and not data.endswith(b"\n")

    def __call__(self, image: bytes) -> str:
        digest = hashlib.sha256(image).hexdigest()
        if digest not in self._known:
            self._known[digest] = self._read(image)
            line = json.dumps([digest, self._known[digest]]).encode() + b"\n"
            # Unbuffered: one write call for each line, which those of other processes do not split.
            with self._file.open("ab", buffering=0) as out:
                out.write(b"\n" + line if self._cut_off else line)
            self._cut_off = False
        return self._known[digest]


def _pair(line: bytes) -> tuple[str, str] | None:
    try:
        digest, text = json.loads(line)
    except (ValueError, TypeError):
        return None
    return digest, text


def reader(wanted: bool) -> Read | None:
    """The reader that serves, where the guard is served with one. Raises ``ConfigError`` where it is not installed."""
    return Reader().read if wanted else None
