"""Every bound that a request or an answer can hit, in one place.

Each line gives the value, what happens past it, and the test that shows it. Operators change them under
``limits:`` in the configuration; nothing a client sends can.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what is read, decoded and held. Sizes are bytes, times are seconds."""

    #: request body; past it 413 ``body_too_large`` (tests/test_middleware.py)
    body_bytes: int = 20 * 1024 * 1024
    #: nesting of JSON; past it 400 ``invalid_json`` (tests/test_strictjson.py)
    json_depth: int = 64
    #: images of one request; one more is 413 ``too_many_images`` (tests/test_middleware.py)
    images: int = 20
    #: bytes of one image as sent; past it 413 ``image_too_large`` (tests/test_media.py)
    image_bytes: int = 4 * 1024 * 1024
    #: pixels of one image, read from its header before decoding; past it 413 ``image_too_large`` (tests/test_media.py)
    image_pixels: int = 20_000_000
    #: shortest and longest side, and their ratio; outside it 400 ``invalid_image`` (tests/test_media.py)
    image_min_side: int = 4
    image_max_side: int = 12_000
    image_max_aspect: float = 200.0
    #: choices of one answer; more asked for is 400 ``invalid_request`` (tests/dialects/test_chat_request.py)
    choices: int = 4
    #: the upstream's answer, and so the hold-back; past it 502 ``upstream_too_large`` (tests/test_middleware.py)
    answer_bytes: int = 8 * 1024 * 1024
    #: fetching one image by URL; past it 400 ``image_fetch_failed`` (tests/test_fetch.py)
    fetch_seconds: float = 5.0
    #: silence of the upstream between bytes; past it 504 ``upstream_timeout`` (tests/test_proxy.py)
    upstream_seconds: float = 120.0
    #: reading the request body; past it the connection is closed with 408 (tests/test_middleware.py)
    body_seconds: float = 30.0
