from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import metrics, trace
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from guard_middleware import __version__
from guard_middleware.errors import ConfigError, GuardError
from guard_middleware.evidence import ContentDigest, Redactor
from guard_middleware.telemetry import CONVENTION, GuardSpan, Headers, RequestSpan, Telemetry
from guard_middleware.types import Action, Basis, Record
from tests.support.otlp_collector import Collector, attributes, collector
from tests.support.records import ANSWER, CONVERSATION, IMAGE, MARKER, call, decision, record, verdict

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER: Headers = [
    (b"host", b"gateway"),
    (b"traceparent", f"00-{TRACE}-b7ad6b7169203331-01".encode()),
    (b"x-more", b"1"),
]
KEY = b"k" * 32


class Recorder:
    """A telemetry whose finished spans can be read."""

    def __init__(self, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.telemetry = Telemetry(provider, MeterProvider(), **options)

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def span(self, name: str) -> ReadableSpan:
        (found,) = self.spans(name)
        return found


def values(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def one_request(telemetry: Telemetry, headers: Headers = (), finished: Record | None = None) -> RequestSpan:
    """What the middleware does for a request that is judged on both sides."""
    finished = finished or record()
    span = telemetry.request("POST", "/v1/chat/completions", headers)
    judged_input = span.guard_call("input")
    judged_input.end(verdict(), decision("input", verdict()))
    span.upstream_started("vlm")
    span.upstream_ended()
    judged_output = span.guard_call("output", 0)
    judged_output.end(verdict("output"), decision("output", verdict("output")))
    span.finish(finished)
    return span


@pytest.fixture
def otlp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collector() as running:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
        yield running


def export(telemetry: Telemetry, headers: Headers = (), finished: Record | None = None) -> None:
    one_request(telemetry, headers, finished)
    asyncio.run(telemetry.aclose())
    assert telemetry.failures == 0


def test_a_request_arrives_at_a_collector_as_nested_spans(otlp: Collector) -> None:
    export(Telemetry.from_env("guard-gateway"), CALLER)
    server = otlp.span("POST /v1/chat/completions")
    assert server.trace_id.hex() == TRACE
    assert server.parent_span_id.hex() == "b7ad6b7169203331"
    assert server.kind == ProtoSpan.SPAN_KIND_SERVER
    guards = [span for span in otlp.spans if span.name == "apply_guardrail GuardMiddleware"]
    models = [span for span in otlp.spans if span.name == "chat nano"]
    assert [span.parent_span_id for span in guards] == [server.span_id] * 2
    assert [span.kind for span in guards] == [ProtoSpan.SPAN_KIND_CLIENT] * 2
    assert [span.parent_span_id for span in models] == [span.span_id for span in guards]
    for model, guard in zip(models, guards, strict=True):
        assert guard.start_time_unix_nano <= model.start_time_unix_nano <= model.end_time_unix_nano
        assert model.end_time_unix_nano == guard.end_time_unix_nano
    assert otlp.span("chat vlm").parent_span_id == server.span_id
    assert {span.trace_id.hex() for span in otlp.spans} == {TRACE}
    assert len(otlp.spans) == 6
    assert otlp.resources[0]["service.name"] == "guard-gateway"
    for span in otlp.spans:
        assert attributes(span.attributes)["guard_middleware.decision.id"].startswith("gd-")


def test_no_raw_content_is_exported_by_default(otlp: Collector) -> None:
    export(Telemetry.from_env("guard-gateway"))
    assert otlp.traces
    assert otlp.metrics
    sent = b"".join(otlp.bodies)
    assert MARKER.encode() not in sent
    assert CONVERSATION.blobs()[0].digest.encode() not in sent


def test_captured_content_is_exported_redacted_and_without_image_bytes(otlp: Collector) -> None:
    export(Telemetry.from_env("guard-gateway", capture_content=True, redactor=Redactor([("walrus", "[animal]")])))
    sent = b"".join(otlp.bodies)
    assert b"how do I pick a lock" in sent
    assert b"mauve-[animal]-81" in sent
    assert MARKER.encode() not in sent
    assert IMAGE not in sent


def test_metrics_arrive_at_a_collector(otlp: Collector) -> None:
    telemetry = Telemetry.from_env("guard-gateway")
    failed = record(calls=(call("input"), call("output", verdict("output"))))
    one_request(telemetry, finished=failed)
    blocked = record(outcome="blocked", status=400, calls=(call("input", verdict()),), upstream_called=False)
    one_request(telemetry, finished=blocked)
    telemetry.request("POST", "/v1/chat/completions", ()).finish(
        record(outcome="rejected", status=413, error="too_many_images", calls=(), upstream_called=False)
    )
    asyncio.run(telemetry.aclose())
    decisions = {
        tuple(sorted((key.rpartition(".")[2], value) for key, value in of.items())): point.as_int
        for of, point in otlp.points("guard_middleware.decisions")
    }
    allowed = (("action", "allow"), ("basis", "verdict"))
    assert decisions == {
        (("action", "allow"), ("basis", "error"), ("source", "input"), ("would", "allow")): 1,
        (*allowed, ("source", "output"), ("would", "allow")): 1,
        (*allowed, ("source", "input"), ("would", "allow")): 1,
        (("action", "block"), ("basis", "limit"), ("source", "input"), ("would", "block")): 1,
    }
    ((of, errors),) = otlp.points("guard_middleware.guard.errors")
    assert (of, errors.as_int) == ({"gen_ai.guardrail.source": "input", "error.type": "timeout"}, 1)
    ((of, bypassed),) = otlp.points("guard_middleware.bypassed")
    assert of == {"gen_ai.guardrail.source": "input", "guard_middleware.bypass.reason": "on_error"}
    assert bypassed.as_int == 1
    assert [point.as_int for _, point in otlp.points("guard_middleware.unscreened.bytes")] == [0]
    assert sum(point.count for _, point in otlp.points("guard_middleware.guard.duration")) == 3
    ((_, held),) = otlp.points("guard_middleware.hold_back.duration")
    assert (held.count, held.sum) == (3, 1.5)
    tokens = {of["gen_ai.token.type"]: 0 for of, _ in otlp.points("guard_middleware.guard.tokens")}
    for of, point in otlp.points("guard_middleware.guard.tokens"):
        tokens[of["gen_ai.token.type"]] += point.as_int
    assert tokens == {"input": 240, "output": 80}
    assert sum(point.as_int for _, point in otlp.points("guard_middleware.guard.reasoning_tokens")) == 60
    outcomes = {of["guard_middleware.outcome"]: p.count for of, p in otlp.points("guard_middleware.request.duration")}
    assert outcomes == {"allowed": 1, "blocked": 1, "rejected": 1}


STREAMS: list[tuple[dict[str, Any], str]] = [
    ({"outcome": "allowed", "stream_mode": "window", "released_characters": 80}, "released"),
    ({"outcome": "annotated", "stream_mode": "hold", "released_characters": 0}, "released"),  # a tool call alone
    ({"outcome": "blocked", "stream_mode": "async", "released_characters": 80, "leaked_characters": 30}, "cut"),
    ({"outcome": "aborted", "stream_mode": "window", "released_characters": 8}, "cut"),
    ({"outcome": "upstream_error", "stream_mode": "window", "released_characters": 0}, "held"),
]


def test_streams_are_counted_by_mode_and_by_what_the_client_saw(otlp: Collector) -> None:
    telemetry = Telemetry.from_env("guard-gateway")
    for changes, _ in STREAMS:
        one_request(telemetry, finished=record(stream=True, **changes))
    one_request(telemetry)
    asyncio.run(telemetry.aclose())
    assert telemetry.failures == 0

    def by_mode(metric: str, value: str) -> dict[Any, Any]:
        points = otlp.points(f"guard_middleware.{metric}")
        return {tuple(sorted(of.values())): getattr(point, value) for of, point in points}

    assert by_mode("streams", "as_int") == {
        ("released", "window"): 1, ("hold", "released"): 1, ("async", "cut"): 1, ("cut", "window"): 1,
        ("held", "window"): 1,
    }  # fmt: skip
    assert by_mode("leaked.characters", "as_int") == {("window",): 0, ("hold",): 0, ("async",): 30}
    assert by_mode("hold_back.duration", "count") == {("window",): 3, ("hold",): 1, ("async",): 1, ("none",): 1}


@pytest.mark.parametrize(("changes", "ending"), STREAMS)
def test_the_server_span_says_how_a_stream_left(changes: dict[str, Any], ending: str) -> None:
    recorder = Recorder()
    one_request(recorder.telemetry, finished=record(stream=True, **changes))
    found = values(recorder.span("POST /v1/chat/completions"))
    assert (found["guard_middleware.stream.mode"], found["guard_middleware.stream.ending"]) == (
        changes["stream_mode"],
        ending,
    )
    assert found["guard_middleware.released.characters"] == changes["released_characters"]
    assert found["guard_middleware.leaked.characters"] == changes.get("leaked_characters", 0)


def test_of_a_stream_that_was_held_nothing_is_unscreened(otlp: Collector) -> None:
    telemetry = Telemetry.from_env("guard-gateway")
    held = {"stream_mode": "window", "outcome": "upstream_error", "calls": (call("input", verdict()),), "answers": ()}
    one_request(telemetry, finished=record(**held))
    asyncio.run(telemetry.aclose())
    assert [point.as_int for _, point in otlp.points("guard_middleware.unscreened.bytes")] == [0]


def test_released_bytes_without_a_verdict_are_counted(otlp: Collector) -> None:
    export(Telemetry.from_env("guard-gateway"), finished=record(calls=(call("input", verdict()),)))
    assert [point.as_int for _, point in otlp.points("guard_middleware.unscreened.bytes")] == [900]


def test_the_guardrail_span_says_what_the_guard_said() -> None:
    recorder = Recorder()
    one_request(recorder.telemetry)
    of_input, of_output = recorder.spans("apply_guardrail GuardMiddleware")
    assert values(of_output) == {
        "gen_ai.operation.name": "apply_guardrail",
        "gen_ai.provider.name": "guard_middleware",
        "gen_ai.guardrail.component.name": "GuardMiddleware",
        "gen_ai.guardrail.source": "output",
        "gen_ai.guardrail.policy.id": "default",
        "gen_ai.guardrail.policy.version": "p1",
        "gen_ai.guardrail.result.type": "verdict",
        "gen_ai.guardrail.result.value": "harmful",
        "gen_ai.guardrail.risk.score": 0.75,
        "gen_ai.guardrail.risk.category": "burglary",
        "guard_middleware.choice": 0,
        "guard_middleware.decision.id": "gd-output",
        "guard_middleware.decision.action": "allow",
        "guard_middleware.decision.would": "allow",
        "guard_middleware.decision.basis": "verdict",
        "guard_middleware.mode": "reason",
        "guard_middleware.thought": True,
        "guard_middleware.seconds.queue": 0.001,
        "guard_middleware.seconds.generate": 0.004,
    }
    assert values(of_input)["gen_ai.guardrail.result.value"] == "unharmful"
    for span, label, score in ((of_input, "unharmful", 0.25), (of_output, "harmful", 0.75)):
        (event,) = span.events
        assert event.name == "gen_ai.evaluation.result"
        assert dict(event.attributes or {}) == {
            "gen_ai.evaluation.name": "nano",
            "gen_ai.evaluation.score.label": label,
            "gen_ai.evaluation.score.value": score,
            "gen_ai.evaluation.explanation": "The user asks about locks. Mild.",
        }
    model = values(recorder.spans("chat nano")[0])
    assert model["gen_ai.usage.input_tokens"] == 120
    assert model["gen_ai.usage.output_tokens"] == 40
    assert model["gen_ai.usage.reasoning.output_tokens"] == 30
    assert model["guard_middleware.model.revision"] == "r1"


def test_the_server_span_says_what_became_of_the_request() -> None:
    digest = ContentDigest(KEY)
    recorder = Recorder(digest=digest)
    one_request(recorder.telemetry)
    assert values(recorder.span("POST /v1/chat/completions")) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/chat/completions",
        "url.path": "/v1/chat/completions",
        "url.scheme": "http",
        "gen_ai.request.model": "vlm",
        "gen_ai.guardrail.policy.id": "default",
        "gen_ai.guardrail.policy.version": "p1",
        "guard_middleware.convention": CONVENTION,
        "guard_middleware.content.hmac_key": digest.key_id,
        "guard_middleware.content.input.hmac": digest.input(CONVERSATION),
        "guard_middleware.content.output.hmac": (digest.answer(ANSWER),),
        "guard_middleware.decision.action": "allow",
        "guard_middleware.decision.basis": "verdict",
        "guard_middleware.decision.id": "gd-1",
        "guard_middleware.dialect": "chat_completions",
        "guard_middleware.guard_calls": 2,
        "guard_middleware.held_back.bytes": 900,
        "guard_middleware.outcome": "allowed",
        "guard_middleware.released.bytes": 900,
        "guard_middleware.screened": True,
        "guard_middleware.seconds.hold_back": 0.5,
        "guard_middleware.seconds.upstream": 1.5,
        "guard_middleware.tenant": "acme",
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"outcome": "rejected", "error": "body_too_large", "status": 413}, ("block", "limit", False, False)),
        ({"outcome": "rejected", "error": "unsupported_content", "status": 400}, ("block", "coverage", False, False)),
        (
            {"outcome": "rejected", "error": "not_found", "status": 404, "dialect": None},
            ("block", "coverage", False, False),
        ),
        ({"outcome": "upstream_error", "error": "upstream_reset", "status": 502}, (None, None, False, True)),
        (
            {"outcome": "guard_error", "status": 503, "calls": (call("input", action=Action.BLOCK),)},
            ("block", "error", False, True),
        ),
        (
            {"outcome": "blocked", "calls": (call("input", verdict(), action=Action.BLOCK), call("input", verdict()))},
            ("block", "verdict", True, False),
        ),
    ],
)
def test_the_decision_of_a_request_is_its_most_severe(changes: dict[str, Any], expected: tuple[Any, ...]) -> None:
    recorder = Recorder()
    base: dict[str, Any] = {"calls": (), "upstream_called": False, "answers": ()}
    recorder.telemetry.request("POST", "/v1/chat/completions", ()).finish(record(**base | changes))
    (span,) = recorder.exporter.get_finished_spans()
    found = values(span)
    assert (
        found.get("guard_middleware.decision.action"),
        found.get("guard_middleware.decision.basis"),
        found["guard_middleware.screened"],
        span.status.status_code is StatusCode.ERROR,
    ) == expected
    assert found.get("error.type") == changes.get("error")
    assert (span.name == "POST") == ("dialect" in changes)


