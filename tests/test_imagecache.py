from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from guard_middleware.errors import RejectKind, RequestRejected
from guard_middleware.imagecache import CanonicalImages
from guard_middleware.types import Blob


def test_the_same_bytes_are_decoded_once() -> None:
    cache = CanonicalImages(1000)
    first = cache.get("data:a", lambda: Blob("image/png", b"a"))
    assert cache.get("data:a", lambda: pytest.fail("decoded again")) is first
    assert cache.get(b"data:a", lambda: Blob("image/png", b"b")).data == b"b"  # bytes of a URL are no data URL
    assert cache.get("data:A", lambda: Blob("image/png", b"c")).data == b"c"
    assert cache.decoded == 3


def test_what_was_refused_is_refused_again() -> None:
    cache = CanonicalImages(1000)

    def refuse() -> Blob:
        raise RequestRejected(RejectKind.INVALID_IMAGE, "no")

    for _ in range(2):
        with pytest.raises(RequestRejected):
            cache.get("data:a", refuse)
    assert cache.get("data:a", lambda: Blob("image/png", b"a")).data == b"a"


def test_it_is_bounded_in_bytes_and_forgets_the_least_recently_used() -> None:
    cache = CanonicalImages(100)
    for name in ("a", "b"):
        cache.get(name, lambda: Blob("image/png", b"x" * 45))
    cache.get("a", lambda: pytest.fail("decoded again"))
    cache.get("c", lambda: Blob("image/png", b"x" * 45))
    assert cache.bytes == 90
    cache.get("a", lambda: pytest.fail("decoded again"))
    cache.get("b", lambda: Blob("image/png", b"x" * 200))
    assert cache.bytes == 0
    assert cache.decoded == 4


def test_threads_may_share_it() -> None:
    cache = CanonicalImages(10_000)
    with ThreadPoolExecutor(8) as pool:
        blobs = list(pool.map(lambda n: cache.get(f"{n % 7}", lambda: Blob("image/png", b"%d" % (n % 7))), range(500)))
    assert [int(blob.data) for blob in blobs] == [n % 7 for n in range(500)]
    assert cache.bytes == 7
