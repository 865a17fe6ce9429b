"""The span of one request: where its trace comes from and goes on to, the upstream's span, what is said at its end.

It holds keyed digests of the conversation, and the conversation itself only where ``capture_content`` is set. A
caller's ``traceparent`` is not followed where a span of the host already runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from guard_middleware.evidence import bypasses, canonical, conversation_value, message_value, stream_ending
from guard_middleware.telemetry.attributes import CONVENTION, Attributes, clean, fail, overall_decision
from guard_middleware.telemetry.emitter import Emitter
from guard_middleware.telemetry.guard_span import GuardSpan
from guard_middleware.telemetry.instruments import count
from guard_middleware.types import Record, Source

Headers = Sequence[tuple[bytes, bytes]]

_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"})


class _AsgiGetter(Getter[Headers]):
    def get(self, carrier: Headers, key: str) -> list[str] | None:
        name = key.lower().encode("latin-1")
        return [value.decode("latin-1") for header, value in carrier if header == name] or None

    def keys(self, carrier: Headers) -> list[str]:
        return [header.decode("latin-1") for header, _ in carrier]


_GETTER = _AsgiGetter()


class RequestSpan:
    """One request. ``finish`` ends it, exactly once; later calls do nothing."""

    def __init__(self, telemetry: Emitter, method: str, path: str, headers: Headers, scheme: str) -> None:
        self._telemetry = telemetry
        self._shield = telemetry.shield
        self._method = method if method in _METHODS else "_OTHER"
        self._started = time.perf_counter()
        self._guard_spans: list[GuardSpan] = []
        self._upstream: Span | None = None
        self._upstream_context: Context | None = None
        self._upstream_ended_ns: int | None = None
        self._finished = False
        self._span: Span = trace.INVALID_SPAN
        self._context: Context | None = None
        self._recording = False
        with self._shield:
            nested = trace.get_current_span().get_span_context().is_valid
            parent = None if nested else propagate.extract(headers, getter=_GETTER)
            self._span = telemetry.tracer.start_span(
                self._method,
                parent,
                SpanKind.INTERNAL if nested else SpanKind.SERVER,
                {
                    "http.request.method": self._method,
                    "url.path": clean(path),
                    "url.scheme": scheme,
                    "guard_middleware.convention": CONVENTION,
                },
            )
            self._context = trace.set_span_in_context(self._span, parent)
            self._recording = self._span.is_recording()

    @property
    def trace_id(self) -> str | None:
        """The trace, as 32 hex digits, for the decision log; None without a trace."""
        with self._shield:
            context = self._span.get_span_context()
            return trace.format_trace_id(context.trace_id) if context.is_valid else None
        return None

    def inject(self, headers: Headers) -> Headers:
        """The headers of the upstream call, with this trace in place of the caller's propagation headers."""
        with self._shield:
            carrier: dict[str, str] = {}
            propagate.inject(carrier, self._upstream_context or self._context)
            if not carrier:
                return headers
            fields = {field.lower().encode("latin-1") for field in propagate.get_global_textmap().fields}
            kept = [(name, value) for name, value in headers if name.lower() not in fields]
            return [*kept, *((k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in carrier.items())]
        return headers

    def guard_call(self, source: Source, choice: int | None = None) -> GuardSpan:
        """Opens the span of one question to the guard."""
        guard_span = GuardSpan(self._telemetry, source, choice, self._span, self._context, self._recording)
        self._guard_spans.append(guard_span)
        return guard_span

    def upstream_started(self, model: str | None, *, remote: bool = True) -> None:
        """Opens the upstream's ``chat`` span; ``remote`` is False where the wrapped application answers itself."""
        if not self._recording or self._upstream is not None:
            return
        with self._shield:
            attributes: Attributes = {
                "gen_ai.operation.name": "chat",
                "gen_ai.provider.name": self._telemetry.upstream_provider,
            }
            if model is not None:
                attributes["gen_ai.request.model"] = clean(model)
            kind = SpanKind.CLIENT if remote else SpanKind.INTERNAL
            name = "chat" if model is None else f"chat {clean(model)}"
            span = self._telemetry.tracer.start_span(name, self._context, kind, attributes)
            self._upstream = span
            self._upstream_context = trace.set_span_in_context(span, self._context)

    def upstream_ended(self, error: str | None = None) -> None:
        """Notes the end of the upstream's answer; the span itself waits for the decision id."""
        if self._upstream is None or self._upstream_ended_ns is not None:
            return
        self._upstream_ended_ns = time.time_ns()
        if error is not None:
            with self._shield:
                fail(self._upstream, error)

    def finish(self, record: Record) -> None:
        """Ends every span of the request and counts it."""
        if self._finished:
            return
        self._finished = True
        for guard_span in self._guard_spans:
            guard_span.abandon(record.id)
        upstream = self._upstream
        if upstream is not None:
            with self._shield:
                upstream.set_attribute("guard_middleware.decision.id", record.id)
                upstream.set_attribute("gen_ai.request.stream", record.stream)
            with self._shield:
                upstream.end(self._upstream_ended_ns)
        if self._recording:
            with self._shield:
                self._describe(record)
        with self._shield:
            self._span.end()
        if self._telemetry.instruments is not None:
            with self._shield:
                count(self._telemetry.instruments, record, time.perf_counter() - self._started)

    def _describe(self, record: Record) -> None:
        span, digest = self._span, self._telemetry.digest
        lapses = bypasses(record)
        attributes: Attributes = {
            "guard_middleware.decision.id": record.id,
            "guard_middleware.outcome": record.outcome,
            "guard_middleware.guard_calls": len(record.calls),
            "guard_middleware.held_back.bytes": record.held_bytes,
            "guard_middleware.released.bytes": record.released_bytes,
            "guard_middleware.screened": not lapses and any(call.decision.verdict for call in record.calls),
        }
        if record.status:
            attributes["http.response.status_code"] = record.status
        if (overall := overall_decision(record)) is not None:
            action, basis = overall
            attributes["guard_middleware.decision.action"] = action.value
            attributes["guard_middleware.decision.basis"] = basis.value
        if record.dialect is not None:
            span.update_name(f"{self._method} {clean(record.path)}")
            attributes["http.route"] = clean(record.path)
            attributes["guard_middleware.dialect"] = record.dialect
        if record.model is not None:
            attributes["gen_ai.request.model"] = clean(record.model)
        if record.policy is not None:
            attributes["gen_ai.guardrail.policy.id"] = record.policy
        if record.policy_digest is not None:
            attributes["gen_ai.guardrail.policy.version"] = record.policy_digest
        if record.tenant is not None:
            attributes["guard_middleware.tenant"] = clean(record.tenant)
        if record.stream_mode is not None and (ending := stream_ending(record)) is not None:
            attributes["guard_middleware.stream.mode"] = record.stream_mode
            attributes["guard_middleware.stream.ending"] = ending
            attributes["guard_middleware.released.characters"] = record.released_characters
            attributes["guard_middleware.leaked.characters"] = record.leaked_characters
        if lapses:
            attributes["guard_middleware.bypassed"] = [f"{source}:{reason}" for source, reason in lapses]
        for stage, seconds in record.timings:
            attributes[f"guard_middleware.seconds.{stage}"] = seconds
        if record.conversation is not None:
            attributes["guard_middleware.content.input.hmac"] = digest.input(record.conversation)
        if record.answers:
            attributes["guard_middleware.content.output.hmac"] = [digest.answer(answer) for answer in record.answers]
        attributes["guard_middleware.content.hmac_key"] = digest.key_id
        if self._telemetry.capture_content:
            attributes.update(_content(self._telemetry, record))
        span.set_attributes(attributes)
        if record.error is not None:
            span.set_attribute("error.type", clean(record.error))
        if record.status >= 500:
            span.set_status(Status(StatusCode.ERROR, None if record.error is None else clean(record.error)))


def _content(telemetry: Emitter, record: Record) -> Attributes:
    """The conversation as GenAI messages; media stay digests."""
    how = (telemetry.redact, telemetry.digest.blob)
    attributes: Attributes = {}
    if record.conversation is not None:
        value = conversation_value(record.conversation, *how)
        attributes["gen_ai.input.messages"] = canonical(value["messages"]).decode()
        attributes["gen_ai.tool.definitions"] = canonical(value["definitions"]).decode()
    if record.answers:
        answers = [message_value(answer, *how) for answer in record.answers]
        attributes["gen_ai.output.messages"] = canonical(answers).decode()
    return attributes
