"""One request from its first byte to its last: a state machine without I/O and without a clock.

A carrier (the ASGI middleware, a plugin, a replay) feeds it what happened and does what it commands:

    OPEN --request--> INPUT --judged--> UPSTREAM --upstream_end--> OUTPUT --judged--> CLOSED

Every feed answers with commands, in order: ask the guard, call or stop the upstream, send to the client. Several
questions may be open at once; their answers come in any order. A policy that races commands the upstream call
together with the input's question, and the upstream is heard in INPUT too; nothing is sent before that verdict.
``fail`` and ``abort`` are legal in every phase and end in CLOSED.

The transaction owns the hold-back. What leaves it left through ``HoldBack`` after a verdict (in mode ``async`` within
its bound before one), or inside a ``Respond`` after every choice had its decision; whatever breaks before that drops
the rest. ``record()`` is what telemetry and the audit log say of the request.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import chain
from typing import Any

from guard_middleware import enforce
from guard_middleware.commands import Ask, Begin, Call, Command, End, Forward, Judged, Respond, Rest, Send, Stop
from guard_middleware.config import StreamRules
from guard_middleware.decided import Decided
from guard_middleware.dialects.answer_shared import JSON_TYPE, SSE_TYPE
from guard_middleware.dialects.base import (
    Answer,
    Dialect,
    Headers,
    Options,
    ParsedAnswer,
    ParsedRequest,
    PublicError,
    Reply,
    StreamParser,
)
from guard_middleware.errors import RejectKind, RequestRejected, UpstreamError, UpstreamErrorKind
from guard_middleware.holdback import HoldBack, Window
from guard_middleware.limits import Limits
from guard_middleware.policy import EffectivePolicy, decide
from guard_middleware.sse import Decoder, SSEError
from guard_middleware.strictjson import StrictJSONError, dumps, loads
from guard_middleware.types import (
    Action,
    Basis,
    Conversation,
    GuardCall,
    Outcome,
    Record,
    Source,
    StreamMode,
)


class Phase(Enum):
    OPEN = auto()
    INPUT = auto()
    UPSTREAM = auto()
    OUTPUT = auto()
    CLOSED = auto()


@dataclass(slots=True)
class _Stream:
    """A streamed answer in the making."""

    decoder: Decoder
    parser: StreamParser
    hold: HoldBack
    begun: bool = False


class Transaction:
    """The state of one request. ``created`` is Unix time in seconds, for answers that we make ourselves."""

    def __init__(self, id: str, method: str, path: str, *, limits: Limits, created: int) -> None:
        self.id = id
        self.phase = Phase.OPEN
        self.upstream_called = False
        #: the id of an answer that may be continued, and the conversation that it ends
        self.history: tuple[str, Conversation] | None = None
        self._method, self._path, self._limits, self._created = method, path, limits, created
        self._dialect: Dialect | None = None
        self._options = Options()
        self._policy: EffectivePolicy | None = None
        self._request: ParsedRequest | None = None
        self._open: dict[str, Window | None] = {}
        self._decided = Decided(id)
        self._status = 0
        self._upstream_headers: Headers = ()
        self._upstream_open = False
        self._body = bytearray()
        self._stream: _Stream | None = None
        self._held = self._released = 0
        self._answer: ParsedAnswer | None = None
        self._answers: tuple[Answer, ...] = ()
        self._outcome: Outcome = "aborted"
        self._error: str | None = None
        self._sent_status = 0
        self._mode: StreamMode | None = None
        self._leaked = self._shown = 0
        self._upstream_failed: UpstreamError | None = None

    # -- what the carrier learns about the request before it can parse it --

    def routed(self, dialect: Dialect | None, options: Options, policy: EffectivePolicy) -> None:
        """Which dialect speaks (None passes through) and which policy applies."""
        self._dialect, self._options, self._policy = dialect, options, policy

    def pass_through(self) -> list[Command]:
        """A route without content, such as the list of models: forwarded, its answer re-encoded."""
        self._move(Phase.OPEN, Phase.UPSTREAM)
        return [self._forward(b"")]

    def request(self, request: ParsedRequest) -> list[Command]:
        """The parsed request, its media canonical. Raises ``RequestRejected`` where it may not be raced."""
        policy = self._effective
        if policy.race and policy.input.moderate and request.server_tools:
            raise RequestRejected(
                RejectKind.UNSUPPORTED_FIELD,
                "This service does not let the model service act on tools of its own",
                param="tools",
            )
        self._request = request
        if not policy.input.moderate:
            self._move(Phase.OPEN, Phase.UPSTREAM)
            return [self._forward(request.encode())]
        self._move(Phase.OPEN, Phase.INPUT)
        asked: list[Command] = [self._ask("input", None, request.conversation)]
        return [*asked, self._forward(request.encode())] if policy.race else asked

    def judged(self, result: Judged) -> list[Command]:
        """The outcome of one open question."""
        if result.call.id not in self._open:
            raise RuntimeError(f"{result.call.id} was not asked")
        window = self._open.pop(result.call.id)
        decision = decide(self._effective, result.call.source, result.outcome, decision_id=result.call.id)
        call = self._decided.add(result, decision)
        if self.phase is Phase.CLOSED:
            return []
        if call.choice is None:
            return self._input_decided(call)
        if decision.action is Action.BLOCK and decision.basis is Basis.ERROR:
            return self._guard_failed(call)
        self._output_judged(call.choice, call, window)
        return self._go_on()

    def silent(self) -> list[Command]:
        """Nothing was sent for as long as the policy lets a stream be silent: a sign of life, where one is legal."""
        if self._stream is None or self.phase in (Phase.INPUT, Phase.CLOSED):
            return []
        return [*self._begin(), Send(self._stream.parser.keep_alive)]

    @property
    def paused(self) -> bool:
        """Whether the carrier should read no further from the upstream until the guard has caught up."""
        return self._stream is not None and self._stream.hold.paused

    @property
    def keep_alive(self) -> float:
        """Seconds of silence after which ``silent`` is due."""
        return self._effective.output.stream.keep_alive if self._policy else 600.0

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
            self._mode = self._rules.mode
            parser = self._dialect.stream_parser(self._request, self._options)
            self._stream = _Stream(Decoder(), parser, HoldBack(parser, self._rules))

    def upstream_data(self, data: bytes) -> list[Command]:
        """A piece of the body. Raises ``UpstreamError``."""
        if self.phase is Phase.CLOSED:
            return []
        self._held += len(data)
        if self._held > self._limits.answer_bytes:
            raise UpstreamError(UpstreamErrorKind.TOO_LARGE)
        if self._stream is None:
            self._body += data
            return []
        try:
            for event in self._stream.decoder.feed(data):
                self._stream.hold.feed(self._stream.parser.feed(event))
        except SSEError as error:
            raise UpstreamError(UpstreamErrorKind.MALFORMED, str(error)) from None
        return [] if self._mode == "hold" else self._go_on()

    def upstream_end(self) -> list[Command]:
        """The whole answer has come. Raises ``UpstreamError`` where it cannot be screened."""
        if self.phase is Phase.CLOSED:
            return []
        self._upstream_open = False
        return [] if self.phase is Phase.INPUT else self._ended()

    # -- endings --

    def fail(self, error: RequestRejected | UpstreamError) -> list[Command]:
        """A refusal before any verdict, or an upstream that broke: everything held is dropped.

        In a race the client hears of the upstream only after the input's verdict: a blocked prompt looks the same,
        whichever was first.
        """
        if self.phase is Phase.CLOSED:
            return []
        if self.phase is Phase.INPUT and isinstance(error, UpstreamError):
            self._upstream_failed, self._upstream_open = error, False
            self._drop()
            return []
        if isinstance(error, RequestRejected):
            self._outcome, self._error = "rejected", error.kind.value
        else:
            self._outcome, self._error = "upstream_error", error.kind.value
        return self._broken(enforce.failure(error, self.id))

    def abort(self, reason: str) -> None:
        """The client went away, or the carrier broke; nothing more can be sent."""
        self._error = reason
        self._drop()
        self.phase = Phase.CLOSED

    @property
    def calls(self) -> tuple[GuardCall, ...]:
        """Every question to the guard so far, with its decision."""
        return self._decided.calls

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
            calls=self._decided.by_choice,
            held_bytes=self._held,
            released_bytes=self._released,
            conversation=request.conversation if request else None,
            answers=tuple(answer.message for answer in self._answers),
            timings=timings,
            leaked_characters=self._leaked,
            stream_mode=self._mode,
            released_characters=self._shown,
        )

    # -- inside --

    @property
    def _effective(self) -> EffectivePolicy:
        if self._policy is None:
            raise RuntimeError("no policy: routed() comes first")
        return self._policy

    def _move(self, expected: Phase, to: Phase) -> None:
        if self.phase is not expected:
            raise RuntimeError(f"transaction is {self.phase.name}, not {expected.name}")
        self.phase = to

    @property
    def _rules(self) -> StreamRules:
        """How the answer may leave; an output that nobody judges has nothing to wait for but its own end."""
        output = self._effective.output
        return output.stream if output.moderate else StreamRules()

    def _ask(self, source: Source, choice: int | None, conversation: Conversation, window: Window | None = None) -> Ask:
        policy = self._effective.source(source)
        id = f"{self.id}.{source}" if choice is None else f"{self.id}.{source}.{choice}"
        id = id if window is None else f"{id}.w{window.number}"
        self._open[id] = window
        return Ask(Call(id, source, choice, conversation, policy))

    def _forward(self, body: bytes) -> Forward:
        self.upstream_called = self._upstream_open = True
        return Forward(body)

    def _input_decided(self, call: GuardCall) -> list[Command]:
        assert self._request is not None
        if call.decision.action is not Action.BLOCK:
            self._move(Phase.INPUT, Phase.UPSTREAM)
            if self._upstream_failed is not None:
                return self.fail(self._upstream_failed)
            if not self.upstream_called:
                return [self._forward(self._request.encode())]
            return self._go_on() if self._upstream_open else self._ended()
        if call.decision.basis is Basis.ERROR:
            return self._guard_failed(call)
        assert self._dialect is not None
        self._outcome = "blocked"
        notice = enforce.notice(call.decision, self._request.conversation)
        if self._effective.block_style == "soft":
            reply = self._dialect.soft_block(self._request, notice, self._created)
            headers = (*reply.headers, *enforce.guard_headers(notice.id, "block"))
            return self._close(replace(reply, headers=headers))
        return self._close(enforce.render(self._dialect, enforce.blocked_prompt(notice)))

    def _ended(self) -> list[Command]:
        """The upstream is through and the input has its verdict."""
        if not 200 <= self._status < 300:
            return self._upstream_refused()
        if self._status != 200:
            raise UpstreamError(UpstreamErrorKind.UNSUPPORTED, "a success that is not 200")
        if self._request is None or self._dialect is None:
            self._outcome = "allowed"
            return self._close(self._reply(JSON_TYPE, dumps(self._json()), Action.ALLOW))
        if self._stream is not None:
            self._answers = self._stream.parser.finish()
        else:
            self._answer = self._dialect.parse_response(self._json(), self._request, self._options)
            self._answers = self._answer.answers
        self._move(Phase.UPSTREAM, Phase.OUTPUT)
        if not self._effective.output.moderate:
            self._decided.leave_unread(answer.index for answer in self._answers if answer.message.parts)
            return self._go_on()
        asked = [self._ask_whole(answer) for answer in self._answers if self._due(answer)]
        return [*asked, *self._go_on()]

    def _due(self, answer: Answer) -> bool:
        """Whether a choice still needs a verdict on all that it said."""
        if not answer.message.parts:
            return False
        hold = self._stream.hold if self._stream else None
        return hold is None or (answer.index not in hold.cut_choices and not hold.covered(answer.index, answer.message))

    def _ask_whole(self, answer: Answer) -> Ask:
        assert self._request is not None
        self._decided.expect_whole(answer.index)
        return self._ask("output", answer.index, replace(self._request.conversation, answer=answer.message))

    def _output_judged(self, choice: int, call: GuardCall, window: Window | None) -> None:
        """A block cuts its choice at once; any other verdict on a window lets that window's text leave."""
        if not self._decided.keep(choice, call, whole=window is None) or self._stream is None:
            return
        if call.decision.action is Action.BLOCK:
            self._stream.hold.cut(choice, self._decided.notices(self._conversation)[choice], self._soft)
        elif window is not None:
            self._stream.hold.cleared(window)

    def _go_on(self) -> list[Command]:
        """Whatever the last event made possible: windows to ask about, text to release, the end."""
        if self.phase is Phase.OUTPUT and not self._open:
            return self._output_decided()
        stream = self._stream
        if stream is None or self.phase not in (Phase.UPSTREAM, Phase.OUTPUT):
            return []
        assert self._request is not None
        if len(stream.hold.cut_choices) == self._request.choices:
            return self._finished(stream)
        if self.phase is Phase.OUTPUT:
            return self._send(stream.hold.release()) if stream.begun else []
        asked: list[Command] = []
        if self._effective.output.moderate:
            for window in stream.hold.due():
                answered = replace(self._request.conversation, answer=window.message)
                asked.append(self._ask("output", window.choice, answered, window))
        return [*asked, *self._send(stream.hold.release())]

    def _output_decided(self) -> list[Command]:
        if self._stream is None:
            assert self._answer is not None
            ruling = self._decided.ruling(self._conversation, soft=self._soft)
            body = self._answer.render(ruling)
            self._remember(self._answer.answer_id)
            return self._close(self._reply(JSON_TYPE, body, self._settle()))
        return self._finished(self._stream)

    def _finished(self, stream: _Stream) -> list[Command]:
        """The end of a stream: every choice has its last verdict, or was cut."""
        ruling = self._decided.ruling(self._conversation, soft=self._soft)
        self._remember(stream.parser.answer_id)
        action = self._settle()
        stopped = self._stopped()
        pieces = stream.hold.finish(lambda: stream.parser.close(ruling))
        data, more = next(pieces), next(pieces, None)
        if more is not None:
            self.phase = Phase.CLOSED
            return [*stopped, *self._begin(action), Rest(self._counted(chain((data, more), pieces)))]
        if not stream.begun:
            return [*stopped, *self._close(self._reply(SSE_TYPE, data, action))]
        return [*stopped, *self._send(data), self._end()]

    def _counted(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for data in pieces:
            self._released += len(data)
            yield data
        self._drop()

    def _settle(self) -> Action:
        self._outcome = _OUTCOMES[self._decided.action]
        return self._decided.action

    def _remember(self, answer_id: str | None) -> None:
        """Keeps what a later request may continue: only an answer that was released."""
        if answer_id and self._request and not self._decided.any_choice_blocked:
            answer = self._answers[0].message if self._answers else None
            self.history = (answer_id, replace(self._request.conversation, answer=answer))

    @property
    def _soft(self) -> bool:
        return self._effective.block_style == "soft"

    @property
    def _conversation(self) -> Conversation:
        return self._request.conversation if self._request else Conversation(())

    def _guard_failed(self, call: GuardCall) -> list[Command]:
        self._outcome, self._error = "guard_error", call.decision.error
        return self._broken(enforce.guard_unavailable(call.decision, self._decided.retry_after))

    def _upstream_refused(self) -> list[Command]:
        """The upstream's own error: its status and codes pass, its words do not."""
        self._outcome, self._error = "upstream_error", f"upstream_status_{self._status}"
        try:
            body = self._json()
        except UpstreamError:
            body = None
        return self._broken(enforce.upstream_refused(self._status, body, self._upstream_headers, self.id))

    def _broken(self, error: PublicError) -> list[Command]:
        """Ends with an error: a reply of its own, or, in a stream whose head is out, an error event."""
        if self._stream is None or not self._stream.begun:
            return self._close(enforce.render(self._dialect, error))
        data = self._stream.parser.fail(error)
        return [*self._stopped(), *self._send(data), self._end()]

    def _json(self) -> Any:
        try:
            return loads(bytes(self._body), max_depth=self._limits.json_depth)
        except StrictJSONError as error:
            raise UpstreamError(UpstreamErrorKind.MALFORMED, str(error)) from None

    def _reply(self, content_type: bytes, body: bytes, action: Action) -> Reply:
        self._released = len(body)
        return Reply(200, self._head(content_type, str(action)), body)

    def _head(self, content_type: bytes, action: str) -> Headers:
        kept = enforce.strip_response_headers(self._upstream_headers)
        return ((b"content-type", content_type), *kept, *enforce.guard_headers(self.id, action))

    def _begin(self, action: str = "pending") -> list[Command]:
        assert self._stream is not None
        if self._stream.begun:
            return []
        self._stream.begun, self._sent_status = True, 200
        return [Begin(200, self._head(SSE_TYPE, str(action)))]

    def _send(self, data: bytes) -> list[Command]:
        if not data:
            return []
        assert self._stream is not None
        self._released += len(data)
        before, self._shown = self._shown, self._stream.hold.shown
        return [*self._begin(), Send(data, self._shown > before)]

    def _stopped(self) -> list[Command]:
        stopped: list[Command] = [Stop()] if self._upstream_open else []
        self._upstream_open = False
        return stopped

    def _close(self, reply: Reply) -> list[Command]:
        stopped = self._stopped()
        self._drop()
        self.phase = Phase.CLOSED
        self._sent_status = reply.status
        return [*stopped, Respond(reply)]

    def _end(self) -> End:
        self._drop()
        self.phase = Phase.CLOSED
        return End()

    def _drop(self) -> None:
        if self._stream is not None:
            self._leaked, self._shown = self._stream.hold.leaked, self._stream.hold.shown
        self._body.clear()
        self._stream = None


_OUTCOMES: dict[Action, Outcome] = {
    Action.ALLOW: "allowed",
    Action.ANNOTATE: "annotated",
    Action.BLOCK: "blocked",
}
