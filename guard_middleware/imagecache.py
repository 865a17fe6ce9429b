"""Images that were made canonical before, so that the old images of a conversation are not decoded again at each turn.

Found by the digest of what was sent, byte for byte, and nothing else; only what ``media`` accepted is kept. What is at
a URL is fetched anew each time and then found by its bytes.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable

from guard_middleware.types import Blob


class CanonicalImages:
    """At most ``size`` bytes of canonical images, least recently used out first. Safe to use from several threads."""

    def __init__(self, size: int) -> None:
        self._size, self._lock = size, threading.Lock()
        self._kept: OrderedDict[bytes, Blob] = OrderedDict()
        self.bytes = self.decoded = 0

    def get(self, sent: bytes | str, decode: Callable[[], Blob]) -> Blob:
        """The canonical form of ``sent``: a known one, or what ``decode`` makes of it. Blocks as ``decode`` does."""
        data = sent.encode("utf-8", "surrogatepass") if isinstance(sent, str) else sent
        key = hashlib.sha256((b"text" if isinstance(sent, str) else b"data") + data).digest()
        with self._lock:
            if (known := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return known
            self.decoded += 1
        blob = decode()
        with self._lock:
            if key not in self._kept:
                self._kept[key] = blob
                self.bytes += len(blob.data)
            while self.bytes > self._size:
                _, dropped = self._kept.popitem(last=False)
                self.bytes -= len(dropped.data)
        return blob
