"""OpenTelemetry spans and metrics: everything that is emitted, and every name, in one file.

Telemetry may never change an outcome. All calls go through ``Telemetry``, ``RequestSpan`` and
``GuardSpan``, whose methods neither raise nor await: what goes wrong inside is counted in
``Telemetry.failures`` and reported once. Where nothing records, no span is built.

One request gives one server span, under it one ``apply_guardrail`` span per question to the guard (with
the guard model's own ``chat`` span below), and optionally the upstream's ``chat`` span. No content of a
request or an answer is emitted, only keyed digests, unless ``capture_content`` is set; the guard's
reasoning is emitted unless ``reasoning`` is cleared, through the operator's ``Redactor``.
docs/telemetry.md lists names and defaults.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from opentelemetry import metrics, propagate, trace
from opentelemetry.context import Context
from opentelemetry.metrics import Meter
from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.util.types import AttributeValue

from guard_middleware import __version__, providers
from guard_middleware.errors import REJECT_STATUS, GuardError, RejectKind
from guard_middleware.evidence import (
    ContentDigest,
    Redactor,
    bypasses,
    canonical,
    conversation_value,
    message_value,
    stream_ending,
)
from guard_middleware.types import NOT_NEEDED, Action, Basis, Decision, Opinion, Record, Source, Verdict

#: The draft of the guardrail conventions that these names follow.
CONVENTION = "apply_guardrail@2026-09"
COMPONENT = "GuardMiddleware"
PROVIDER = "guard_middleware"
#: The key of ``Record.timings`` that holds the seconds from the upstream's first byte to the release.
HOLD_BACK = "hold_back"

Headers = Sequence[tuple[bytes, bytes]]
Attributes = dict[str, AttributeValue]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"})
_SEVERITY = {Action.ALLOW: 0, Action.ANNOTATE: 1, Action.BLOCK: 2}
_TEXT_LIMIT = 256
_SHUTDOWN_SECONDS = 5.0
_log = logging.getLogger(__name__)


class _Shield:
    """``with shield:`` swallows and counts every Exception; one shared instance, without state per use."""

    __slots__ = ("failures",)

    def __init__(self) -> None:
        self.failures = 0

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> bool:
        if kind is None or not issubclass(kind, Exception):
            return False
        self.failures += 1
        if self.failures == 1:
            _log.warning("telemetry failed (%s) and carries on; further failures are only counted", kind.__name__)
        return True


class _AsgiGetter(Getter[Headers]):
    def get(self, carrier: Headers, key: str) -> list[str] | None:
        name = key.lower().encode("latin-1")
        return [value.decode("latin-1") for header, value in carrier if header == name] or None

    def keys(self, carrier: Headers) -> list[str]:
        return [header.decode("latin-1") for header, _ in carrier]


_GETTER = _AsgiGetter()


class _Instruments:
    def __init__(self, meter: Meter) -> None:
        def seconds(name: str, description: str) -> metrics.Histogram:
            return meter.create_histogram(
                f"guard_middleware.{name}", "s", description, explicit_bucket_boundaries_advisory=_SECONDS
            )

        def counter(name: str, unit: str, description: str) -> metrics.Counter:
            return meter.create_counter(f"guard_middleware.{name}", unit, description)

        self.requests = seconds("request.duration", "Requests, first byte in to last byte out.")
        self.decisions = counter("decisions", "{decision}", "Decisions by action, basis and source.")
        self.guard_duration = seconds("guard.duration", "Questions to the guard.")
        self.guard_errors = counter("guard.errors", "{error}", "Questions without a verdict, by kind.")
        self.guard_tokens = counter("guard.tokens", "{token}", "Tokens that verdicts cost.")
        self.reasoning_tokens = counter("guard.reasoning_tokens", "{token}", "The reasoning's share of output tokens.")
        self.bypassed = counter("bypassed", "{pass}", "What passed without a verdict, by reason.")
        self.hold_back = seconds("hold_back.duration", "How long answers were held back before their first text.")
        self.streams = counter("streams", "{stream}", "Streamed answers by mode, and what the client saw of them.")
        self.leaked = counter(
            "leaked.characters", "{character}", "Text that left ahead of its verdict; must stay 0 in hold and window."
        )
        self.cache = counter("cache.lookups", "{lookup}", "Questions by what the cache of verdicts knew.")
        self.cache_errors = counter("cache.errors", "{error}", "What a cache in Redis failed at, by kind.")
        self.shadow = counter("weights.shadow", "{question}", "Live questions put to staged weights too, by agreement.")
        self.weights = counter("weights.changes", "{change}", "What was done to the weights.")
        self.unscreened = counter("unscreened.bytes", "By", "Answer bytes released without a verdict; must stay 0.")


class Telemetry:
    """What one process emits. Build one at the start; share it between requests.

    Without providers it uses the global ones, those that the host sets later included. ``reasoning``
    puts the guard's reasoning on the guardrail span; ``capture_content`` puts the conversation on spans.
    ``upstream_provider`` is the ``gen_ai.provider.name`` of the upstream.
    """

    def __init__(
        self,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
        *,
        capture_content: bool = False,
        reasoning: bool = True,
        redactor: Redactor | None = None,
        digest: ContentDigest | None = None,
        upstream_provider: str = "openai",
    ) -> None:
        self.capture_content = capture_content
        self.reasoning = reasoning
        self.redact = redactor or Redactor()
        self.digest = digest or ContentDigest()
        self.upstream_provider = upstream_provider
        self.shield = _Shield()
        self._own_providers: tuple[TracerProvider | MeterProvider, ...] = ()
        self.tracer: Tracer = trace.NoOpTracer()
        self.instruments: _Instruments | None = None
        with self.shield:
            self.tracer = trace.get_tracer(__package__, __version__, tracer_provider)
        with self.shield:
            self.instruments = _Instruments(metrics.get_meter(__package__, __version__, meter_provider))

    @classmethod
    def from_env(
        cls,
        service_name: str,
        *,
        capture_content: bool = False,
        reasoning: bool = True,
        redactor: Redactor | None = None,
        digest: ContentDigest | None = None,
        upstream_provider: str = "openai",
    ) -> Telemetry:
        """Exports where the standard ``OTEL_*`` variables ask for it, by providers that stay private.

        Providers that the host application has set are used as they are. Raises ``ConfigError`` for an
        exporter that is not installed.
        """
        tracer_provider, meter_provider = providers.from_env(service_name)
        telemetry = cls(
            tracer_provider,
            meter_provider,
            capture_content=capture_content,
            reasoning=reasoning,
            redactor=redactor,
            digest=digest,
            upstream_provider=upstream_provider,
        )
        telemetry._own_providers = tuple(p for p in (tracer_provider, meter_provider) if p is not None)
        return telemetry

    @property
    def failures(self) -> int:
        """How often emitting failed."""
        return self.shield.failures

    def request(self, method: str, path: str, headers: Headers, scheme: str = "http") -> RequestSpan:
        """Opens the span of one request, below the span that runs now or the caller's ``traceparent``."""
        return RequestSpan(self, method, path, headers, scheme)

    def cache_lookup(self, result: str) -> None:
        """Counts one question: ``hit``, ``miss`` or ``coalesced`` (it waited for the same one of another request)."""
        if self.instruments is not None:
            with self.shield:
                self.instruments.cache.add(1, {"guard_middleware.cache.result": result})

    def shadow(self, result: str, source: Source) -> None:
        """Counts a question that staged weights answered too: ``agreed``, ``stricter``, ``looser`` or ``failed``."""
        if self.instruments is not None:
            with self.shield:
                self.instruments.shadow.add(
                    1, {"guard_middleware.weights.result": result, "gen_ai.guardrail.source": source}
                )

    def weights(self, what: str) -> None:
        """Counts a change of the weights, such as ``promoted`` (``guard_middleware.weights.state``)."""
        if self.instruments is not None:
            with self.shield:
                self.instruments.weights.add(1, {"guard_middleware.weights.change": what})

    def cache_error(self, kind: str) -> None:
        """Counts an operation that failed (``redis``) or an entry that did not verify (``forged``)."""
        if self.instruments is not None:
            with self.shield:
                self.instruments.cache_errors.add(1, {"error.type": kind})

    async def aclose(self) -> None:
        """Exports what is waiting and stops own providers; gives up on a collector that hangs for 5 seconds."""
        thread = threading.Thread(target=self._shutdown, name="guard-telemetry-shutdown", daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, _SHUTDOWN_SECONDS)

    def _shutdown(self) -> None:
        for provider in self._own_providers:
            with self.shield:
                provider.shutdown()


