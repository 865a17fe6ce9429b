"""What answers and streams of several API shapes have in common: findings as errors, envelopes, indexes, chunks."""

from __future__ import annotations

import re
from typing import Final

from guard_middleware import sse
from guard_middleware.dialects.base import Options
from guard_middleware.dialects.fields import Admitted, FieldError, Table, admit, as_object, invalid
from guard_middleware.errors import RejectKind, UpstreamError, UpstreamErrorKind
from guard_middleware.strictjson import JSONValue, StrictJSONError, loads
from guard_middleware.types import Text

JSON_TYPE: Final = b"application/json"
SSE_TYPE: Final = b"text/event-stream; charset=utf-8"
DONE: Final = "[DONE]"
#: how servers and their libraries begin the ids of calls
_BEGINS = (
    "call|tool|tooluse|tool-call|function-call|functions|chatcmpl-tool|toolu|toolu_bdrk|toolu_vrtx|srvtoolu|fc|ctc|cu"
)
#: what comes after that: a counter, a UUID, or letters and digits, which are random only if there are digits among them
_RANDOM = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[A-Za-z0-9]{0,4}|(?=[A-Za-z]{0,23}[0-9])[A-Za-z0-9]{5,64}"
_MACHINE_MADE = re.compile(rf"(({_BEGINS})[_.:-]?)?([0-9]{{1,3}}[_-])?[._]?({_RANDOM})(:[0-9]{{1,4}})?")
_UNSUPPORTED = frozenset({RejectKind.UNSUPPORTED_FIELD, RejectKind.UNSUPPORTED_CONTENT})


def upstream_error(error: FieldError) -> UpstreamError:
    """The same finding about an answer: not screenable, or not of this API."""
    kind = UpstreamErrorKind.UNSUPPORTED if error.kind in _UNSUPPORTED else UpstreamErrorKind.MALFORMED
    return UpstreamError(kind, error.message)


def read_envelope(table: Table, source: dict[str, JSONValue], options: Options) -> Admitted:
    """The top level of an answer or of a chunk, without its choices."""
    if source.get("error") is not None:
        raise UpstreamError(UpstreamErrorKind.RESET, "the upstream reported an error inside its answer")
    return admit(table, source, "", options)


def unread_id(id: str, name: str = "") -> list[Text]:
    """What the guard reads of a call's id: nothing where a machine made it, perhaps from the call's own ``name``.

    Some servers take ids from what the model wrote.
    """
    made = _MACHINE_MADE.fullmatch(id) or (name and _MACHINE_MADE.fullmatch(id.replace(name, "", 1)))
    return [] if made else [Text(id)]


def read_index(choice: dict[str, JSONValue], where: str, choices: int) -> int:
    index = choice.get("index")
    if type(index) is not int or not 0 <= index < choices:
        raise invalid(f"{where}.index", "must be the index of a choice that was asked for")
    return index


def read_data(event: sse.Event) -> dict[str, JSONValue]:
    """The object that an event carries; raises ``UpstreamError``."""
    try:
        return as_object(loads(event.data.encode("utf-8")), "")
    except (StrictJSONError, UnicodeEncodeError):
        raise UpstreamError(UpstreamErrorKind.MALFORMED, "an event that is not JSON") from None
    except FieldError as error:
        raise upstream_error(error) from None


def read_chunk(event: sse.Event) -> dict[str, JSONValue] | None:
    """The object of a chunk, None for ``[DONE]``; raises ``UpstreamError``."""
    if event.event == "error":
        raise UpstreamError(UpstreamErrorKind.RESET, "the upstream reported an error inside its stream")
    if event.event not in ("", "message"):
        raise UpstreamError(UpstreamErrorKind.UNSUPPORTED, "a named event in a stream of this API")
    return None if event.data.strip(" ") == DONE else read_data(event)
