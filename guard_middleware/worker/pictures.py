"""What a picture costs a Qwen2.5-VL guard, from its header alone."""

from __future__ import annotations

import io

from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.worker.weights import ModelFacts


def picture_tokens(image: bytes, factor: int, facts: ModelFacts) -> int:
    """Prompt tokens of an image; ``factor`` is the side of one token's square, in pixels. ``GuardError(media)``."""
    try:
        width, height = Image.open(io.BytesIO(image)).size
        high, wide = smart_resize(height, width, factor, facts.min_pixels, facts.max_pixels)
    except (OSError, ValueError, SyntaxError) as error:
        raise GuardError(GuardErrorKind.MEDIA, "an image that cannot be decoded") from error
    return int(high * wide // factor**2)
