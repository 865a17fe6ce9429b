"""A file of JSON lines that a killed command leaves behind and the same command continues.

A line cut off by the kill is dropped when the journal is opened again; every other line counts as done.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Journal:
    """Lines of ``path``; each is an object with a string ``id``. Opening it repairs a last line that was cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = _whole_lines(path)
        self.done: set[str] = {json.loads(line)["id"] for line in whole.splitlines()}
        self._file = path.open("ab")
        self._file.truncate(len(whole))

    def append(self, value: Mapping[str, Any]) -> None:
        """Writes one object, at once."""
        # Half of a surrogate pair has no UTF-8, but as it is replaced here it reads back as JSON's escape of it.
        self._file.write(json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
        self._file.flush()
        self.done.add(value["id"])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All objects, in order of writing."""
        with self.path.open("rb") as lines:
            yield from map(json.loads, lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


def _whole_lines(path: Path) -> bytes:
    if not path.exists():
        return b""
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1]