class RequestSpan:
    """One request. ``finish`` ends it, exactly once; later calls do nothing."""

    def __init__(self, telemetry: Telemetry, method: str, path: str, headers: Headers, scheme: str) -> None:
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
                    "url.path": _clean(path),
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
                attributes["gen_ai.request.model"] = _clean(model)
            kind = SpanKind.CLIENT if remote else SpanKind.INTERNAL
            name = "chat" if model is None else f"chat {_clean(model)}"
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
                _fail(self._upstream, error)

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
                _count(self._telemetry.instruments, record, time.perf_counter() - self._started)

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
        if (overall := _overall(record)) is not None:
            action, basis = overall
            attributes["guard_middleware.decision.action"] = action.value
            attributes["guard_middleware.decision.basis"] = basis.value
        if record.dialect is not None:
            span.update_name(f"{self._method} {_clean(record.path)}")
            attributes["http.route"] = _clean(record.path)
            attributes["guard_middleware.dialect"] = record.dialect
        if record.model is not None:
            attributes["gen_ai.request.model"] = _clean(record.model)
        if record.policy is not None:
            attributes["gen_ai.guardrail.policy.id"] = record.policy
        if record.policy_digest is not None:
            attributes["gen_ai.guardrail.policy.version"] = record.policy_digest
        if record.tenant is not None:
            attributes["guard_middleware.tenant"] = _clean(record.tenant)
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
            span.set_attribute("error.type", _clean(record.error))
        if record.status >= 500:
            span.set_status(Status(StatusCode.ERROR, None if record.error is None else _clean(record.error)))


