"""A prompt's pictures for vLLM: decoded a few at a time, and no larger than its processor would make them.

What vLLM has been given stays in memory until its verdict, and there may be hundreds of such prompts: a picture of 20
megapixels takes 60 MB, and what the model sees of it a few. So a picture is shrunk as soon as it is decoded, by the
very call with which transformers' ``Qwen2VLImageProcessor`` does it (torchvision's, on bytes), which then finds nothing
left to do: the model sees the same pixels (``tests/worker/test_vllm_pictures.py``).

Refuses what ``pictures.decoded`` refuses.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from torchvision.transforms.v2 import functional  # type: ignore[import-not-found]  # it comes with vLLM
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from guard_middleware.worker.pictures import decoded
from guard_middleware.worker.weights import ModelFacts

#: prompts whose pictures are decoded at once, one after the other: only these have a picture in full
_DECODERS = 4


class Pictures:
    """``factor`` is the side of one token's square, in pixels. Use from one event loop."""

    def __init__(self, factor: int, facts: ModelFacts) -> None:
        self._factor, self._facts = factor, facts
        self._threads = ThreadPoolExecutor(_DECODERS, thread_name_prefix="guard-pictures")

    async def shown(self, images: Sequence[bytes]) -> tuple[tuple[Image.Image, ...], tuple[str, ...]]:
        """What the model is to see of each, and a name of its bytes. Raises ``GuardError(media)``.

        Cancelling it takes it out of the queue of those that wait for a thread.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._shown, images)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _shown(self, images: Sequence[bytes]) -> tuple[tuple[Image.Image, ...], tuple[str, ...]]:
        seen = tuple(shrunk(decoded(image), self._factor, self._facts) for image in images)
        return seen, tuple(hashlib.sha256(image).hexdigest() for image in images)


def shrunk(image: Image.Image, factor: int, facts: ModelFacts) -> Image.Image:
    """The picture as the model sees it, where that is smaller."""

    def fitted(height: int, width: int) -> tuple[int, int]:
        high, wide = smart_resize(height, width, factor, facts.min_pixels, facts.max_pixels)
        return int(high), int(wide)

    size = fitted(image.height, image.width)
    # where the bounds are narrow, or the picture is, the processor would resize once more what it has resized
    if size[0] * size[1] >= image.height * image.width or fitted(*size) != size:
        return image
    pixels = functional.resize(
        functional.pil_to_tensor(image), list(size), functional.InterpolationMode.BICUBIC, antialias=True
    )
    smaller: Image.Image = functional.to_pil_image(pixels)
    return smaller
