"""LiteLLM's requests and answers as the bytes of the APIs, and back.

LiteLLM hands hooks one dictionary that holds the client's body, its own bookkeeping and the operator's additions. What
is judged is every field that the client sent, with the value that goes on, and the fields that make up a prompt
wherever they came from. An answer is judged as the JSON that the client would get.

Refuses nothing itself: a field that the dialect does not know is refused there. Fields that only LiteLLM reads
(``_LITELLM``) are not part of the API and are left out, except ``fallbacks`` that bring messages of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

#: what clients of LiteLLM send it beside the API's own fields, and what never reaches a model
_LITELLM = frozenset(
    {"cache", "guardrails", "litellm_metadata", "litellm_session_id", "litellm_trace_id", "policies", "tags"}
)
#: LiteLLM's own entries of a request that has no copy of the client's body (pass-through, SDK)
_ENTRIES = frozenset({"litellm_logging_obj", "litellm_call_id", "metadata", "proxy_server_request", "secret_fields"})
_COPY = "provider_specific_fields"
#: LiteLLM's bookkeeping in an answer that is a dictionary; the proxy leaves it out
_HIDDEN = frozenset({"_hidden_params", "_response_headers"})
#: never written back: LiteLLM routes by them, and the dialects do not change them
_KEPT = frozenset({"metadata", "model", "stream"})


@dataclass(frozen=True, slots=True)
class Route:
    """One API as LiteLLM carries it. ``calls`` are its call types, ``prompt`` what LiteLLM itself may fill in."""

    path: str
    calls: frozenset[str]
    prompt: frozenset[str]
    #: whether ``metadata`` goes to the model's service; elsewhere LiteLLM keeps it
    metadata: bool = True


CHAT = Route(
    "/v1/chat/completions",
    frozenset({"completion", "acompletion"}),
    frozenset({"messages", "tools", "functions", "response_format"}),
    metadata=False,
)
COMPLETIONS = Route(
    "/v1/completions", frozenset({"text_completion", "atext_completion"}), frozenset({"prompt"}), metadata=False
)
MESSAGES = Route("/v1/messages", frozenset({"anthropic_messages"}), frozenset({"messages", "system", "tools"}))
RESPONSES = Route(
    "/v1/responses", frozenset({"responses", "aresponses"}), frozenset({"input", "instructions", "tools", "text"})
)
ROUTES = (CHAT, COMPLETIONS, MESSAGES, RESPONSES)
_BY_CALL = {call: route for route in ROUTES for call in route.calls}
_SUFFIXES = tuple((route.path.removeprefix("/v1"), route) for route in ROUTES)


def by_call(call_type: Any) -> Route | None:
    """The API of one of LiteLLM's call types (a ``CallTypes`` or its value)."""
    return _BY_CALL.get(str(getattr(call_type, "value", call_type)))


def by_path(path: str) -> Route | None:
    """The API that a pass-through route's path ends with."""
    return next((route for suffix, route in _SUFFIXES if path.endswith(suffix)), None)


def request_value(route: Route, data: Mapping[str, Any]) -> dict[str, Any]:
    """The body to judge, out of what LiteLLM hands its hooks."""
    sent = _sent(data)
    names = sent.keys() | route.prompt if sent is not None else data.keys() - _ENTRIES
    body = {name: data[name] for name in names if name in data and name not in _LITELLM and name != "metadata"}
    metadata = sent.get("metadata") if sent is not None else None
    if metadata is not None and route.metadata:
        body["metadata"] = metadata
    if _only_names(body.get("fallbacks")):
        del body["fallbacks"]
    return body


def apply_request(data: dict[str, Any], body: Mapping[str, Any], judged: Mapping[str, Any]) -> None:
    """Writes what was judged over ``body`` as ``data`` holds it: images that were fetched, fields that were dropped."""
    for name in body.keys() - judged.keys() - _KEPT:
        data.pop(name, None)
    for name, value in judged.items():
        if name not in _KEPT and data.get(name) != value:
            data[name] = value


def encode(value: Any) -> bytes:
    """JSON of a body whose messages may be LiteLLM's own objects; raises ``TypeError`` for what is none."""
    return orjson.dumps(value, default=_plain)


def decode(data: bytes) -> Any:
    return orjson.loads(data)


def answer_value(response: Any) -> Any:
    """One of LiteLLM's answers, chunks or events as the JSON value that its client would get; nulls are left out."""
    if hasattr(response, "model_dump"):
        return response.model_dump(mode="json", exclude_none=True, warnings=False)
    if isinstance(response, dict):
        return {name: value for name, value in response.items() if name not in _HIDDEN}
    return response


def answer_bytes(value: Any) -> bytes:
    """The JSON of an answer to judge, without LiteLLM's second copy of what a provider said."""
    data = encode(value)
    return encode(_without(value, _COPY)) if _COPY.encode() in data else data


def rebuild(response: Any, value: Mapping[str, Any]) -> Any:
    """An object of the type of ``response`` that says ``value``, with LiteLLM's bookkeeping of the first."""
    if isinstance(response, dict):
        return type(response)(**value, **{name: response[name] for name in _HIDDEN if name in response})
    made = type(response)(**value)
    for name in ("_hidden_params", "_response_headers", "_response_ms"):
        if (kept := getattr(response, name, None)) is not None:
            object.__setattr__(made, name, kept)
    return made


def _sent(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    request = data.get("proxy_server_request")
    body = request.get("body") if isinstance(request, Mapping) else None
    return body if isinstance(body, Mapping) else None


def _only_names(value: Any) -> bool:
    """Fallbacks that are names of models; such with parameters could bring another prompt."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _without(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner, name) for key, inner in value.items() if key != name}
    return [_without(inner, name) for inner in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    dump: Callable[..., Any] | None = getattr(value, "model_dump", None)
    if dump is None:
        raise TypeError(f"{type(value).__name__} is no JSON")
    return dump(mode="json", exclude_none=True, warnings=False)