class GuardSpan:
    """One question to the guard, put to another process. ``end`` ends it, exactly once."""

    def __init__(
        self,
        telemetry: Telemetry,
        source: Source,
        choice: int | None,
        parent: Span,
        context: Context | None,
        recording: bool,
    ) -> None:
        self._telemetry = telemetry
        self._shield = telemetry.shield
        self._source = source
        self._recording = recording
        self._ended = False
        self._span = parent
        self._context = context
        self._started_ns = 0
        if not recording:
            return
        attributes: Attributes = {
            "gen_ai.operation.name": "apply_guardrail",
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.guardrail.component.name": COMPONENT,
            "gen_ai.guardrail.source": source,
        }
        if choice is not None:
            attributes["guard_middleware.choice"] = choice
        self._recording = False
        with self._shield:
            self._started_ns = time.time_ns()
            self._span = telemetry.tracer.start_span(
                f"apply_guardrail {COMPONENT}", context, SpanKind.CLIENT, attributes, start_time=self._started_ns
            )
            self._recording = True
            self._context = trace.set_span_in_context(self._span, context)

    @property
    def traceparent(self) -> str | None:
        """W3C trace context for the worker; None without a trace."""
        with self._shield:
            context = self._span.get_span_context()
            if context.is_valid:
                return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        return None

    def end(self, outcome: Verdict | GuardError, decision: Decision) -> None:
        """Describes what the guard said and what policy made of it."""
        if self._ended:
            return
        self._ended = True
        if not self._recording:
            return
        ended_ns = time.time_ns()
        with self._shield:
            self._decided(decision)
        with self._shield:
            if isinstance(outcome, GuardError):
                _fail(self._span, outcome.kind.value)
            else:
                self._judged(outcome, decision.id, ended_ns)
        for opinion in outcome.opinions:
            with self._shield:
                self._thought(opinion, decision.id)
        with self._shield:
            self._span.end(ended_ns)

    def abandon(self, decision_id: str) -> None:
        """Ends a question that nobody waits for any more (the client went away, another choice was blocked)."""
        if self._ended:
            return
        self._ended = True
        if not self._recording:
            return
        with self._shield:
            self._span.set_attribute("guard_middleware.decision.id", decision_id)
            self._span.set_attribute("guard_middleware.cancelled", True)
        with self._shield:
            self._span.end()

    def _decided(self, decision: Decision) -> None:
        attributes: Attributes = {
            "guard_middleware.decision.id": decision.id,
            "guard_middleware.decision.action": decision.action.value,
            "guard_middleware.decision.would": decision.would.value,
            "guard_middleware.decision.basis": decision.basis.value,
            "gen_ai.guardrail.policy.id": decision.policy,
            "gen_ai.guardrail.policy.version": decision.policy_digest,
        }
        if decision.basis is Basis.ERROR:
            attributes["guard_middleware.failure_policy"] = decision.would.value
        self._span.set_attributes(attributes)

    def _judged(self, verdict: Verdict, decision_id: str, ended_ns: int) -> None:
        span, telemetry = self._span, self._telemetry
        label, score = verdict.label(self._source), verdict.score(self._source)
        if label is not None and score is not None:
            attributes: Attributes = {
                "gen_ai.guardrail.result.type": "verdict",
                "gen_ai.guardrail.result.value": label,
                "gen_ai.guardrail.risk.score": score,
            }
            if verdict.categories:
                attributes["gen_ai.guardrail.risk.category"] = _clean(", ".join(verdict.categories))
            span.set_attributes(attributes)
            result: Attributes = {
                "gen_ai.evaluation.name": verdict.model,
                "gen_ai.evaluation.score.label": label,
                "gen_ai.evaluation.score.value": score,
            }
            if telemetry.reasoning:
                result["gen_ai.evaluation.explanation"] = _utf8(telemetry.redact(verdict.reasoning))
            span.add_event("gen_ai.evaluation.result", result)
        span.set_attribute("guard_middleware.mode", verdict.judging.mode)
        span.set_attribute("guard_middleware.thought", verdict.thought)
        if verdict.cached:
            span.set_attribute("guard_middleware.cached", True)
        span.set_attributes({f"guard_middleware.left_out.{what}": count for what, count in verdict.left_out})
        span.set_attributes({f"guard_middleware.seconds.{stage}": seconds for stage, seconds in verdict.timings})
        if not verdict.opinions:
            started_ns = ended_ns - int(dict(verdict.timings).get("generate", 0.0) * 1e9)
            self._generated(verdict, decision_id, max(self._started_ns, started_ns)).end(ended_ns)

    def _thought(self, opinion: Opinion, decision_id: str) -> None:
        """What one guard of an ensemble said."""
        verdict, started_ns = opinion.verdict, self._started_ns + int(opinion.began * 1e9)
        if verdict is None:
            span = self._telemetry.tracer.start_span(
                f"chat {opinion.guard}", self._context, SpanKind.INTERNAL, start_time=started_ns
            )
            if opinion.error == NOT_NEEDED:
                span.set_attribute("guard_middleware.cancelled", True)
            else:
                _fail(span, opinion.error or "_OTHER")
        else:
            span = self._generated(verdict, decision_id, started_ns)
            label, score = verdict.label(self._source), verdict.score(self._source)
            if label is not None and score is not None:
                span.set_attribute("gen_ai.evaluation.score.label", label)
                span.set_attribute("gen_ai.evaluation.score.value", score)
            span.set_attribute("guard_middleware.cached", verdict.cached)
        span.set_attribute("guard_middleware.guard", opinion.guard)
        span.end(started_ns + int(opinion.seconds * 1e9))

    def _generated(self, verdict: Verdict, decision_id: str, started_ns: int) -> Span:
        return self._telemetry.tracer.start_span(
            f"chat {verdict.model}",
            self._context,
            SpanKind.INTERNAL,
            {
                "gen_ai.operation.name": "chat",
                "gen_ai.provider.name": PROVIDER,
                "gen_ai.request.model": verdict.model,
                "gen_ai.response.model": verdict.model,
                "gen_ai.usage.input_tokens": verdict.usage.prompt,
                "gen_ai.usage.output_tokens": verdict.usage.completion,
                "gen_ai.usage.reasoning.output_tokens": verdict.usage.reasoning,
                "guard_middleware.model.revision": verdict.revision,
                "guard_middleware.decision.id": decision_id,
            },
            start_time=started_ns,
        )


