"""A Qwen2.5-VL guard's pictures: what one costs, from its header alone, and its pixels.

Refuses (``GuardError(media)``): what is no picture, one too large to decode, one of a shape that the model cannot see.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.worker.weights import ModelFacts


def picture_tokens(image: bytes, factor: int, facts: ModelFacts) -> int:
    """Prompt tokens of an image; ``factor`` is the side of one token's square, in pixels."""
    with _media():
        width, height = Image.open(io.BytesIO(image)).size
        high, wide = smart_resize(height, width, factor, facts.min_pixels, facts.max_pixels)
    return int(high * wide // factor**2)


def decoded(image: bytes) -> Image.Image:
    """An image's pixels, in RGB."""
    with _media():
        return Image.open(io.BytesIO(image)).convert("RGB")


@contextmanager
def _media() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise GuardError(GuardErrorKind.MEDIA, "an image that cannot be decoded") from error
