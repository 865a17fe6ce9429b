"""How a request names an image: which references are taken, and how they are read and written. Opens no image.

Refuses anything but a base64 ``data:`` URL of an allowed type, or a clean http(s) URL (``parse_http``).
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from dataclasses import dataclass
from typing import Literal

from guard_middleware.errors import RejectKind, RequestRejected
from guard_middleware.limits import Limits
from guard_middleware.types import Blob

_DATA_URL = re.compile(r"data:image/(?:png|jpeg|webp);base64,", re.ASCII | re.IGNORECASE)
_HTTP_URL = re.compile(r"(https?)://([^/?#]+)(/[^?#]*)?(\?[^#]*)?(?:#.*)?", re.ASCII | re.IGNORECASE)
_URL_CHARACTERS = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]{1,8192}")
_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]{1,253}))(?::([1-9][0-9]{0,4}))?")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMERIC = re.compile(r"[0-9]+|0x[0-9a-f]*")


@dataclass(frozen=True, slots=True)
class HttpUrl:
    """A checked http(s) URL. ``host`` is lower case, an IPv6 address without brackets; ``target`` is path and query."""

    scheme: str
    host: str
    port: int
    target: str


def classify(uri: str) -> Literal["data", "http"]:
    """Which kind of image reference this is; raises ``RequestRejected`` (forbidden_url) for every other string."""
    if uri[:5].lower() == "data:":
        return "data"
    parse_http(uri)
    return "http"


def parse_http(uri: str) -> HttpUrl:
    """An http(s) URL that has one reading; raises ``RequestRejected`` (forbidden_url).

    Only the characters of RFC 3986 (no space, control, backslash, non-ASCII); no user name; a host that is a DNS
    name, a dotted quad or an IPv6 address as the standard writes them (no 0x7f000001, 2130706433, 127.1, %-escape
    or zone). Says nothing about where the host is: ``fetch`` checks the addresses.
    """
    match = _HTTP_URL.fullmatch(uri) if _URL_CHARACTERS.fullmatch(uri) else None
    authority = _AUTHORITY.fullmatch(match[2]) if match else None
    if match is None or authority is None:
        raise _forbidden()
    scheme = match[1].lower()
    port = int(authority[3] or (443 if scheme == "https" else 80))
    try:
        host = str(ipaddress.IPv6Address(authority[1])) if authority[1] else _dns_or_ipv4(authority[2].lower())
    except ValueError:
        raise _forbidden() from None
    if port > 65535:
        raise _forbidden()
    return HttpUrl(scheme, host, port, (match[3] or "/") + (match[4] or ""))


def _dns_or_ipv4(host: str) -> str:
    labels = host.split(".")
    if _NUMERIC.fullmatch(labels[-1]):
        return str(ipaddress.IPv4Address(host))
    if not all(map(_LABEL.fullmatch, labels)):
        raise ValueError
    return host


def decode_data_url(uri: str, limits: Limits) -> bytes:
    """The bytes of ``data:image/(png|jpeg|webp);base64,...``, at most ``limits.image_bytes``.

    Raises ``RequestRejected``: unsupported_content (another type, or parameters such as frames),
    image_too_large (known from the length, before decoding), invalid_image (not strict, padded base64).
    """
    head = _DATA_URL.match(uri)
    if head is None:
        raise RequestRejected(
            RejectKind.UNSUPPORTED_CONTENT, "an image data URL is base64 of image/png, image/jpeg or image/webp"
        )
    payload = uri[head.end() :]
    size = len(payload) // 4 * 3 - payload[-2:].count("=")
    if size > limits.image_bytes:
        raise RequestRejected(RejectKind.IMAGE_TOO_LARGE, "an image exceeds the size limit")
    try:
        data = binascii.a2b_base64(payload, strict_mode=True)
    except ValueError:
        data = b""
    # The length too: strict_mode passes "AAAA====".
    if not data or len(payload) % 4 or len(data) != size:
        raise RequestRejected(RejectKind.INVALID_IMAGE, "an image is not valid base64")
    return data


def to_data_url(blob: Blob) -> str:
    return f"data:{blob.mime_type};base64,{base64.b64encode(blob.data).decode('ascii')}"


def _forbidden() -> RequestRejected:
    return RequestRejected(RejectKind.FORBIDDEN_URL, "an image reference is a data: URL or a plain http(s) URL")