def test_a_guard_error_is_an_error_of_its_span_and_never_an_evaluation() -> None:
    recorder = Recorder()
    span = recorder.telemetry.request("POST", "/v1/chat/completions", ())
    failed = decision("input", None, action=Action.BLOCK, would=Action.BLOCK, basis=Basis.ERROR)
    span.guard_call("input").end(GuardError("timeout", f"late {MARKER}"), failed)
    span.finish(record(calls=(call("input", action=Action.BLOCK),), outcome="guard_error", status=503))
    guard = recorder.span("apply_guardrail GuardMiddleware")
    assert values(guard)["error.type"] == "timeout"
    assert values(guard)["guard_middleware.failure_policy"] == "block"
    assert "gen_ai.guardrail.result.value" not in values(guard)
    assert guard.status.status_code is StatusCode.ERROR
    assert guard.status.description == "timeout"
    assert not guard.events
    assert not recorder.spans("chat nano")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, f'It says "{MARKER}". Mild.'),
        ({"redactor": Redactor([('"[^"]+"', "[quote]")])}, "It says [quote]. Mild."),
        ({"redactor": Redactor(max_chars=7)}, "It says[cut]"),
        ({"reasoning": False}, None),
    ],
)
def test_the_reasoning_is_emitted_through_the_rules_unless_switched_off(
    options: dict[str, Any], expected: str | None
) -> None:
    recorder = Recorder(**options)
    judged = verdict(reasoning=f'It says "{MARKER}". Mild.')
    recorder.telemetry.request("POST", "/", ()).guard_call("input").end(judged, decision("input", judged))
    (event,) = recorder.span("apply_guardrail GuardMiddleware").events
    assert (event.attributes or {}).get("gen_ai.evaluation.explanation") == expected


