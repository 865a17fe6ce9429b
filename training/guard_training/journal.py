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


class JournalError(ValueError):
    """A file that is no journal of this command: nothing of it was changed."""


class Journal:
    """Lines of ``path``; each is an object with a string ``id``. Opening it repairs a last line that was cut off.

    Raises ``JournalError`` for a file of anything else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = _whole_lines(path)
        self.done = _ids(path, whole)
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


def done_in(path: Path) -> set[str]:
    """The ids of the whole lines of ``path``, none where it is not there; it may be somebody's who still writes."""
    return _ids(path, _whole_lines(path))


def _ids(path: Path, whole: bytes) -> set[str]:
    ids: set[str] = set()
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            id = json.loads(line)["id"]
        except (ValueError, LookupError, TypeError):
            id = None
        if not isinstance(id, str):
            raise JournalError(f"{path}:{number}: no object with a text id, so this is no output to go on with")
        ids.add(id)
    return ids


def _whole_lines(path: Path) -> bytes:
    if not path.exists():
        return b""
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1]
