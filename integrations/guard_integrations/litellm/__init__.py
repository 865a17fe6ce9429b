"""The guard inside LiteLLM.

    guardrails:
      - guardrail_name: guard
        litellm_params:
          guardrail: guard_integrations.litellm.GuardMiddlewareGuardrail
          mode: [pre_call, post_call]
          default_on: true
          guard_config: guard.yaml

``guardrail`` holds LiteLLM's hooks, ``turn`` one request as it goes through the guard, ``wire`` and ``streams`` the way
between LiteLLM's objects and the bytes of the APIs, ``settings`` what is configured and the one ``Runtime`` of a
process. For programs that call LiteLLM without its proxy, ``sdk`` holds ``install()``, and ``callback`` what LiteLLM's
callbacks reach. What is allowed is decided in ``guard_middleware`` and nowhere here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guard_integrations.litellm.callback import GuardCallback
    from guard_integrations.litellm.guardrail import GuardMiddlewareGuardrail
    from guard_integrations.litellm.sdk import install, uninstall

__all__ = ["GuardCallback", "GuardMiddlewareGuardrail", "install", "uninstall"]


def __getattr__(name: str) -> Any:
    if name == "GuardMiddlewareGuardrail":  # late, so that the parts without LiteLLM's proxy can be imported alone
        from guard_integrations.litellm.guardrail import GuardMiddlewareGuardrail

        return GuardMiddlewareGuardrail
    if name == "GuardCallback":
        from guard_integrations.litellm.callback import GuardCallback

        return GuardCallback
    if name in ("install", "uninstall"):
        from guard_integrations.litellm import sdk

        return getattr(sdk, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
