"""The guard's refusals as the errors that LiteLLM's proxy turns into each API's own.

``ProxyException`` is what the proxy sends as it is: status, type and headers survive, in a stream's first event too.
``HTTPException`` would turn the error of a stream into text after a 200.
"""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import HTTPException
from litellm.proxy._types import ProxyException

from guard_integrations.litellm.streams import StreamFailed
from guard_integrations.litellm.turn import Refused, Turn
from guard_middleware import enforce
from guard_middleware.dialects.base import Headers
from guard_middleware.errors import UpstreamError


class Refusal(ProxyException):  # type: ignore[misc]
    """``status_code`` is what LiteLLM's stream code asks an exception for."""

    def __init__(self, guardrail: Any, status: int, error: dict[str, Any], headers: Headers = ()) -> None:
        self.status_code = status
        detail = error.get("innererror") or error.get("details") or {}
        fields = {"guardrail_name": guardrail.guardrail_name, "error_code": error.get("code"), **detail}
        super().__init__(
            message=str(error.get("message", "The request was refused.")),
            type=str(error.get("type") or "invalid_request_error"),
            param=error.get("param"),
            code=status,
            openai_code=error.get("code"),
            headers={name.decode("latin-1"): value.decode("latin-1") for name, value in headers if _public(name)},
            provider_specific_fields={name: value for name, value in fields.items() if value is not None},
        )


def refused(guardrail: Any, turn: Turn, answer: Refused, data: dict[str, Any]) -> Exception:
    """What to raise in place of the answer: LiteLLM's own 200 for a soft refusal, else an error."""
    if answer.status == 200:
        return _soft(guardrail, turn, data)
    body = orjson.loads(answer.body)
    error = body.get("error") if isinstance(body, dict) else None
    return Refusal(guardrail, answer.status, error if isinstance(error, dict) else {}, answer.headers)


def failed(guardrail: Any, error: StreamFailed | UpstreamError | ValueError) -> Refusal:
    """For a stream that broke after its beginning, or what LiteLLM's types do not take; never quotes it."""
    if isinstance(error, StreamFailed):
        status = error.error.get("status")
        return Refusal(guardrail, status if isinstance(status, int) else 502, error.error)
    return Refusal(guardrail, 502, {"message": "The model service broke off its answer.", "type": "server_error"})


def as_http(error: Exception) -> Exception:
    """The same where LiteLLM knows only FastAPI's exception: its MCP gateway, and errors that a hook replaces."""
    if not isinstance(error, Refusal):
        return error
    detail = {"error": error.message, "type": error.type, **(error.provider_specific_fields or {})}
    replaced: Exception = HTTPException(error.status_code, detail, dict(error.headers))
    return replaced


def not_served(guardrail: Any, kind: str) -> Refusal:
    """For a call type that nobody judges here."""
    message = f"This service does not serve {kind} requests: their content cannot be moderated."
    return Refusal(guardrail, 403, {"message": message, "type": "invalid_request_error", "code": "not_served"})


def _soft(guardrail: Any, turn: Turn, data: dict[str, Any]) -> Exception:
    from litellm.exceptions import ModifyResponseException

    record = turn.record
    assert record is not None
    assert record.conversation is not None
    notice = enforce.notice(record.calls[0].decision, record.conversation)
    model = data.get("model")
    answered: Exception = ModifyResponseException(
        message=notice.message,
        model=model if isinstance(model, str) else "",
        request_data=data,
        guardrail_name=guardrail.guardrail_name,
    )
    return answered


def _public(name: bytes) -> bool:
    return name.startswith(b"x-guard-") or name in (b"x-should-retry", b"retry-after")
