"""The error body of Anthropic's APIs, and the same inside a stream.

``details.error_code`` is our code: the anthropic SDKs show it as ``error_code``, as they show ``type``. A thread whose
earlier turns did not pass here is not found, in the service's own word: its clients then send all of it again.
"""

from __future__ import annotations

from typing import Final

from guard_middleware import sse
from guard_middleware.dialects.answer_shared import JSON_TYPE
from guard_middleware.dialects.base import PublicError, Reply
from guard_middleware.strictjson import JSONValue, dumps

_REQUEST_ID = b"request-id"
_THREAD_NOT_FOUND = "thread_not_found"
_BY_STATUS: Final = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_TYPES: Final = frozenset({*_BY_STATUS.values(), "invalid_request_error", "api_error"})


def anthropic_error(error: PublicError) -> Reply:
    """``request_id`` and its header are the upstream's, where there is one, or else the id of our decision."""
    id = _request_id(error)
    body = _body(error) | ({"request_id": id} if id else {})
    own = ((_REQUEST_ID, id.encode("latin-1")),) if id and _REQUEST_ID not in dict(error.headers) else ()
    return Reply(error.status, ((b"content-type", JSON_TYPE), *own, *error.headers), dumps(body))


def error_event(error: PublicError) -> bytes:
    """Ends a stream; every client of this API raises it."""
    return sse.encode(dumps(_body(error)), "error")


def _body(error: PublicError) -> dict[str, JSONValue]:
    known = error.type if error.type in _TYPES else None
    kind = _BY_STATUS.get(error.status) or known or ("invalid_request_error" if error.status < 500 else "api_error")
    code = _THREAD_NOT_FOUND if error.param == "previous_response_id" else error.code
    details: dict[str, JSONValue] = {"error_code": code, **(error.detail or {})}
    return {"type": "error", "error": {"type": kind, "message": error.message, "details": details}}


def _request_id(error: PublicError) -> str | None:
    """Of the headers that ``enforce`` set: the upstream's request id before the decision's."""
    found = {name: value.decode("latin-1") for name, value in error.headers}
    return found.get(_REQUEST_ID) or next((id for name, id in found.items() if name.endswith(b"decision-id")), None)
