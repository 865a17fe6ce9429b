"""The exception tree. Only these types cross module borders.

``GuardError`` is also a *value*: a transaction takes ``Verdict | GuardError`` and never a guess.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guard_middleware.types import Opinion


class GuardMiddlewareError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(GuardMiddlewareError):
    """A configuration that must not start. Says where it is wrong and what to write instead."""

    def __init__(self, message: str, *, path: str | None = None, line: int | None = None, remedy: str = "") -> None:
        self.path, self.line, self.remedy = path, line, remedy
        where = f"{path or 'configuration'}{f':{line}' if line is not None else ''}: "
        super().__init__(f"{where}{message}{f' -- {remedy}' if remedy else ''}")


class GuardErrorKind(StrEnum):
    TIMEOUT = "timeout"  # no verdict before the deadline
    OVERLOADED = "overloaded"  # the worker's queue is full
    UNAVAILABLE = "unavailable"  # no worker, or it went away in mid-request
    UNPARSEABLE = "unparseable"  # the model's output is not exactly one verdict
    TRUNCATED = "truncated"  # the token budget ended before the verdict
    TOO_LONG = "too_long"  # the content exceeds what the guard may be asked to read
    MEDIA = "media"  # an image that the guard could not decode, or a kind of content that it does not read
    READER = "reader"  # the reader of drawn text failed or ran out of time
    UNSUPPORTED = "unsupported"  # this guard cannot judge in the mode that was asked for
    INTERNAL = "internal"  # a defect; its traceback is in the worker's log


class GuardError(GuardMiddlewareError):
    """The guard gave no verdict. ``retry_after`` (seconds) is set where trying again may help; ``opinions`` are the
    members' own where an ensemble was asked; ``revision`` names the weights that were asked, where that is known."""

    def __init__(
        self,
        kind: GuardErrorKind | str,
        message: str = "",
        *,
        retry_after: float | None = None,
        opinions: tuple[Opinion, ...] = (),
        revision: str | None = None,
    ) -> None:
        self.kind = GuardErrorKind(kind)
        self.message = message or self.kind.value
        self.retry_after = retry_after
        self.opinions = opinions
        self.revision = revision
        super().__init__(f"{self.kind.value}: {self.message}")


class RejectKind(StrEnum):
    """Why a request is refused without a verdict; the value is the public error ``code``."""

    INVALID_JSON = "invalid_json"
    INVALID_REQUEST = "invalid_request"
    UNSUPPORTED_FIELD = "unsupported_field"
    UNSUPPORTED_CONTENT = "unsupported_content"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    UNSUPPORTED_ENCODING = "unsupported_encoding"
    INVALID_IMAGE = "invalid_image"
    IMAGE_TOO_LARGE = "image_too_large"
    TOO_MANY_IMAGES = "too_many_images"
    FORBIDDEN_URL = "forbidden_url"
    IMAGE_FETCH_FAILED = "image_fetch_failed"
    BODY_TOO_LARGE = "body_too_large"
    BODY_TIMEOUT = "body_timeout"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"


#: HTTP status by kind: 413 where a limit is exceeded, so that a log tells attack from mistake.
REJECT_STATUS: dict[RejectKind, int] = {
    RejectKind.INVALID_JSON: 400,
    RejectKind.INVALID_REQUEST: 400,
    RejectKind.UNSUPPORTED_FIELD: 400,
    RejectKind.UNSUPPORTED_CONTENT: 400,
    RejectKind.UNSUPPORTED_MEDIA_TYPE: 415,
    RejectKind.UNSUPPORTED_ENCODING: 415,
    RejectKind.INVALID_IMAGE: 400,
    RejectKind.IMAGE_TOO_LARGE: 413,
    RejectKind.TOO_MANY_IMAGES: 413,
    RejectKind.FORBIDDEN_URL: 400,
    RejectKind.IMAGE_FETCH_FAILED: 400,
    RejectKind.BODY_TOO_LARGE: 413,
    RejectKind.BODY_TIMEOUT: 408,
    RejectKind.NOT_FOUND: 404,
    RejectKind.METHOD_NOT_ALLOWED: 405,
}


class RequestRejected(GuardMiddlewareError):
    """A request that is refused before any verdict (basis ``limit`` or ``coverage``).

    ``message`` is public: fixed words and field paths, never content of the request.
    """

    def __init__(self, kind: RejectKind, message: str, *, param: str | None = None) -> None:
        self.kind, self.message, self.param = kind, message, param
        super().__init__(f"{kind.value}: {message}")

    @property
    def status(self) -> int:
        return REJECT_STATUS[self.kind]


class UpstreamErrorKind(StrEnum):
    UNREACHABLE = "upstream_unreachable"
    TIMEOUT = "upstream_timeout"
    RESET = "upstream_reset"
    MALFORMED = "upstream_malformed"
    TOO_LARGE = "upstream_too_large"
    UNSUPPORTED = "upstream_unsupported"  # an answer with content that no dialect rule covers


class UpstreamError(GuardMiddlewareError):
    """The upstream broke, or answered what cannot be screened; nothing of its answer is released."""

    def __init__(self, kind: UpstreamErrorKind, message: str = "") -> None:
        self.kind, self.message = kind, message or kind.value
        super().__init__(f"{kind.value}: {self.message}")