def test_finishing_twice_changes_and_counts_nothing(otlp: Collector) -> None:
    telemetry = Telemetry.from_env("guard-gateway")
    span = one_request(telemetry)
    span.finish(record(outcome="blocked"))
    guard = span.guard_call("input")
    guard.end(verdict(), decision("input", verdict()))
    guard.end(GuardError("timeout"), decision("input"))
    asyncio.run(telemetry.aclose())
    ((of, point),) = otlp.points("guard_middleware.request.duration")
    assert (of["guard_middleware.outcome"], point.count) == ("allowed", 1)
    assert len(otlp.spans) == 8
    assert not [span for span in otlp.spans if "error.type" in attributes(span.attributes)]


def test_a_question_that_nobody_waits_for_is_ended_with_the_request() -> None:
    recorder = Recorder()
    span = recorder.telemetry.request("POST", "/v1/chat/completions", ())
    span.guard_call("output", 1)
    span.upstream_started("vlm")
    span.finish(record(outcome="aborted"))
    guard = recorder.span("apply_guardrail GuardMiddleware")
    assert values(guard)["guard_middleware.cancelled"] is True
    assert values(guard)["guard_middleware.decision.id"] == "gd-1"
    assert recorder.span("chat vlm").end_time is not None


def test_an_upstream_that_fails_marks_its_own_span() -> None:
    recorder = Recorder(upstream_provider="vllm")
    span = recorder.telemetry.request("POST", "/v1/chat/completions", ())
    span.upstream_started("vlm", remote=False)
    span.upstream_ended("upstream_reset")
    time.sleep(0.01)
    span.finish(record(outcome="upstream_error", status=502, stream=True))
    upstream, server = recorder.span("chat vlm"), recorder.span("POST /v1/chat/completions")
    assert values(upstream) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "vlm",
        "gen_ai.request.stream": True,
        "guard_middleware.decision.id": "gd-1",
        "error.type": "upstream_reset",
    }
    assert upstream.kind is SpanKind.INTERNAL
    assert (server.end_time or 0) - (upstream.end_time or 0) >= 10_000_000


