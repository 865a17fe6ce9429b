"""One request from its first byte to its last: a state machine without I/O and without a clock.

A carrier (the ASGI middleware, a plugin, a replay) feeds it what happened and does what it commands:

    OPEN --request--> INPUT --judged--> UPSTREAM --upstream_end--> OUTPUT --judged--> CLOSED

Every feed answers with one command (``Moderate``, ``Forward``, ``Respond``) or with None while more bytes are due.
``fail`` and ``abort`` are legal in every phase and end in CLOSED. The transaction owns the hold-back: bytes of the
upstream's answer leave it only inside a ``Respond`` that was made after every choice had its decision; whatever
breaks before that drops them. ``record()`` is what telemetry and the audit log say of the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

from guard_middleware import enforce
from guard_middleware.dialects.base import (
    Dialect,
    Headers,
    Options,
    ParsedAnswer,
    ParsedRequest,
    Reply,
    Ruling,
    StreamParser,
)
from guard_middleware.errors import GuardError, RequestRejected, UpstreamError, UpstreamErrorKind
from guard_middleware.limits import Limits
from guard_middleware.policy import EffectivePolicy, decide
from guard_middleware.sse import Decoder, SSEError
from guard_middleware.strictjson import StrictJSONError, dumps, loads
from guard_middleware.types import (
    Action,
    Basis,
    Conversation,
    GuardCall,
    Message,
    Outcome,
    Record,
    Source,
    Verdict,
)


class Phase(Enum):
    OPEN = auto()
    INPUT = auto()
    UPSTREAM = auto()
    OUTPUT = auto()
    CLOSED = auto()


@dataclass(frozen=True, slots=True)
class Call:
    """One question for the guard; ``deadline`` in seconds from now."""

    id: str
    source: Source
    choice: int | None
    conversation: Conversation
    deadline: float
    reader: bool | None


@dataclass(frozen=True, slots=True)
class Judged:
    """What came of a call, and how long it took, in seconds."""

    call: Call
    outcome: Verdict | GuardError
    seconds: float


@dataclass(frozen=True, slots=True)
class Moderate:
    """Ask the guard all of these at once, then feed ``judged``."""

    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Forward:
    """Send this body to the upstream, then feed ``upstream_head``, ``upstream_data`` and ``upstream_end``."""

    body: bytes


@dataclass(frozen=True, slots=True)
class Respond:
    """Send this to the client; the transaction is closed."""

    reply: Reply


Command = Moderate | Forward | Respond


class Transaction:
    """The state of one request. ``created`` is Unix time in seconds, for answers that we make ourselves."""

    def __init__(self, id: str, method: str, path: str, *, limits: Limits, created: int) -> None:
        self.id = id
        self.phase = Phase.OPEN
        self.upstream_called = False
        self._method, self._path, self._limits, self._created = method, path, limits, created
        self._dialect: Dialect | None = None
        self._options = Options()
        self._policy: EffectivePolicy | None = None
        self._request: ParsedRequest | None = None
        self._calls: tuple[GuardCall, ...] = ()
        self._status = 0
        self._upstream_headers: Headers = ()
        self._body = bytearray()
        self._events: tuple[Decoder, StreamParser] | None = None
        self._held = self._released = 0
        self._answer: ParsedAnswer | None = None
        self._outcome: Outcome = "aborted"
        self._error: str | None = None
        self._retry_after: float | None = None
        self._sent_status = 0

    # -- what the carrier learns about the request before it can parse it --

    def routed(self, dialect: Dialect | None, options: Options, policy: EffectivePolicy) -> None:
        """Which dialect speaks (None passes through) and which policy applies."""
        self._dialect, self._options, self._policy = dialect, options, policy

    def pass_through(self) -> Command:
        """A route without content, such as the list of models: forwarded, its answer re-encoded."""
        self._move(Phase.OPEN, Phase.UPSTREAM)
        self.upstream_called = True
        return Forward(b"")

    def request(self, request: ParsedRequest) -> Command:
        """The parsed request, its media canonical."""
        self._request = request
        policy = self._effective
        if not policy.input.moderate:
            self._move(Phase.OPEN, Phase.UPSTREAM)
            return self._forward()
        self._move(Phase.OPEN, Phase.INPUT)
        return Moderate((self._call("input", None, request.conversation),))

    def judged(self, results: Sequence[Judged]) -> Command:
        """The outcomes of the calls of the last ``Moderate``, in its order."""
        calls = tuple(
            GuardCall(
                result.call.source,
                result.call.choice,
                decide(self._effective, result.call.source, result.outcome, decision_id=result.call.id),
                result.seconds,
            )
            for result in results
        )
        self._calls += calls
        waits = [r.outcome.retry_after for r in results if isinstance(r.outcome, GuardError) and r.outcome.retry_after]
        self._retry_after = max(waits, default=None)
        if self.phase is Phase.INPUT:
            return self._input_decided(calls[0])
        self._move(Phase.OUTPUT, Phase.OUTPUT)
        return self._output_decided(calls)

    # -- the upstream's answer --

    def upstream_head(self, status: int, headers: Headers) -> None:
        """Status and raw headers; raises ``UpstreamError`` for an answer that cannot be screened."""
        self._status, self._upstream_headers = status, headers
        values = {name.lower(): value.strip().lower() for name, value in headers}
        if values.get(b"content-encoding", b"identity") not in (b"identity", b""):
            raise UpstreamError(UpstreamErrorKind.UNSUPPORTED, "compressed answer")
        if status != 200 or self._request is None or self._dialect is None:
            return
        streamed = values.get(b"content-type", b"").partition(b";")[0].strip() == b"text/event-stream"
        if streamed != self._request.stream:
            raise UpstreamError(UpstreamErrorKind.MALFORMED, "a stream where none was asked for, or the reverse")
        if streamed:
            self._events = Decoder(), self._dialect.stream_parser(self._request, self._options)

    def upstream_data(self, data: bytes) -> None:
        """A piece of the body: held, never answered with bytes. Raises ``UpstreamError``."""
        self._held += len(data)
        if self._held > self._limits.answer_bytes:
            raise UpstreamError(UpstreamErrorKind.TOO_LARGE)
        if self._events is None:
            self._body += data
            return
        decoder, parser = self._events
        try:
            for event in decoder.feed(data):
                parser.feed(event)
        except SSEError as error:
            raise UpstreamError(UpstreamErrorKind.MALFORMED, str(error)) from None

    def upstream_end(self) -> Command:
        """The whole answer has come. Raises ``UpstreamError`` where it cannot be screened."""
        if not 200 <= self._status < 300:
            return self._upstream_refused()
        if self._status != 200:
            raise UpstreamError(UpstreamErrorKind.UNSUPPORTED, "a success that is not 200")
        if self._request is None or self._dialect is None:
            return self._pass_back()
        if self._events is not None:
            decoder, parser = self._events
            for event in decoder.close():
                parser.feed(event)
            self._answer = parser.finish()
        else:
            self._answer = self._dialect.parse_response(self._json(), self._request, self._options)
        answer, policy = self._answer, self._effective
        calls = tuple(
            self._call("output", item.index, replace(self._request.conversation, answer=item.message))
            for item in answer.answers
            if item.message.parts
        )
        self._move(Phase.UPSTREAM, Phase.OUTPUT)
        if calls and policy.output.moderate:
            return Moderate(calls)
        return self._output_decided(())

    # -- endings --

    def fail(self, error: RequestRejected | UpstreamError) -> Respond:
        """A refusal before any verdict, or an upstream that broke: everything held is dropped."""
        if isinstance(error, RequestRejected):
            self._outcome, self._error = "rejected", error.kind.value
        else:
            self._outcome, self._error = "upstream_error", error.kind.value
        return self._close(enforce.failure(self._dialect, error, self.id))

    def abort(self, reason: str) -> None:
        """The client went away, or the carrier broke; nothing more can be sent."""
        self._error = reason
        self._drop()
        self.phase = Phase.CLOSED

    @property
    def calls(self) -> tuple[GuardCall, ...]:
        """Every question to the guard so far, with its decision."""
        return self._calls

    @property
    def model(self) -> str | None:
        return self._request.model if self._request else None

    def record(self, timings: tuple[tuple[str, float], ...] = ()) -> Record:
        """What happened; final once the phase is CLOSED. ``timings`` are the carrier's, in seconds."""
        request, policy = self._request, self._policy
        return Record(
            id=self.id,
            dialect=self._dialect.name if self._dialect else None,
            method=self._method,
            path=self._path,
            model=self.model,
            stream=request.stream if request else False,
            tenant=policy.tenant if policy else None,
            policy=policy.name if policy else None,
            policy_digest=policy.digest if policy else None,
            outcome=self._outcome,
            status=self._sent_status,
            error=self._error,
            upstream_called=self.upstream_called,
            calls=self._calls,
            held_bytes=self._held,
            released_bytes=self._released,
            conversation=request.conversation if request else None,
            answers=self._messages,
            timings=timings,
        )

    # -- inside --

    @property
    def _effective(self) -> EffectivePolicy:
        if self._policy is None:
            raise RuntimeError("no policy: routed() comes first")
        return self._policy

    @property
    def _messages(self) -> tuple[Message, ...]:
        return tuple(item.message for item in self._answer.answers) if self._answer else ()

    def _move(self, expected: Phase, to: Phase) -> None:
        if self.phase is not expected:
            raise RuntimeError(f"transaction is {self.phase.name}, not {expected.name}")
        self.phase = to

    def _call(self, source: Source, choice: int | None, conversation: Conversation) -> Call:
        policy = self._effective.source(source)
        id = f"{self.id}.{source}" if choice is None else f"{self.id}.{source}.{choice}"
        return Call(id, source, choice, conversation, policy.deadline, policy.reader)

    def _forward(self) -> Forward:
        assert self._request is not None
        self.upstream_called = True
        return Forward(self._request.encode())

    def _input_decided(self, call: GuardCall) -> Command:
        if call.decision.action is not Action.BLOCK:
            self._move(Phase.INPUT, Phase.UPSTREAM)
            return self._forward()
        assert self._dialect is not None
        assert self._request is not None
        if call.decision.basis is Basis.ERROR:
            return self._guard_failed(call)
        self._outcome = "blocked"
        notice = enforce.notice(call.decision, self._request.conversation)
        if self._effective.block_style == "soft":
            reply = self._dialect.soft_block(self._request, notice, self._created)
            return self._close(replace(reply, headers=(*reply.headers, *enforce.guard_headers(notice.id, "block"))))
        return self._close(enforce.blocked_prompt(self._dialect, notice))

    def _output_decided(self, calls: tuple[GuardCall, ...]) -> Command:
        assert self._answer is not None
        for call in calls:
            if call.decision.action is Action.BLOCK and call.decision.basis is Basis.ERROR:
                return self._guard_failed(call)
        action = enforce.worst(call.decision.action for call in self._calls)
        self._outcome = _OUTCOMES[action]
        body = self._answer.render(self._ruling(calls))
        return self._release(self._answer.content_type, body, action)

    def _ruling(self, calls: tuple[GuardCall, ...]) -> Ruling:
        assert self._answer is not None
        asked = next((call for call in self._calls if call.source == "input"), None)
        conversation = self._request.conversation if self._request else Conversation(())
        notices = {
            call.choice: enforce.notice(call.decision, conversation) for call in calls if call.choice is not None
        }
        for answer in self._answer.answers:  # the operator left the output unguarded: released, and recorded as such
            if answer.message.parts and answer.index not in notices and not self._effective.output.moderate:
                notices[answer.index] = enforce.not_moderated(f"{self.id}.output.{answer.index}", "output")
        return Ruling(
            request=None if asked is None else enforce.notice(asked.decision, conversation),
            choices=notices,
            soft=self._effective.block_style == "soft",
        )

    def _guard_failed(self, call: GuardCall) -> Respond:
        self._outcome, self._error = "guard_error", call.decision.error
        return self._close(enforce.guard_unavailable(self._dialect, call.decision, self._retry_after))

    def _upstream_refused(self) -> Command:
        """The upstream's own error: its status and codes pass, its words do not."""
        self._outcome, self._error = "upstream_error", f"upstream_status_{self._status}"
        try:
            body = self._json()
        except UpstreamError:
            body = None
        reply = enforce.upstream_refused(self._dialect, self._status, body, self._upstream_headers, self.id)
        return self._close(reply)

    def _pass_back(self) -> Command:
        self._outcome = "allowed"
        return self._release(b"application/json", dumps(self._json()), Action.ALLOW)

    def _release(self, content_type: bytes, body: bytes, action: Action) -> Respond:
        self._released = len(body)
        headers = enforce.strip_response_headers(self._upstream_headers)
        return self._close(
            Reply(200, ((b"content-type", content_type), *headers, *enforce.guard_headers(self.id, action)), body)
        )

    def _json(self) -> Any:
        try:
            return loads(bytes(self._body), max_depth=self._limits.json_depth)
        except StrictJSONError as error:
            raise UpstreamError(UpstreamErrorKind.MALFORMED, str(error)) from None

    def _close(self, reply: Reply) -> Respond:
        self._drop()
        self.phase = Phase.CLOSED
        self._sent_status = reply.status
        return Respond(reply)

    def _drop(self) -> None:
        self._body.clear()
        self._events = None


_OUTCOMES: dict[Action, Outcome] = {
    Action.ALLOW: "allowed",
    Action.ANNOTATE: "annotated",
    Action.BLOCK: "blocked",
}
