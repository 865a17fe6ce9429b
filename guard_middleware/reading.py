"""A request as ASGI brings it: its path, what may pass on of its query, its body, its images. Judges nothing.

Refuses (``RequestRejected``) bodies with a content coding or another type than JSON (415), beyond the limits (413) or
slower than them (408), and a header that decides here given twice (400).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from guard_middleware.dialects.base import Headers, ParsedRequest
from guard_middleware.errors import RejectKind, RequestRejected
from guard_middleware.limits import Limits
from guard_middleware.types import Blob

if TYPE_CHECKING:
    from starlette.types import Receive, Scope

_API_VERSION = re.compile(rb"api-version=[A-Za-z0-9._-]{1,40}")


class ClientGone(Exception):
    """The client went away before its request was whole."""


def path_of(scope: Scope) -> bytes:
    """The path as it came, below where the host has mounted us: Starlette takes the same off before it routes."""
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    root: bytes = scope.get("root_path", "").encode()
    return path.removeprefix(root) if path.startswith(root + b"/") else path


def query_of(scope: Scope) -> bytes:
    """Of the query only one plain ``api-version``, which Azure's SDKs send: nothing else may steer an upstream."""
    pairs = scope.get("query_string", b"").split(b"&")
    return next((pair for pair in pairs if _API_VERSION.fullmatch(pair)), b"")


async def read_body(headers: Headers, receive: Receive, limits: Limits) -> bytes:
    """The whole body; raises ``RequestRejected`` and ``ClientGone``."""
    _check_type(headers)
    too_large = RequestRejected(RejectKind.BODY_TOO_LARGE, f"the body exceeds {limits.body_bytes} bytes")
    declared = _only(headers, b"content-length") or "0"
    if not declared.isdecimal() or int(declared[:20]) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > limits.body_bytes:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise RequestRejected(RejectKind.BODY_TIMEOUT, "the body did not arrive in time") from None


async def with_media(
    parsed: ParsedRequest, image: Callable[[str], Coroutine[Any, Any, Blob]], limits: Limits
) -> ParsedRequest:
    """The request with what ``image`` makes of each of its references, all at once; raises ``RequestRejected``."""
    if len(parsed.sites) > limits.images:
        raise RequestRejected(RejectKind.TOO_MANY_IMAGES, f"at most {limits.images} images are accepted")
    try:
        async with asyncio.TaskGroup() as group:
            tasks = {uri: group.create_task(image(uri)) for uri in parsed.media}
    except* RequestRejected as errors:
        raise _first(errors) from None
    return parsed.with_media({uri: task.result() for uri, task in tasks.items()})


def _check_type(headers: Headers) -> None:
    if (_only(headers, b"content-encoding") or "identity").lower() != "identity":
        raise RequestRejected(RejectKind.UNSUPPORTED_ENCODING, "send the body without Content-Encoding")
    kind, _, parameters = (_only(headers, b"content-type") or "").partition(";")
    charset = parameters.strip().lower().removeprefix("charset=").strip('"')
    if kind.strip().lower() != "application/json" or charset not in ("", "utf-8"):
        raise RequestRejected(RejectKind.UNSUPPORTED_MEDIA_TYPE, "send Content-Type: application/json in UTF-8")


def _only(headers: Headers, name: bytes) -> str | None:
    """The only value of a header; a repeated one is refused, because two readers may choose differently."""
    values = [value for key, value in headers if key == name]
    if len(values) > 1:
        raise RequestRejected(RejectKind.INVALID_REQUEST, f"the header {name.decode('latin-1')} is repeated")
    return values[0].decode("latin-1").strip() if values else None


def _first(errors: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