def test_the_trace_goes_on_to_the_worker_and_the_upstream() -> None:
    recorder = Recorder()
    span = recorder.telemetry.request("POST", "/", CALLER)
    guard = span.guard_call("input")
    guard.end(verdict(), decision("input", verdict()))
    span.upstream_started("vlm")
    headers = span.inject([(b"Traceparent", b"forged"), *CALLER])
    span.finish(record())
    context = recorder.span("apply_guardrail GuardMiddleware").get_span_context()
    assert guard.traceparent == f"00-{TRACE}-{context.span_id:016x}-01"
    upstream = recorder.span("chat vlm").get_span_context()
    assert headers == [
        (b"host", b"gateway"),
        (b"x-more", b"1"),
        (b"traceparent", f"00-{TRACE}-{upstream.span_id:016x}-01".encode()),
    ]
    assert span.trace_id == TRACE


def test_without_a_provider_the_callers_trace_passes_through_unchanged() -> None:
    telemetry = Telemetry()
    span = one_request(telemetry, CALLER)
    assert span.guard_call("input").traceparent == CALLER[1][1].decode()
    assert sorted(span.inject(CALLER)) == sorted(CALLER)
    assert one_request(telemetry).guard_call("input").traceparent is None
    assert one_request(telemetry).trace_id is None
    assert telemetry.failures == 0


