"""What a transaction and its carrier say to each other: the commands, and the questions that come back answered.

The carrier does the commands of one feed in their order; ``transaction`` says when which may come.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from guard_middleware.config import SourcePolicy
from guard_middleware.dialects.base import Headers, Reply
from guard_middleware.errors import GuardError
from guard_middleware.types import Conversation, Source, Verdict


@dataclass(frozen=True, slots=True)
class Call:
    """One question for the guard, by the ``rules`` of its source."""

    id: str
    source: Source
    choice: int | None
    conversation: Conversation
    rules: SourcePolicy


@dataclass(frozen=True, slots=True)
class Judged:
    """What came of a call, and how long it took, in seconds."""

    call: Call
    outcome: Verdict | GuardError
    seconds: float


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the guard this, then feed ``judged``."""

    call: Call


@dataclass(frozen=True, slots=True)
class Forward:
    """Send this body to the upstream, then feed ``upstream_head``, ``upstream_data`` and ``upstream_end``."""

    body: bytes


@dataclass(frozen=True, slots=True)
class Stop:
    """Break off the call to the upstream; what still comes of it is ignored."""


@dataclass(frozen=True, slots=True)
class Respond:
    """Send this to the client, whole; the transaction is closed."""

    reply: Reply


@dataclass(frozen=True, slots=True)
class Begin:
    """Send the head of a streamed answer to the client."""

    status: int
    headers: Headers


@dataclass(frozen=True, slots=True)
class Send:
    """Send a piece of the body to the client; ``says`` tells that it holds text of the answer."""

    data: bytes
    says: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Rest:
    """Send these pieces of the body, each when the one before it is gone; then the body is complete."""

    pieces: Iterator[bytes]


@dataclass(frozen=True, slots=True)
class End:
    """The body is complete; the transaction is closed."""


Command = Ask | Forward | Stop | Respond | Begin | Send | Rest | End
