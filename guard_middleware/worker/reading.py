"""Text drawn in images, read before a guard judges them: on two threads, bounded in time and number.

The reader takes one image at a time; two threads, so that a cached image need not wait for another's turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.types import Blob


class Reader(Protocol):
    """``guard.reader.Reader``, or a test's."""

    def read(self, image: bytes, timeout: float | None = None) -> str: ...


class DrawnText:
    """What a worker reads of images. ``by_default`` holds for questions that do not say; with no ``reader`` it must be
    false, and a question that asks for reading is ``GuardError(reader)``.

    ``seconds`` bounds one image, its wait for a turn included; ``most`` is how many may wait.
    """

    def __init__(
        self, reader: Reader | None = None, *, by_default: bool = False, seconds: float = 5.0, most: int = 64
    ) -> None:
        if by_default and reader is None:
            raise ValueError("reading by default needs a reader")
        self._reader, self.by_default, self._seconds, self._most = reader, by_default, seconds, most
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="guard-reader")
        #: images that are being read, or wait for it
        self.reading = 0

    async def read(self, blobs: Sequence[Blob], wanted: bool | None, deadline: float) -> tuple[str, ...]:
        """One text per image, in order, or nothing where nothing is to be read; the same image is read once."""
        if not blobs or not (self.by_default if wanted is None else wanted):
            return ()
        if self._reader is None:
            raise GuardError(GuardErrorKind.READER, "this worker runs without a reader of drawn text")
        images = {blob.digest: blob.data for blob in blobs}
        if self.reading and self.reading + len(images) > self._most:
            raise GuardError(
                GuardErrorKind.OVERLOADED, "too many images wait to be read", retry_after=0.5 * self.reading
            )
        loop = asyncio.get_running_loop()
        reader, bound = self._reader, self._seconds

        def read(image: bytes) -> str:
            return reader.read(image, min(bound, max(0.0, deadline - loop.time())))

        self.reading += len(images)
        futures = [loop.run_in_executor(self._pool, read, image) for image in images.values()]
        try:
            texts = await asyncio.gather(*futures)
        finally:
            self.reading -= len(images)
            for future in futures:
                future.cancel()
        found = dict(zip(images, texts, strict=True))
        return tuple(found[blob.digest] for blob in blobs)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
