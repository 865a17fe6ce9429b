"""What a reader makes of one raw record, and the reasons why it makes nothing of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from guard_middleware.types import Label

#: an image as a file's bytes, or as a path inside the copy
Picture = bytes | str


class Unusable(ValueError):
    """A record that does not follow the schema of its source, or has nothing to judge; says why."""


class Foreign(Exception):
    """A sound record that does not belong to this source (another folder of a shared file, not annotated by hand)."""


@dataclass(frozen=True, slots=True)
class Fields:
    """A row without its id. A label None means that the source does not label that side."""

    prompt: str
    request: Label | None
    response: str | None = None
    response_label: Label | None = None
    category: str | None = None
    image: Picture | None = None
    rationale: str | None = None


#: one raw record to the fields of its row; raises ``Unusable`` or ``Foreign``
Reader = Callable[[Mapping[str, Any]], Fields]


def value(record: Mapping[str, Any], column: str) -> Any:
    """A column that must be there; None where it is empty (JSON null, an empty CSV field, NaN)."""
    if column not in record:
        # A table without a header has content for names: only what looks like a name is shown.
        names = [name for name in map(str, record) if name.isidentifier() and len(name) < 32]
        raise Unusable(f"no column {column!r} (it has {', '.join(names) or 'none'})")
    found = record[column]
    return None if found == "" or (isinstance(found, float) and math.isnan(found)) else found


def optional(record: Mapping[str, Any], column: str) -> Any:
    """A column that may be missing."""
    return value(record, column) if column in record else None


def text(record: Mapping[str, Any], column: str) -> str:
    """Words that must be there."""
    found = value(record, column)
    if not isinstance(found, str) or not found.strip():
        raise Unusable(f"column {column!r} holds no text")
    return found


def optional_text(record: Mapping[str, Any], column: str) -> str | None:
    """Words, or None where the column is missing or empty."""
    found = optional(record, column)
    if found is not None and not isinstance(found, str):
        raise Unusable(f"column {column!r} holds no text")
    return found


def flag(record: Mapping[str, Any], column: str) -> bool:
    """A boolean, as JSON, parquet or CSV write it."""
    found = str(value(record, column)).strip().lower()
    if found not in ("true", "false", "1", "0", "1.0", "0.0"):
        raise Unusable(f"column {column!r} is neither true nor false")
    return found in ("true", "1", "1.0")


def harmful(is_harmful: bool) -> Label:
    return "harmful" if is_harmful else "unharmful"


def label(found: Any, words: Mapping[str, Label | None], column: str) -> Label | None:
    """The label that a word of the source stands for. The word itself is not repeated in the error."""
    key = str(found).strip().lower()
    if key not in words:
        raise Unusable(f"column {column!r} has another value than {', '.join(words)}")
    return words[key]


def picture(record: Mapping[str, Any], column: str = "image") -> Picture:
    """An image column: a path, or what ``datasets`` stores, ``{"bytes": ..., "path": ...}``."""
    found = value(record, column)
    if isinstance(found, Mapping):
        found = found.get("bytes") or found.get("path")
    if not isinstance(found, (bytes, str)) or not found:
        raise Unusable(f"column {column!r} holds no image")
    return found
