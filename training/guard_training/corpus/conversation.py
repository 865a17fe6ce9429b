"""A labelled row as the gateway would see it.

Refuses: an image that is no PNG, JPEG or WebP, or that cannot be opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from guard_middleware.types import Blob, Conversation, Message, Part, Text
from guard_training.corpus.rows import CorpusError, Row, Skipped, labelled

#: images that are shown as they are
FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
#: area of the largest image that is decoded
MAX_PIXELS = 50_000_000


def conversation(row: Row) -> Conversation:
    """Image (if any) and prompt from the user, the response as the answer where it is labelled.

    Raises ``CorpusError`` for an image that cannot be judged.
    """
    parts: list[Part] = []
    if row.image is not None:
        try:
            with Image.open(row.image) as image:
                mime = FORMATS[image.format or ""]
        except (OSError, KeyError, ValueError, SyntaxError, Image.DecompressionBombError):
            raise CorpusError(f"{row.name}: {row.image.name} is no readable PNG, JPEG or WebP image") from None
        parts.append(Blob(mime, row.image.read_bytes()))
    if row.prompt or not parts:
        parts.append(Text(row.prompt))
    answer = Message("assistant", (Text(row.response),)) if row.response and row.response_label else None
    return Conversation((Message("user", tuple(parts)),), answer=answer)


def image_size(path: Path) -> tuple[int, int]:
    """Width and height from the header; raises ``CorpusError`` for what is no image or is too large to decode."""
    try:
        with Image.open(path) as image:
            width, height = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise CorpusError(f"{path.name} is no readable image") from None
    if width * height > MAX_PIXELS:
        raise CorpusError(f"{path.name} has {width} x {height} pixels, more than {MAX_PIXELS}; scale it down")
    return width, height


def judgeable(rows: Sequence[Row], skipped: Skipped) -> list[Row]:
    """The rows without an image, or with one that can be judged; the others go to ``skipped``."""
    kept = []
    for row in rows:
        try:
            if row.image is not None:
                conversation(row)
        except CorpusError as error:
            skipped(str(error))
        else:
            kept.append(row)
    return kept


def usable(rows: Sequence[Row], skipped: Skipped) -> list[Row]:
    """The rows that can be asked about: labelled, an id of their own, an image that can be judged."""
    return judgeable(labelled(rows, skipped), skipped)
