"""What is configured for the guard in LiteLLM, and the one ``Runtime`` that a process builds from it.

Our parameters start with ``guard_``, because LiteLLM passes every guardrail the defaults of all vendors' parameters;
those are ignored, an unknown ``guard_`` one is refused. Everything that is wrong raises ``RuntimeError``: LiteLLM
takes a ``ValueError`` or ``TypeError`` out of a guardrail's constructor for a reason to start without it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guard_middleware import config as configuration
from guard_middleware.config import Config
from guard_middleware.errors import ConfigError
from guard_middleware.runtime import Runtime

logger = logging.getLogger(__name__)

#: names the configuration's file where ``guard_config`` does not
CONFIG_ENV = "GUARD_MIDDLEWARE_CONFIG"
_INPUT = frozenset({"pre_call", "during_call"})
_MODES = _INPUT | {"post_call", "pre_mcp_call", "during_mcp_call", "post_mcp_call"}
_OPTIONS = frozenset({"guard_config", "guard_unread"})


@dataclass(frozen=True, slots=True)
class Settings:
    """``config`` with the sources that ``mode`` names. ``unread`` are LiteLLM call types that pass without a guard."""

    config: Config
    input: bool = True
    output: bool = True
    unread: frozenset[str] = field(default=frozenset())

    @classmethod
    def of(cls, mode: Any, options: Mapping[str, Any]) -> Settings:
        """From a guardrail's ``mode`` and its ``guard_`` parameters; raises ``RuntimeError`` with the remedy."""
        unknown = sorted(name for name in options if name.startswith("guard_") and name not in _OPTIONS)
        if unknown:
            raise RuntimeError(f"unknown parameter {unknown[0]}: choose from {', '.join(sorted(_OPTIONS))}")
        for switch in ("run_in_parallel", "scan_raw_request"):
            if options.get(switch):
                raise RuntimeError(
                    f"{switch} throws away what the guard judged and checked; remove it, and set `race: true` in the "
                    "policy where the model is to be called before the verdict"
                )
        modes = _modes(mode)
        config = load(options.get("guard_config"))
        if any(rule.tenant for rule in config.tenants.match) and "unix" not in config.tenants.trusted_proxies:
            raise RuntimeError("tenants that are never believed: add unix to tenants.trusted_proxies")
        source = {"input": bool(modes & _INPUT), "output": "post_call" in modes}
        for name in (name for name, judged in source.items() if not judged):
            logger.warning("mode %s: %s is UNGUARDED; write mode: [pre_call, post_call]", sorted(modes), name)
        race = "during_call" in modes and "pre_call" not in modes
        return cls(_limited(config, source, race), unread=_unread(options.get("guard_unread")), **source)


def load(path: Any = None) -> Config:
    """The file at ``path``, or that ``GUARD_MIDDLEWARE_CONFIG`` names, or the default; raises ``RuntimeError``."""
    chosen = path if path is not None else os.environ.get(CONFIG_ENV)
    if chosen is None:
        return Config()
    if not isinstance(chosen, str | Path):
        raise RuntimeError(f"guard_config is {chosen!r:.80}; write the path of guard.yaml")
    try:
        return configuration.load(str(chosen))
    except ConfigError as error:
        raise RuntimeError(str(error)) from error


_runtimes: dict[str, Runtime] = {}


def runtime(config: Config) -> Runtime:
    """The ``Runtime`` of this process for ``config``, built once; raises ``RuntimeError``.

    Several guardrails with the same configuration, and the SDK's calls, share a worker and caches.
    """
    key = config.model_dump_json()
    if key not in _runtimes:
        try:
            _runtimes[key] = Runtime(config, remote=True)
        except ConfigError as error:
            raise RuntimeError(str(error)) from error
    return _runtimes[key]


def _modes(mode: Any) -> frozenset[str]:
    names = [mode] if isinstance(mode, str) else mode
    if not isinstance(names, Iterable) or isinstance(names, Mapping) or hasattr(mode, "tags"):
        raise RuntimeError("mode by tags leaves requests unguarded; write mode: [pre_call, post_call]")
    found = frozenset(str(getattr(name, "value", name)) for name in names)
    if found - _MODES or not found & (_INPUT | {"post_call"}):
        wrong = ", ".join(sorted(found - _MODES)) or "nothing"
        raise RuntimeError(f"mode has {wrong}; write mode: [pre_call, post_call]")
    return found


def _unread(value: Any) -> frozenset[str]:
    if not isinstance(value or [], list) or not all(isinstance(name, str) for name in value or []):
        raise RuntimeError("guard_unread is not a list of LiteLLM call types, such as [aembedding, arerank]")
    return frozenset(value or [])


def _limited(config: Config, sources: Mapping[str, bool], race: bool) -> Config:
    """Each policy without the sources that ``mode`` leaves out, racing where ``mode`` says during_call."""
    policies = {}
    for name, policy in config.policies.items():
        unguarded = {
            source: type(getattr(policy, source))(moderate=False) for source, kept in sources.items() if not kept
        }
        policies[name] = policy.model_copy(update={**unguarded, **({"race": True} if race else {})})
    return config.model_copy(update={"policies": policies})
