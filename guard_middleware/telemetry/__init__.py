"""OpenTelemetry spans and metrics: everything that is emitted, and every name, in one package.

Telemetry may never change an outcome. All calls go through ``Telemetry``, ``RequestSpan`` and
``GuardSpan``, whose methods neither raise nor await: what goes wrong inside is counted in
``Telemetry.failures`` and reported once. Where nothing records, no span is built.

One request gives one server span, under it one ``apply_guardrail`` span per question to the guard (with
the guard model's own ``chat`` span below), and optionally the upstream's ``chat`` span. No content of a
request or an answer is emitted, only keyed digests, unless ``capture_content`` is set; the guard's
reasoning is emitted unless ``reasoning`` is cleared, through the operator's ``Redactor``.
docs/telemetry.md lists names and defaults.

``process`` holds what one process emits, ``request_span`` and ``guard_span`` the spans of a request, ``instruments``
the metrics, ``attributes`` the names and values that they share, ``emitter`` what a span asks of its process. Each
imports only from those to its right: process, request_span, guard_span, emitter, instruments, attributes.
"""

from __future__ import annotations

from guard_middleware.telemetry.attributes import COMPONENT, CONVENTION, HOLD_BACK, PROVIDER, Attributes
from guard_middleware.telemetry.guard_span import GuardSpan
from guard_middleware.telemetry.process import Telemetry
from guard_middleware.telemetry.request_span import Headers, RequestSpan

__all__ = [
    "COMPONENT",
    "CONVENTION",
    "HOLD_BACK",
    "PROVIDER",
    "Attributes",
    "GuardSpan",
    "Headers",
    "RequestSpan",
    "Telemetry",
]