def test_a_span_that_is_not_sampled_builds_nothing_below_it() -> None:
    provider = TracerProvider(sampler=ALWAYS_OFF)
    telemetry = Telemetry(provider)
    span = telemetry.request("POST", "/", ())
    guard = span.guard_call("input")
    assert guard.traceparent is not None
    assert not int(guard.traceparent[-2:], 16) & 1
    assert not guard._span.is_recording()
    assert guard._span is span._span


def test_inside_an_instrumented_host_the_span_is_internal_and_a_child() -> None:
    recorder = Recorder()
    with recorder.telemetry.tracer.start_as_current_span("host") as host:
        one_request(recorder.telemetry, CALLER)
    span = recorder.span("POST /v1/chat/completions")
    assert span.kind is SpanKind.INTERNAL
    assert span.parent is not None
    assert span.parent.span_id == host.get_span_context().span_id


def test_strange_methods_paths_and_models_stay_bounded_and_encodable(otlp: Collector) -> None:
    telemetry = Telemetry.from_env("guard-gateway")
    span = telemetry.request("BREW\ud800", "/" + "x" * 5000 + "\udfff", [(b"traceparent", b"\xff\x00nonsense")])
    span.upstream_started("m\ud800" * 5000)
    judged = verdict(reasoning="odd \ud800", categories=("\udc00",))
    span.guard_call("input").end(judged, decision("input", judged))
    span.finish(record(model="m\ud800" * 5000, dialect=None, tenant="\ud800"))
    asyncio.run(telemetry.aclose())
    found = attributes(otlp.span("_OTHER").attributes)
    assert len(found["url.path"]) == len(found["gen_ai.request.model"]) == 256
    assert telemetry.failures == 0


