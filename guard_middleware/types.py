"""The neutral form of what is moderated, and of what is decided about it.

Every value here is frozen and compares by content, so that two dialects can be tested for the same
Conversation and a verdict can be keyed by the content it judged. Roles and part kinds follow the
OpenTelemetry GenAI messages (semantic-conventions-genai, ``gen_ai.input.messages``).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, get_args

Role = Literal["system", "user", "assistant", "tool"]
Source = Literal["input", "output"]
Label = Literal["harmful", "unharmful"]
Mode = Literal["reason", "label", "hybrid"]


@dataclass(frozen=True, slots=True)
class Text:
    """Visible text."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A model's visible chain of thought (``reasoning_content`` and its kin)."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model asks for. ``arguments`` is text, JSON or not, with JSON's ``\\uXXXX`` written out."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCallResponse:
    """What a tool answered, as text. Images of a tool's answer follow it as their own parts."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Blob:
    """Canonical media bytes: the same bytes go to the guard and to the upstream."""

    mime_type: str
    data: bytes = field(repr=False)
    digest: str = ""

    def __post_init__(self) -> None:
        if not self.digest:
            object.__setattr__(self, "digest", hashlib.sha256(self.data).hexdigest())


@dataclass(frozen=True, slots=True)
class Uri:
    """Media by reference (``data:`` or http(s)), before it is fetched and made canonical."""

    uri: str


Part = Text | Reasoning | ToolCall | ToolCallResponse | Blob | Uri


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    parts: tuple[Part, ...]
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Definition:
    """Text that steers the model from outside the messages: a tool definition, an output schema, a stop string."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a request asks, and optionally one answer to it.

    ``messages`` and ``definitions`` are everything that the caller sends. ``answer`` is one choice of
    the upstream's answer; None means that the request is judged alone.
    """

    messages: tuple[Message, ...]
    definitions: tuple[Definition, ...] = ()
    answer: Message | None = None

    def blobs(self) -> tuple[Blob, ...]:
        """All media in the order in which the transcript places them."""
        messages = self.messages if self.answer is None else (*self.messages, self.answer)
        return tuple(part for message in messages for part in message.parts if isinstance(part, Blob))


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that one verdict cost: prompt (image tokens included), completion, and its reasoning share."""

    prompt: int = 0
    completion: int = 0
    reasoning: int = 0


@dataclass(frozen=True, slots=True)
class Judging:
    """How much thinking a verdict gets: ``reason`` thinks and then judges, ``label`` judges at once, and ``hybrid``
    judges at once and thinks where the score then lies from ``low`` to ``high``.

    Raises ``ValueError`` for another mode, and for bounds that are no range within 0..1 or stand beside no ``hybrid``.
    """

    mode: Mode = "reason"
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"no mode of judging: {self.mode!r}")
        if not 0.0 <= self.low < self.high <= 1.0 or (self.mode != "hybrid" and (self.low, self.high) != (0.0, 1.0)):
            raise ValueError(f"mode {self.mode} does not think between {self.low!r} and {self.high!r}")


REASON = Judging()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the guard says. ``response`` is None exactly when no answer was given to judge.

    Scores are the guard's probability of *harmful*, 0..1. ``drawn_text`` is what the reader found in
    each image, in image order. ``timings`` are seconds by stage (queue, reader, generate).

    ``cached`` says that this verdict was known, or was just being made for somebody else: it cost no tokens now.
    ``left_out`` counts what of earlier turns was judged before and not read again (``characters``, ``images``).
    ``judging`` is how it was asked for, ``thought`` whether the guard reasoned about any of it.
    ``ignored`` is what was there to judge and the operator has this guard not read (``text``, ``image``): of that,
    *unharmful* says nothing.
    ``opinions`` are the members' own where an ensemble judged.
    """

    request: Label
    response: Label | None
    request_score: float
    response_score: float | None
    reasoning: str
    usage: Usage
    model: str
    revision: str
    categories: tuple[str, ...] = ()
    drawn_text: tuple[str, ...] = ()
    timings: tuple[tuple[str, float], ...] = ()
    cached: bool = False
    left_out: tuple[tuple[str, int], ...] = ()
    judging: Judging = REASON
    thought: bool = True
    ignored: tuple[str, ...] = ()
    opinions: tuple[Opinion, ...] = ()

    def label(self, source: Source) -> Label | None:
        return self.request if source == "input" else self.response

    def score(self, source: Source) -> float | None:
        return self.request_score if source == "input" else self.response_score


#: the ``error`` of a guard that was still being asked when the others of its ensemble had decided
NOT_NEEDED = "not_needed"


@dataclass(frozen=True, slots=True)
class Opinion:
    """What one guard of an ensemble said: a verdict, or in ``error`` a ``GuardErrorKind``'s value or ``NOT_NEEDED``.

    ``began`` (seconds after the question came) is when it was asked, ``seconds`` how long it took.
    """

    guard: str
    verdict: Verdict | None
    error: str | None
    began: float
    seconds: float


class Action(StrEnum):
    ALLOW = "allow"
    ANNOTATE = "annotate"
    BLOCK = "block"


class Basis(StrEnum):
    """Why a decision is what it is; ``limit`` and ``coverage`` are refusals made before any verdict."""

    VERDICT = "verdict"
    ERROR = "error"
    LIMIT = "limit"
    COVERAGE = "coverage"


@dataclass(frozen=True, slots=True)
class Decision:
    """What policy makes of one verdict (or of its absence).

    ``would`` is what a policy in ``shadow`` mode would have done; elsewhere it equals ``action``.
    """

    id: str
    source: Source
    action: Action
    basis: Basis
    policy: str
    policy_digest: str
    would: Action
    verdict: Verdict | None = None
    error: str | None = None
    show_reasoning: bool = False


@dataclass(frozen=True, slots=True)
class GuardCall:
    """One question to the guard and what came of it. ``choice`` is the answer's index (None for input).

    ``opinions`` are those of the guards of an ensemble that were asked; ``revision`` is of the weights that were asked,
    also where they gave no verdict (None: nobody knows them).
    """

    source: Source
    choice: int | None
    decision: Decision
    seconds: float
    opinions: tuple[Opinion, ...] = ()
    revision: str | None = None


StreamMode = Literal["hold", "window", "async"]
Outcome = Literal["allowed", "annotated", "blocked", "guard_error", "rejected", "upstream_error", "aborted"]


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of one request when it is over: the source of its span attributes and of its log line.

    ``stream_mode`` is how a streamed answer left (None where none came), ``released_characters`` how much of its text.
    ``leaked_characters`` is the most of one choice that left ahead of its verdict: 0, but in mode ``async``.
    ``conversation`` and ``answers`` are raw content: they are digested, and leave only where the
    operator's configuration captures content.
    """

    id: str
    dialect: str | None
    method: str
    path: str
    model: str | None
    stream: bool
    tenant: str | None
    policy: str | None
    policy_digest: str | None
    outcome: Outcome
    status: int
    error: str | None
    upstream_called: bool
    calls: tuple[GuardCall, ...] = ()
    held_bytes: int = 0
    released_bytes: int = 0
    conversation: Conversation | None = None
    answers: tuple[Message, ...] = ()
    leaked_characters: int = 0
    stream_mode: StreamMode | None = None
    released_characters: int = 0
    timings: tuple[tuple[str, float], ...] = ()
