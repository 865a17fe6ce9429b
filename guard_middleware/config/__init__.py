"""One YAML file, read once, to frozen values. Every section and key is optional; what is left out fails closed.

``load`` and ``parse`` raise ``ConfigError`` with the line and the remedy; nothing starts on a broken file.
A field's ``description`` is that remedy, and the reference in docs/policy.md, so it says how to write the value.

Refuses, beside what ``strictyaml`` refuses:
    - unknown keys, wrong types, numbers out of range, durations without a unit
    - policies that are referenced and not defined, rules that can never apply, keys that have no effect
    - secrets in the file: they are named by environment variable

``policies``, ``services``, ``content``, ``routing``, ``records`` and ``caches`` hold the sections, ``whole`` the file
with what holds between them, ``reading`` and ``messages`` the way from a text to values or to one error.
"""

from __future__ import annotations

from guard_middleware.config.caches import Cache, HistoryCache, RedisCache, TurnsCache, VerdictCache
from guard_middleware.config.content import Dialect, Dialects, Images, LimitsSection
from guard_middleware.config.policies import BUILT_IN_POLICY, Ensemble, OutputPolicy, Policy, SourcePolicy, StreamRules
from guard_middleware.config.reading import load, parse
from guard_middleware.config.records import Audit, Redaction, Telemetry
from guard_middleware.config.routing import Route, TenantMatch, Tenants, path_matches
from guard_middleware.config.section import Section
from guard_middleware.config.services import DEFAULT_GUARD, Upstream, Weights, Worker
from guard_middleware.config.whole import Config

__all__ = [
    "BUILT_IN_POLICY",
    "DEFAULT_GUARD",
    "Audit",
    "Cache",
    "Config",
    "Dialect",
    "Dialects",
    "Ensemble",
    "HistoryCache",
    "Images",
    "LimitsSection",
    "OutputPolicy",
    "Policy",
    "Redaction",
    "RedisCache",
    "Route",
    "Section",
    "SourcePolicy",
    "StreamRules",
    "Telemetry",
    "TenantMatch",
    "Tenants",
    "TurnsCache",
    "Upstream",
    "VerdictCache",
    "Weights",
    "Worker",
    "load",
    "parse",
    "path_matches",
]