class Broken:
    """A provider, tracer, span, meter and instrument in one, which raises on every use."""

    def __getattr__(self, name: str) -> Any:
        def fail(*_: Any, **__: Any) -> Any:
            raise RuntimeError(f"no {name}")

        return fail


class BreaksOnUse:
    """Hands out instruments and spans that raise on every use."""

    def __init__(self, product: Any) -> None:
        self.product = product

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self.product


@pytest.mark.parametrize(
    "broken",
    [
        Broken(),
        BreaksOnUse(Broken()),
        BreaksOnUse(BreaksOnUse(Broken())),
        BreaksOnUse(BreaksOnUse(None)),
        BreaksOnUse(3),
    ],
    ids=["provider", "tracer", "span", "nothing", "nonsense"],
)
def test_nothing_escapes_from_telemetry_that_raises_on_every_call(
    broken: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        telemetry = Telemetry(broken, broken)
        for _ in range(3):
            span = one_request(telemetry, CALLER)
            assert isinstance(span, RequestSpan)
            abandoned = span.guard_call("input")
            assert isinstance(abandoned, GuardSpan)
            assert abandoned.traceparent is None or isinstance(abandoned.traceparent, str)
            assert span.trace_id is None or isinstance(span.trace_id, str)
            assert {(b"host", b"gateway"), (b"x-more", b"1")} <= set(span.inject(CALLER))
            abandoned.abandon("gd-1")
        asyncio.run(telemetry.aclose())
    assert telemetry.failures > 0
    assert len([entry for entry in caplog.records if entry.name == "guard_middleware.telemetry"]) == 1


def test_everything_is_emitted_in_the_scope_of_the_project() -> None:
    recorder, reader = Recorder(), InMemoryMetricReader()
    one_request(Telemetry(trace_provider(recorder), MeterProvider([reader])))
    data = reader.get_metrics_data()
    assert data is not None
    scopes = [scope.scope for resource in data.resource_metrics for scope in resource.scope_metrics]
    scopes += [span.instrumentation_scope for span in recorder.exporter.get_finished_spans()]
    assert {(scope.name, scope.version) for scope in scopes} == {("guard_middleware", __version__)}


def test_a_meter_that_raises_does_not_cost_the_spans() -> None:
    recorder = Recorder()
    telemetry = Telemetry(trace_provider(recorder), BreaksOnUse(BreaksOnUse(Broken())))  # type: ignore[arg-type]
    one_request(telemetry)
    assert recorder.span("POST /v1/chat/completions").end_time is not None
    assert telemetry.failures == 1


def trace_provider(recorder: Recorder) -> TracerProvider:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(recorder.exporter))
    return provider


