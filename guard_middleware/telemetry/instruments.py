"""The metrics: every instrument of one process, and what one request adds to them.

No attribute of a metric holds what a client chooses freely; such values are for spans.
"""

from __future__ import annotations

from opentelemetry import metrics
from opentelemetry.metrics import Meter

from guard_middleware.evidence import bypasses, stream_ending
from guard_middleware.telemetry.attributes import HOLD_BACK, Attributes, clean, overall_decision
from guard_middleware.types import NOT_NEEDED, Record

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Instruments:
    """One set for the whole process."""

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


def count(to: Instruments, record: Record, seconds: float) -> None:
    """Adds one finished request, which took ``seconds``."""
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
                to.guard_errors.add(1, {**by_source, **who, "error.type": clean(opinion.error or "_OTHER")})
        if decision.verdict is None:
            if not call.opinions:
                to.guard_errors.add(1, {**by_source, "error.type": clean(decision.error or "_OTHER")})
        else:
            usage = decision.verdict.usage
            to.guard_tokens.add(usage.prompt, {**by_source, "gen_ai.token.type": "input"})
            to.guard_tokens.add(usage.completion, {**by_source, "gen_ai.token.type": "output"})
            to.reasoning_tokens.add(usage.reasoning, by_source)
    if not record.calls and (overall := overall_decision(record)) is not None:
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
