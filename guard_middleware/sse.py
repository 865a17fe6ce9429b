"""Server-sent events, as the WHATWG HTML standard says ("event stream interpretation"), without I/O.

Upstream answers are decoded here and re-encoded here, so that a client sees only lines that were parsed. Lines
end at CR, LF and CRLF and nowhere else: U+0085, U+2028 and U+2029 are content, although ``str.splitlines`` (and
so httpx's line decoder) thinks otherwise. How the bytes are cut into chunks never changes the events.

Refuses (``SSEError``; the decoder stays broken, the stream is to be dropped):
- invalid UTF-8, where the standard would put U+FFFD and so show two readers two texts;
- an event, or a line, of more than ``max_event_bytes``;
- encoding: data with a CR, an event name or a comment with a line break (they would forge lines).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from guard_middleware.errors import GuardMiddlewareError

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


class SSEError(GuardMiddlewareError):
    """An event stream that is not one. The message never quotes the stream."""


@dataclass(frozen=True, slots=True)
class Event:
    """One dispatched event. ``event`` is "" where none is named (a browser calls that "message").

    ``id`` is the last event id seen on the stream so far, as the standard has it.
    """

    event: str
    data: str
    id: str = ""


class Decoder:
    """Bytes in, events out. Holds at most one unfinished event, of at most ``max_event_bytes`` bytes.

    An event that the stream's end finds without its blank line never comes out, as the standard says.
    """

    def __init__(self, *, max_event_bytes: int = 1024 * 1024) -> None:
        self._max = max_event_bytes
        self._line = bytearray()
        self._at_start = True
        self._after_cr = False
        self._broken = False
        self._size = 0
        self._event = ""
        self._data: list[str] = []
        self._id = ""

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that ``chunk`` completes; raises ``SSEError``, and then none of that chunk's events count."""
        if self._broken:
            raise SSEError("the event stream is broken")
        try:
            return self._feed(chunk)
        except SSEError:
            self._broken = True
            raise

    def _feed(self, chunk: bytes) -> list[Event]:
        events: list[Event] = []
        start = 0
        if self._after_cr and chunk:
            self._after_cr = False
            start = chunk.startswith(b"\n")
        while match := _LINE_END.search(chunk, start):
            self._take(chunk[start : match.start()])
            line, self._line = bytes(self._line), bytearray()
            start = match.end()
            # A CR ends its line at once; the LF that may follow in the next chunk belongs to it.
            self._after_cr = start == len(chunk) and match[0] == b"\r"
            event = self._end_line(line)
            if event is not None:
                events.append(event)
        self._take(chunk[start:])
        return events

    def _take(self, piece: bytes) -> None:
        self._line += piece
        if self._at_start and len(self._line) >= 3:
            self._at_start = False
            if self._line.startswith(_BOM):
                del self._line[:3]
        if self._size + len(self._line) > self._max:
            raise SSEError("an event exceeds the size limit")

    def _end_line(self, line: bytes) -> Event | None:
        self._at_start = False
        if not line:
            return self._dispatch()
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            raise SSEError("the event stream is not UTF-8") from None
        if text[0] == ":":
            return None
        self._size += len(line)
        name, _, value = text.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "data":
                self._data.append(value)
            case "event":
                self._event = value
            case "id" if "\0" not in value:
                self._id = value
            case _:  # "retry" is for clients that reconnect; the standard ignores every other name
                pass
        return None

    def _dispatch(self) -> Event | None:
        event = Event(self._event, "\n".join(self._data), self._id) if self._data else None
        self._event, self._data, self._size = "", [], 0
        return event


def encode(data: bytes | str, event: str | None = None) -> bytes:
    """One event. ``bytes`` are UTF-8 (what ``strictjson.dumps`` gives). Raises ``SSEError``."""
    try:
        body = data.encode("utf-8") if isinstance(data, str) else data
        body.decode("utf-8")
        head = b"" if not event else b"event: " + event.encode("utf-8") + b"\n"
    except UnicodeError:
        raise SSEError("an event is UTF-8 text") from None
    if b"\r" in body or _LINE_END.search(head[:-1]):
        raise SSEError("an event cannot hold this line break")
    return head + b"data: " + body.replace(b"\n", b"\ndata: ") + b"\n\n"


def comment(text: str) -> bytes:
    """A comment, ignored by every client: a keep-alive while an answer is held. Raises ``SSEError``."""
    line = text.encode("utf-8", "replace")
    if _LINE_END.search(line):
        raise SSEError("a comment is one line")
    return b": " + line + b"\n\n"
