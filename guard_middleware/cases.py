"""Cases in JSONL: rows of ``{"id", "prompt", "response"?, "image"?}``, and the question that one is to the guard.

Refuses (``ConfigError``, with the line): what is not JSON, a row of other types, one without prompt and image.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from guard_middleware.errors import ConfigError, GuardError, GuardErrorKind, RequestRejected
from guard_middleware.limits import Limits
from guard_middleware.media import canonicalise
from guard_middleware.strictjson import StrictJSONError, loads
from guard_middleware.types import Blob, Conversation, Message, Part, Source, Text, Verdict
from guard_middleware.wire import Guard, ModerationRequest

#: the operator's own pictures: larger than what a stranger may send
_LIMITS = Limits(image_bytes=64 * 1024 * 1024, image_pixels=100_000_000)


def rows(lines: Iterable[bytes], name: str) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file; raises ``ConfigError`` with the line of a row that is not one.

    A row without an ``id`` gets the number of its line.
    """
    remedy = 'a row looks like {"id": "1", "prompt": "...", "response": null, "image": "picture.png"}'
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = loads(line)
        except StrictJSONError:
            raise ConfigError(
                "not JSON (in UTF-8, without NaN, each key once)", path=name, line=number, remedy=remedy
            ) from None
        text = ("prompt", "response", "image")
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str | None) for key in text):
            raise ConfigError("not a row of strings", path=name, line=number, remedy=remedy)
        if not (row.get("prompt") or row.get("image")):
            raise ConfigError("a row without prompt and image", path=name, line=number, remedy=remedy)
        id = number if row.get("id") is None else row["id"]
        if not isinstance(id, str | int):
            raise ConfigError("an id that is neither text nor a number", path=name, line=number, remedy=remedy)
        yield {**row, "id": str(id)}


async def judge(guard: Guard, row: dict[str, Any], *, base: Path, deadline: float) -> Verdict | GuardError:
    """The verdict on one row; a picture that cannot be read is a ``GuardError(media)`` of that row."""
    try:
        parts: list[Part] = []
        if row.get("image"):
            parts.append(await asyncio.to_thread(_picture, row["image"], base))
        if row.get("prompt"):
            parts.append(Text(row["prompt"]))
    except (OSError, RequestRejected) as error:
        return GuardError(GuardErrorKind.MEDIA, getattr(error, "message", None) or type(error).__name__)
    answer = None if row.get("response") is None else Message("assistant", (Text(row["response"]),))
    conversation = Conversation((Message("user", tuple(parts)),), answer=answer)
    source: Source = "input" if answer is None else "output"
    return await guard.moderate(ModerationRequest(row["id"], conversation, source, deadline))


def _picture(path: str, base: Path) -> Blob:
    """A path is relative to the file of rows, or else to the current directory."""
    beside = base / path
    return canonicalise((beside if beside.exists() else Path(path)).read_bytes(), _LIMITS)
