"""What a span asks of its process (``Emitter``), and the shield that every call to OpenTelemetry runs under.

The shield lets no ``Exception`` out and reports the first one; it lets through what ends a task or the process, such as
``CancelledError`` and ``KeyboardInterrupt``.
"""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Protocol

from opentelemetry.trace import Tracer

from guard_middleware.evidence import ContentDigest, Redactor
from guard_middleware.telemetry.instruments import Instruments

_log = logging.getLogger(__package__)


class Shield:
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


class Emitter(Protocol):
    """What a span takes from the ``Telemetry`` that opened it, which says what each of these is."""

    capture_content: bool
    reasoning: bool
    redact: Redactor
    digest: ContentDigest
    upstream_provider: str
    shield: Shield
    tracer: Tracer
    instruments: Instruments | None
