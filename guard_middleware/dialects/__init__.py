"""Which dialect answers which request: an allow-list of exact methods and raw paths, and nothing else.

Paths are compared as they stand on the wire, without decoding or normalising: a spelling that another server
might fold into a known route (``//``, ``%2F``, upper case, a trailing slash, ``;``) is simply not found.
"""

from __future__ import annotations

import re
from typing import Final

from guard_middleware.dialects.base import Dialect, Route
from guard_middleware.dialects.chat_completions import ChatCompletions
from guard_middleware.dialects.completions import Completions
from guard_middleware.dialects.messages import Messages, MessagesCount
from guard_middleware.dialects.responses import Responses
from guard_middleware.errors import RejectKind, RequestRejected

CHAT_COMPLETIONS: Final[Dialect] = ChatCompletions()
COMPLETIONS: Final[Dialect] = Completions()
MESSAGES: Final[Dialect] = Messages()
MESSAGES_COUNT: Final[Dialect] = MessagesCount()
RESPONSES: Final[Dialect] = Responses()

_ROUTES: Final[dict[bytes, tuple[bytes, Route]]] = {
    b"/v1/chat/completions": (b"POST", Route(CHAT_COMPLETIONS)),
    b"/v1/completions": (b"POST", Route(COMPLETIONS)),
    b"/v1/messages": (b"POST", Route(MESSAGES)),
    b"/v1/messages/count_tokens": (b"POST", Route(MESSAGES_COUNT)),
    b"/v1/responses": (b"POST", Route(RESPONSES)),
    b"/v1/models": (b"GET", Route(None)),
}
#: one model by its id, whose slashes an SDK may escape; no segment may start with a dot
_SEGMENT: Final = rb"[A-Za-z0-9_][A-Za-z0-9._:@+-]*"
_MODEL: Final = re.compile(rb"/v1/models/" + _SEGMENT + rb"(?:(?:/|%2[Ff])" + _SEGMENT + rb"){0,7}")


def route(method: str, path: bytes) -> Route:
    """The route of a request by its method and raw path (no query); raises ``RequestRejected``."""
    found = _ROUTES.get(path)
    if found is None and len(path) <= 256 and _MODEL.fullmatch(path):
        found = (b"GET", Route(None))
    if found is None:
        raise RequestRejected(RejectKind.NOT_FOUND, "This gateway does not serve this path")
    if method.encode("latin-1", "replace") != found[0]:
        raise RequestRejected(RejectKind.METHOD_NOT_ALLOWED, "This path does not take this method")
    return found[1]
