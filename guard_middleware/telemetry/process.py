"""What one process emits: its providers, its switches, the counters that belong to no request, and the end of it all.

Providers that the host application has set are used and never stopped; only those that ``from_env`` built are.
"""

from __future__ import annotations

import asyncio
import threading

from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Tracer

from guard_middleware import __version__, providers
from guard_middleware.evidence import ContentDigest, Redactor
from guard_middleware.telemetry.emitter import Shield
from guard_middleware.telemetry.instruments import Instruments
from guard_middleware.telemetry.request_span import Headers, RequestSpan
from guard_middleware.types import Source

#: The instrumentation scope of everything that is emitted.
_SCOPE = "guard_middleware"
_SHUTDOWN_SECONDS = 5.0


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
        self.shield = Shield()
        self._own_providers: tuple[TracerProvider | MeterProvider, ...] = ()
        self.tracer: Tracer = trace.NoOpTracer()
        self.instruments: Instruments | None = None
        with self.shield:
            self.tracer = trace.get_tracer(_SCOPE, __version__, tracer_provider)
        with self.shield:
            self.instruments = Instruments(metrics.get_meter(_SCOPE, __version__, meter_provider))

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
