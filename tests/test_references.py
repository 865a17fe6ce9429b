from __future__ import annotations

import base64
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_middleware.errors import RejectKind, RequestRejected
from guard_middleware.limits import Limits
from guard_middleware.references import HttpUrl, classify, decode_data_url, parse_http, to_data_url
from guard_middleware.types import Blob

LIMITS = Limits()


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("data:image/png;base64,AAAA", "data"),
        ("DATA:image/png;base64,AAAA", "data"),
        ("data:nonsense", "data"),
        ("http://example.com", "http"),
        ("HTTPS://Example.com:443/a/@b/c.png?x=1&y=%20#top", "http"),
        ("http://93.184.216.34/x", "http"),
        ("http://[2606:2800:220:1::1]/x", "http"),
        ("http://xn--bcher-kva.example/x", "http"),
    ],
)
def test_one_predicate_says_how_an_image_is_referenced(uri: str, kind: str) -> None:
    assert classify(uri) == kind


FORBIDDEN = [
    "",
    "picture.png",
    "//example.com/x",
    "AAAA",
    " http://example.com/",
    " data:image/png;base64,AAAA",
    "http://example.com/ ",
    "\thttp://example.com/",
    "ht\ntp://example.com/",
    "http://exa\tmple.com/",
    "http://example.com/\x00",
    "http://example.com/é",
    "http://exämple.com/",
    "ｈttp://example.com/",
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "ftp://example.com/x",
    "gopher://example.com/x",
    "javascript:alert(1)",
    "blob:http://example.com/x",
    "http:example.com",
    "http:/example.com",
    "http:///example.com",
    "http://",
    "http://?x",
    "http://ok\\@evil.test/",
    "http:\\\\evil.test/",
    "http://user@example.com/",
    "http://user:password@example.com/",
    "http://ok.test%2F@evil.test/",
    "http://ok.test%00.evil.test/",
    "http://0x7f000001/",
    "http://2130706433/",
    "http://127.1/",
    "http://0177.0.0.1/",
    "http://127.0.0.01/",
    "http://127.0.0.0x1/",
    "http://1.2.3.4.5/",
    "http://256.1.1.1/",
    "http://example.com./",
    "http://.example.com/",
    "http://a..b/",
    "http://-a.test/",
    "http://" + "a" * 64 + ".test/",
    "http://example.com:/",
    "http://example.com:0/",
    "http://example.com:080/",
    "http://example.com:65536/",
    "http://example.com:80:80/",
    "http://[::1/",
    "http://[fe80::1%25eth0]/",
    "http://[fe80::1%eth0]/",
    "http://[::1]x/",
    "http://[1.2.3.4]/",
    "http://::1/",
    "http://example.com/" + "a" * 9000,
]


@pytest.mark.parametrize("uri", FORBIDDEN)
def test_a_reference_with_a_second_reading_is_forbidden(uri: str) -> None:
    with pytest.raises(RequestRejected) as info:
        classify(uri)
    assert info.value.kind is RejectKind.FORBIDDEN_URL
    assert uri == "" or uri not in info.value.message


def test_an_http_url_is_taken_apart_once() -> None:
    assert parse_http("HTTP://Example.COM/a?b=1#c") == HttpUrl("http", "example.com", 80, "/a?b=1")
    assert parse_http("https://[2606:0:0::1]:8443?b") == HttpUrl("https", "2606::1", 8443, "/?b")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30) | st.from_regex(r"(https?|data|file):[/\\]{0,3}[\w@:.\[\]%-]{0,20}/?", fullmatch=True))
def test_any_string_is_classified_or_rejected(uri: str) -> None:
    with suppress(RequestRejected):
        assert classify(uri) in ("data", "http")


# --- data URLs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mime", ["image/png", "image/jpeg", "image/webp", "IMAGE/PNG"])
def test_data_urls_of_allowed_types_are_decoded(mime: str) -> None:
    assert decode_data_url(f"data:{mime};base64,AAEC/w==", LIMITS) == b"\x00\x01\x02\xff"


@pytest.mark.parametrize(
    "head",
    [
        *("data:image/gif;base64,", "data:image/svg+xml;base64,", "data:video/jpeg;base64,", "data:text/plain;base64,"),
        *(
            "data:,",
            "data:;base64,",
            "data:image/png,",
            "data:image/png;charset=utf-8;base64,",
            "data: image/png;base64,",
        ),
        *("data:image/jpeg;frames=3;base64,", "data:image/png;base64;base64,", "data:image/pngx;base64,"),
    ],
)
def test_data_urls_of_other_types_and_with_parameters_are_refused(head: str) -> None:
    with pytest.raises(RequestRejected) as info:
        decode_data_url(head + "AAAA", LIMITS)
    assert info.value.kind is RejectKind.UNSUPPORTED_CONTENT


@pytest.mark.parametrize(
    "payload",
    [
        *("", "A", "AA", "AAA", "AA=", "AAAAA", "AA==AA==", "AAAA====", "=AAA", "AA=A", "AAAA\n", "AA AA", "AA\nAA"),
        *("AA!A", "AAAA,AAAA", "AA-_", "AA%3D%3D", "AAAé", "AAAA\u2028", "junkjunk====", "AAA=junk", "===="),
    ],
)
def test_base64_is_strict(payload: str) -> None:
    with pytest.raises(RequestRejected) as info:
        decode_data_url("data:image/png;base64," + payload, LIMITS)
    assert info.value.kind is RejectKind.INVALID_IMAGE


@pytest.mark.parametrize("size", [8, 9, 10])
def test_the_size_of_a_data_url_is_known_before_it_is_decoded(size: int) -> None:
    uri = "data:image/png;base64," + base64.b64encode(b"x" * size).decode()
    assert len(decode_data_url(uri, replace(LIMITS, image_bytes=size))) == size
    with pytest.raises(RequestRejected) as info:
        decode_data_url(uri[:-4] + "!!!!", replace(LIMITS, image_bytes=size - 3))
    assert info.value.kind is RejectKind.IMAGE_TOO_LARGE


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=60), st.sampled_from(["image/png", "image/jpeg", "image/webp"]))
def test_to_data_url_then_decoding_is_the_identity(data: bytes, mime: str) -> None:
    uri = to_data_url(Blob(mime, data))
    assert uri.startswith(f"data:{mime};base64,")
    assert decode_data_url(uri, LIMITS) == data
