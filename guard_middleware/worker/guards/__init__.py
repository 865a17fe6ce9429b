"""Guards of others behind the worker's protocol: one module per published format.

``guard_format(name, policy)`` is the only way in. Each module says where its format is published, what it maps and
what it refuses; ``base`` says what a format is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from guard_middleware.errors import ConfigError
from guard_middleware.worker.guards.base import GuardFormat
from guard_middleware.worker.guards.gpt_oss_safeguard import GptOssSafeguard
from guard_middleware.worker.guards.guardreasoner import GuardReasonerVL
from guard_middleware.worker.guards.llama_guard import LlamaGuard4
from guard_middleware.worker.guards.qwen3guard import Qwen3GuardGen
from guard_middleware.worker.guards.shieldgemma import ShieldGemma2
from guard_middleware.worker.guards.singguard import SingGuard

_FIXED: Mapping[str, Callable[[], GuardFormat]] = {
    "guardreasoner-vl": GuardReasonerVL,
    "llama-guard-4": LlamaGuard4,
    "qwen3guard-gen": Qwen3GuardGen,
    "qwen3guard-gen-loose": lambda: Qwen3GuardGen(loose=True),
}
_WITH_POLICY: Mapping[str, Callable[[str | None], GuardFormat]] = {
    "gpt-oss-safeguard": GptOssSafeguard,
    "shieldgemma-2": ShieldGemma2,
    "singguard": SingGuard,
}
NAMES = tuple(sorted([*_FIXED, *_WITH_POLICY]))


def guard_format(name: str, policy: str | None = None) -> GuardFormat:
    """The format of that name, with the operator's own policy text.

    Raises ``ConfigError`` for an unknown name, and for a policy that the guard does not take, lacks, or cannot read.
    """
    if name in _FIXED:
        if policy is not None:
            takers = ", ".join(sorted(_WITH_POLICY))
            raise ConfigError(f"{name} takes no policy text", remedy=f"leave it out; {takers} take one")
        return _FIXED[name]()
    if name not in _WITH_POLICY:
        raise ConfigError(f"no guard format is called {name!r}", remedy=f"one of {', '.join(NAMES)}")
    if policy is not None and "<|" in policy:
        raise ConfigError("the policy text holds <|, which begins a control token", remedy="take it out")
    return _WITH_POLICY[name](policy)