def _count(to: _Instruments, record: Record, seconds: float) -> None:
    to.requests.record(
        seconds,
        {"guard_middleware.outcome": record.outcome, "guard_middleware.dialect": record.dialect or "none"},
    )
    for call in record.calls:
        decision, source = call.decision, call.source
        by_source: Attributes = {"gen_ai.guardrail.source": source}
        to.decisions.add(
            1,
            {
                **by_source,
                "guard_middleware.decision.action": decision.action.value,
                "guard_middleware.decision.would": decision.would.value,
                "guard_middleware.decision.basis": decision.basis.value,
            },
        )
        to.guard_duration.record(call.seconds, by_source)
        for opinion in call.opinions:
            if opinion.verdict is None and opinion.error != NOT_NEEDED:
                who = {"guard_middleware.guard": opinion.guard}
                to.guard_errors.add(1, {**by_source, **who, "error.type": _clean(opinion.error or "_OTHER")})
        if decision.verdict is None:
            if not call.opinions:
                to.guard_errors.add(1, {**by_source, "error.type": _clean(decision.error or "_OTHER")})
        else:
            usage = decision.verdict.usage
            to.guard_tokens.add(usage.prompt, {**by_source, "gen_ai.token.type": "input"})
            to.guard_tokens.add(usage.completion, {**by_source, "gen_ai.token.type": "output"})
            to.reasoning_tokens.add(usage.reasoning, by_source)
    if not record.calls and (overall := _overall(record)) is not None:
        action, basis = overall
        to.decisions.add(
            1,
            {
                "gen_ai.guardrail.source": "input",
                "guard_middleware.decision.action": action.value,
                "guard_middleware.decision.would": action.value,
                "guard_middleware.decision.basis": basis.value,
            },
        )
    unscreened = 0
    for source, reason in bypasses(record):
        to.bypassed.add(1, {"gen_ai.guardrail.source": source, "guard_middleware.bypass.reason": reason})
        if source == "output":
            unscreened = record.released_bytes
    to.unscreened.add(unscreened)
    mode: Attributes = {"guard_middleware.stream.mode": record.stream_mode or "none"}
    for stage, held in record.timings:
        if stage == HOLD_BACK:
            to.hold_back.record(held, mode)
    if (ending := stream_ending(record)) is not None:
        to.streams.add(1, {**mode, "guard_middleware.stream.ending": ending})
        to.leaked.add(record.leaked_characters, mode)


def _overall(record: Record) -> tuple[Action, Basis] | None:
    """The decision of the whole request: the most severe of its calls; a refusal is a block on limit or coverage.

    None where nothing was decided: no call and no refusal.
    """
    if record.calls:
        worst = max(record.calls, key=lambda call: _SEVERITY[call.decision.action]).decision
        return worst.action, worst.basis
    if record.outcome == "rejected":
        return Action.BLOCK, Basis.LIMIT if record.error in _LIMITS else Basis.COVERAGE
    return None


_LIMITS = frozenset(kind.value for kind in RejectKind if REJECT_STATUS[kind] == 413)


def _content(telemetry: Telemetry, record: Record) -> Attributes:
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


def _fail(span: Span, kind: str) -> None:
    kind = _clean(kind)
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR, kind))


def _clean(text: str) -> str:
    return _utf8(text[:_TEXT_LIMIT])


def _utf8(text: str) -> str:
    # One lone surrogate would make the exporter drop the whole batch.
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
