"""A call of LiteLLM's SDK as the body of its API, and back: what the guard judged is what the call goes on with.

Every argument belongs to the body, by whatever position or name it came, except LiteLLM's own settings. A setting
that carries text into the prompt stays in the body, where its dialect refuses it or the operator's ``extra_fields``
have it read.

Refuses (``Unreadable``): arguments that are no JSON, and two values for one field.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from guard_integrations.litellm import wire

#: of LiteLLM's own settings those that become part of a prompt
_PROMPTS: Final = frozenset(
    {
        "assistant_continue_message", "custom_prompt_dict", "final_prompt_value", "litellm_system_prompt",
        "model_config", "prompt_environment", "prompt_id", "prompt_label", "prompt_variables", "prompt_version",
        "roles", "user_continue_message",
    }
)  # fmt: skip
#: arguments about the connection, which LiteLLM does not list among its settings
_CONNECTION: Final = frozenset(
    {
        "additional_drop_params", "api_type", "default_headers", "deployment_id", "drop_params",
        "enable_json_schema_validation", "extra_headers", "extra_query", "organization", "base_url", "timeout",
    }
)  # fmt: skip


class Unreadable(Exception):
    """A call that has no body; the message is for its caller."""


@dataclass(frozen=True)
class Call:
    """``arguments`` by name; ``body`` is what of them the guard judges, as JSON."""

    route: wire.Route
    arguments: Mapping[str, Any]
    judged: frozenset[str]
    body: bytes

    @classmethod
    def of(cls, route: wire.Route, signature: inspect.Signature, args: Any, kwargs: Mapping[str, Any]) -> Call:
        """Raises ``Unreadable``, and ``TypeError`` where Python would."""
        arguments = _named(signature, args, kwargs)
        if route is wire.COMPLETIONS and arguments.get("model") is None and "engine" in arguments:
            arguments["model"] = arguments.pop("engine")
        if route is wire.RESPONSES and arguments.get("text_format") is not None:
            arguments["text"] = _text_format(arguments.pop("text_format"), arguments.get("text"))
        settings = _settings(route)
        body = {name: value for name, value in arguments.items() if name not in settings and value is not None}
        extra = body.pop("extra_body", {})
        if not isinstance(extra, dict) or extra.keys() & arguments.keys():
            raise Unreadable("extra_body is no mapping, or repeats an argument: give each field once")
        fallbacks = arguments.get("fallbacks") or []
        if not isinstance(fallbacks, list) or not all(_names_a_model(fallback) for fallback in fallbacks):
            raise Unreadable("fallbacks may name models; a fallback with a prompt of its own is not read by the guard")
        return cls(route, arguments, frozenset(body), _encoded({**body, **extra}))

    @property
    def model(self) -> str:
        return str(self.arguments.get("model") or "")

    @property
    def streams(self) -> bool:
        return self.arguments.get("stream") is True

    def with_judged(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with the body that was judged in place of the one that was given."""
        extra = self.arguments.get("extra_body") or {}
        given = {name: value for name, value in self.arguments.items() if name not in self.judged}
        if extra:
            given["extra_body"] = {name: value for name, value in body.items() if name in extra}
        return given | {name: value for name, value in body.items() if name not in extra}


def _encoded(body: Mapping[str, Any]) -> bytes:
    try:
        return wire.encode({name: _schema(value) for name, value in body.items()})
    except TypeError as error:
        raise Unreadable(f"an argument is no JSON ({error}), so that the guard cannot read it") from None


def _named(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, value in signature.bind_partial(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        elif kind is not inspect.Parameter.VAR_POSITIONAL:
            named[name] = value
        elif value:
            raise TypeError(f"{len(value)} positional arguments too many")
    return named


def _settings(route: wire.Route) -> frozenset[str]:
    """LiteLLM's arguments that reach no model; the installed release lists most of them."""
    from litellm.types.utils import all_litellm_params

    settings = (_CONNECTION | frozenset(all_litellm_params)) - _PROMPTS
    return settings - {"metadata"} if route.metadata else settings


def _names_a_model(fallback: Any) -> bool:
    if isinstance(fallback, dict):
        return fallback.keys() <= {"model", "api_base", "api_key", "api_version", "custom_llm_provider"}
    return isinstance(fallback, str)


def _schema(value: Any) -> Any:
    """A class of pydantic's as the JSON schema that LiteLLM makes of it."""
    if not isinstance(value, type):
        return value
    from litellm.llms.base_llm.base_utils import type_to_response_format_param

    return type_to_response_format_param(value)


def _text_format(text_format: Any, text: Any) -> Any:
    from litellm.responses.utils import ResponsesAPIRequestUtils

    return ResponsesAPIRequestUtils.convert_text_format_to_text_param(text_format=text_format, text=text)
