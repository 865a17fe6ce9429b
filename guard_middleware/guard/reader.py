"""Reads the text that is drawn in an image, so that a guard too small to read pixels can judge it.

RapidOCR on onnxruntime, with the models that its wheel carries: nothing is fetched and nothing is logged. An image
is first brought to a bounded number of pixels (very small ones are enlarged), and a long strip is cut into
overlapping tiles, because the detector would shrink it until nothing can be read. Lines that read badly are read
again upside down; the library's own classifier is off, since it turned upright lines round.

Whatever goes wrong is ``GuardError(reader)``, and ``GuardError(media)`` for bytes that are no image: an image that
could not be read is never an image without text.
"""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from guard_middleware.errors import ConfigError, GuardError, GuardErrorKind
from guard_middleware.limits import Limits

#: Pixels of one image that are read, at most; more is scaled down (12 megapixel photographs to 1773 x 1330).
MAX_PIXELS = 1536 * 1536
#: Longest side below which an image is enlarged: small print in a thumbnail is legible to large models. (At 640 the
#: reader took most plain shapes of 64 pixels for letters.)
MIN_SIDE = 256
#: Longest side of a tile; a tile may be longer only if it is at most twice as long as wide.
TILE, OVERLAP = 1536, 160
#: Shortest side of a tile; narrower ones get a margin, since the library enlarges them without bound.
MARGIN_SIDE = 64
#: A line below this confidence is also read upside down, and the better reading counts.
DOUBT = 0.8


class Reader:
    """Reads one image at a time, on one thread; safe to call from several. Loading takes about a second.

    ``min_score`` is the confidence (0..1) below which a line is dropped; ``cache`` counts images. Raises
    ``ConfigError`` where the ``ocr`` extra is not installed.
    """

    def __init__(self, *, min_score: float = 0.5, cache: int = 256) -> None:
        self._min_score, self._size = min_score, cache
        self._cache: OrderedDict[bytes, str] = OrderedDict()
        self._lock, self._cache_lock = threading.Lock(), threading.Lock()
        try:
            import numpy
            import rapidocr
            from rapidocr.utils.process_img import get_rotate_crop_image
        except ImportError as error:
            raise ConfigError(
                f"reading text drawn in images needs RapidOCR ({error.name} is missing)",
                remedy="pip install 'guard-middleware[ocr]', or switch the reader off",
            ) from None
        models = Path(rapidocr.__file__).parent / "models"
        self._numpy, self._crop = numpy, get_rotate_crop_image
        # Explicit model paths: without them the library checks its files against a server.
        self._engine: Any = rapidocr.RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.text_score": 0.0,
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                "Det.model_path": str(models / "PP-OCRv6_det_small.onnx"),
                "Rec.model_path": str(models / "PP-OCRv6_rec_small.onnx"),
                "Det.limit_type": "max",
                "Det.limit_side_len": 1280,
            }
        )
        blank = numpy.full((64, 64, 3), 255, dtype=numpy.uint8)
        self._detect(blank)
        self._recognise(blank)

    def read(self, image: bytes | Image.Image, timeout: float | None = None) -> str:
        """The lines drawn in an image, in reading order, joined by newlines; empty where there are none.

        ``timeout`` (seconds) covers the wait for another image's turn and is checked between lines.
        """
        key = _digest(image)
        with self._cache_lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._lock.acquire(timeout=-1 if timeout is None else max(timeout, 0.0)):
            raise GuardError(GuardErrorKind.READER, "no time left to read the image")
        try:
            text = "\n".join(line for tile in _tiles(_open(image)) for line in self._lines(tile, deadline))
        except GuardError:
            raise
        except Exception as error:
            raise GuardError(GuardErrorKind.READER, f"the reader failed ({type(error).__name__})") from error
        finally:
            self._lock.release()
        with self._cache_lock:
            self._cache[key] = text
            while len(self._cache) > self._size:
                self._cache.popitem(last=False)
        return text

    def _lines(self, tile: Image.Image, deadline: float | None) -> Iterator[str]:
        pixels = self._numpy.asarray(tile)[:, :, ::-1].copy()
        for box in self._detect(pixels):
            if deadline is not None and time.monotonic() > deadline:
                raise GuardError(GuardErrorKind.READER, "no time left to read the image")
            crop = self._crop(pixels, box.astype(self._numpy.float32))
            text, score = self._recognise(crop)
            if score < DOUBT:
                text, score = max((text, score), self._recognise(crop[::-1, ::-1].copy()), key=lambda found: found[1])
            if score >= self._min_score and any(char.isalnum() for char in text):
                yield text.strip()

    def _detect(self, pixels: Any) -> Any:
        # The library keeps the switches of the last call, so each call sets all three.
        boxes = getattr(self._engine(pixels, use_det=True, use_cls=False, use_rec=False), "boxes", None)
        return () if boxes is None else boxes

    def _recognise(self, pixels: Any) -> tuple[str, float]:
        found = self._engine(pixels, use_det=False, use_cls=False, use_rec=True)
        return (str(found.txts[0]), float(found.scores[0])) if found.txts else ("", 0.0)


def _digest(image: bytes | Image.Image) -> bytes:
    if isinstance(image, bytes):
        return hashlib.sha256(image).digest()
    return hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).digest()


def _open(image: bytes | Image.Image) -> Image.Image:
    try:
        opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
        if opened.width * opened.height > Limits().image_pixels:
            raise GuardError(GuardErrorKind.MEDIA, "an image with too many pixels")
        return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise GuardError(GuardErrorKind.MEDIA, "an image that cannot be decoded") from error


def _tiles(image: Image.Image) -> Iterator[Image.Image]:
    scale = min(1.0, (MAX_PIXELS / (image.width * image.height)) ** 0.5)
    if max(image.size) < MIN_SIDE:
        scale = MIN_SIDE / max(image.size)
    if scale != 1.0:
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    across = image.width >= image.height
    long, short = max(image.size), min(image.size)
    length = max(TILE, 2 * short)
    start = 0
    while True:
        end = min(start + length, long)
        tile = image.crop((start, 0, end, short) if across else (0, start, short, end))
        if min(tile.size) < MARGIN_SIDE:
            framed = Image.new(
                "RGB", (max(tile.width, MARGIN_SIDE), max(tile.height, MARGIN_SIDE)), tile.getpixel((0, 0))
            )
            framed.paste(tile, ((framed.width - tile.width) // 2, (framed.height - tile.height) // 2))
            tile = framed
        yield tile
        if end == long:
            return
        start = end - OVERLAP
