"""The span of one question to the guard, and below it those of the models that answered it.

The guard's reasoning leaves through the operator's ``Redactor``, and not at all where ``reasoning`` is cleared. The
conversation itself is never put on these spans.
"""

from __future__ import annotations

import time

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind

from guard_middleware.errors import GuardError
from guard_middleware.telemetry.attributes import COMPONENT, PROVIDER, Attributes, clean, fail, utf8
from guard_middleware.telemetry.emitter import Emitter
from guard_middleware.types import NOT_NEEDED, Basis, Decision, Opinion, Source, Verdict


class GuardSpan:
    """One question to the guard, put to another process. ``end`` ends it, exactly once."""

    def __init__(
        self,
        telemetry: Emitter,
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
                fail(self._span, outcome.kind.value)
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
                attributes["gen_ai.guardrail.risk.category"] = clean(", ".join(verdict.categories))
            span.set_attributes(attributes)
            result: Attributes = {
                "gen_ai.evaluation.name": verdict.model,
                "gen_ai.evaluation.score.label": label,
                "gen_ai.evaluation.score.value": score,
            }
            if telemetry.reasoning:
                result["gen_ai.evaluation.explanation"] = utf8(telemetry.redact(verdict.reasoning))
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
                fail(span, opinion.error or "_OTHER")
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
