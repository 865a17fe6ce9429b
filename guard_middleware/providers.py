"""OpenTelemetry providers as the standard ``OTEL_*`` variables ask for them, for this project's signals alone.

The providers stay private: the process's global ones belong to the host application, and where it has set
them they are used instead. What exporters, samplers, processors and resources read from the environment
is the SDK's own affair.
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from typing import Any

from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from guard_middleware.errors import ConfigError


def from_env(service_name: str) -> tuple[TracerProvider | None, MeterProvider | None]:
    """The providers to use, None for each that the host has set or that nobody asked for.

    ``service_name`` holds where the environment names no service. Raises ``ConfigError`` for an exporter
    that is not installed, and for values that the SDK does not take.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None, None
    try:
        return _build(service_name)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"OpenTelemetry does not start ({type(error).__name__}: {error})",
            remedy="correct the OTEL_* variables, or set OTEL_SDK_DISABLED=true",
        ) from None


def _build(service_name: str) -> tuple[TracerProvider | None, MeterProvider | None]:
    tracer_provider, meter_provider = None, None
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider) and (exporters := _exporters("traces")):
        tracer_provider = TracerProvider(resource=_resource(service_name))
        for exporter in exporters:
            tracer_provider.add_span_processor(BatchSpanProcessor(exporter))
    if not isinstance(metrics.get_meter_provider(), MeterProvider) and (exporters := _exporters("metrics")):
        readers = [e if isinstance(e, MetricReader) else PeriodicExportingMetricReader(e) for e in exporters]
        meter_provider = MeterProvider(readers, resource=_resource(service_name))
    return tracer_provider, meter_provider


def _resource(service_name: str) -> Resource:
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: service_name}))
    return resource


def _exporters(signal: str) -> list[Any]:
    """The exporters of a signal (``traces``, ``metrics``) that the environment asks for.

    ``OTEL_{SIGNAL}_EXPORTER`` names them; unset, it is ``otlp`` where an OTLP endpoint is set, else none.
    """
    upper = signal.upper()
    variable = f"OTEL_{upper}_EXPORTER"
    endpoints = (os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"), os.environ.get(f"OTEL_EXPORTER_OTLP_{upper}_ENDPOINT"))
    names = os.environ.get(variable) or ("otlp" if any(endpoints) else "none")
    protocol = os.environ.get(f"OTEL_EXPORTER_OTLP_{upper}_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    otlp = {"grpc": "otlp_proto_grpc"}.get((protocol or "").strip(), "otlp_proto_http")
    found = []
    for name in (name.strip() for name in names.split(",")):
        if name == "none" or not name:
            continue
        entries = tuple(entry_points(group=f"opentelemetry_{signal}_exporter", name=otlp if name == "otlp" else name))
        if not entries:
            raise ConfigError(
                f"{variable} asks for {name!r} over {protocol or 'http/protobuf'}, which is not installed",
                remedy="install the package that provides it, or use otlp, console or none",
            )
        found.append(entries[0].load()())
    return found