def test_two_hundred_requests_at_once_do_not_mix() -> None:
    recorder = Recorder()

    async def one(index: int) -> None:
        span = recorder.telemetry.request(
            "POST", f"/{index}", [(b"traceparent", f"00-{index + 1:032x}-{1:016x}-01".encode())]
        )
        await asyncio.sleep(0)
        guard = span.guard_call("input")
        await asyncio.sleep(0.001 * (index % 5))
        judged = verdict(model=f"m{index}")
        guard.end(judged, decision("input", judged, id=f"d{index}"))
        await asyncio.sleep(0)
        span.finish(record(id=f"r{index}", dialect=None))

    async def run() -> None:
        await asyncio.gather(*(one(index) for index in range(200)))

    asyncio.run(run())
    spans = recorder.exporter.get_finished_spans()
    assert len(spans) == 600
    for span in spans:
        index = span.get_span_context().trace_id - 1
        expected = f"r{index}" if span.name == "POST" else f"d{index}"
        assert values(span)["guard_middleware.decision.id"] == expected
        if span.name.startswith("chat"):
            assert span.name == f"chat m{index}"


@pytest.mark.parametrize(
    "environ",
    [{}, {"OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none"}, {"OTEL_SDK_DISABLED": "true"}],
)
def test_nothing_is_set_up_that_the_environment_does_not_ask_for(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if environ:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    telemetry = Telemetry.from_env("guard-gateway")
    assert not one_request(telemetry)._recording
    assert telemetry._own_providers == ()


def test_own_providers_stay_private(otlp: Collector) -> None:
    before = trace.get_tracer_provider(), metrics.get_meter_provider()
    telemetry = Telemetry.from_env("guard-gateway")
    assert (trace.get_tracer_provider(), metrics.get_meter_provider()) == before
    asyncio.run(telemetry.aclose())


def test_the_environment_names_the_service(otlp: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "edge")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    export(Telemetry.from_env("guard-gateway"))
    assert otlp.resources[0]["service.name"] == "edge"
    assert not otlp.metrics


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "pigeon"),
        ("OTEL_METRICS_EXPORTER", "otlp,pigeon"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "many"),
    ],
)
def test_an_exporter_that_cannot_start_stops_the_start(
    otlp: Collector, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"OTEL_"):
        Telemetry.from_env("guard-gateway")


HOST = """
import asyncio, sys
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from guard_middleware.telemetry import Telemetry
from tests.support.records import record

telemetry = Telemetry.from_env("guard-gateway") if sys.argv[1] == "before" else None
exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
metrics.set_meter_provider(MeterProvider([reader]))
if sys.argv[1] == "after":
    import os
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
    telemetry = Telemetry.from_env("guard-gateway")
telemetry.request("POST", "/v1/chat/completions", ()).finish(record())
asyncio.run(telemetry.aclose())
assert trace.get_tracer_provider() is provider
assert [span.name for span in exporter.get_finished_spans()] == ["POST /v1/chat/completions"]
assert reader.get_metrics_data().resource_metrics
"""


@pytest.mark.parametrize("built", ["before", "after"])
def test_the_providers_of_the_host_application_are_used(built: str, pytestconfig: pytest.Config) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOST, built], cwd=pytestconfig.rootpath, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_a_collector_that_is_gone_costs_no_outcome_and_no_long_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    telemetry = Telemetry.from_env("guard-gateway")
    started = time.monotonic()
    one_request(telemetry)
    assert time.monotonic() - started < 0.5
    asyncio.run(telemetry.aclose())
    assert time.monotonic() - started < 8


def test_a_request_costs_less_than_a_quarter_millisecond_where_nothing_is_exported() -> None:
    telemetry, finished = Telemetry(), record()
    one_request(telemetry, CALLER, finished)
    best = min(_cpu_seconds(telemetry, finished) for _ in range(5))
    assert best < 0.00025


def _cpu_seconds(telemetry: Telemetry, finished: Record, requests: int = 200) -> float:
    started = time.process_time()
    for _ in range(requests):
        one_request(telemetry, CALLER, finished)
    return (time.process_time() - started) / requests
