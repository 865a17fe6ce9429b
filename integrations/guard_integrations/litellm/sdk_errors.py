"""The guard's refusals as the exceptions that callers of LiteLLM's SDK catch.

LiteLLM and its Router retry by an exception's class and status: a 400 never, a 503 as often as the caller asked.
``num_retries`` 0 keeps a Router from adding its own retries, as ``x-should-retry: false`` does for HTTP clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
import litellm
import orjson
from litellm.exceptions import MidStreamFallbackError

from guard_integrations.litellm.relay import Whole
from guard_middleware.dialects.base import Headers
from guard_middleware.enforce import ACTION, DECISION_ID
from guard_middleware.errors import UpstreamError

PROVIDER = "guard_middleware"
#: public error codes of a prompt that the policy blocks
_BLOCKED = frozenset({"content_filter", "guard_blocked"})
_URL = "http://guard.invalid"


class GuardBlocked(litellm.ContentPolicyViolationError):  # type: ignore[misc]
    """The policy blocks the prompt; ``decision_id`` names the decision in the log."""

    decision_id: str = ""


class GuardRefused(litellm.BadRequestError):  # type: ignore[misc]
    """The request cannot be judged as it stands; the message says what to change."""

    decision_id: str = ""


class GuardUnavailable(litellm.ServiceUnavailableError):  # type: ignore[misc]
    """There is no verdict, so nothing was let through."""

    decision_id: str = ""


class AnswerUnreadable(litellm.BadGatewayError):  # type: ignore[misc]
    """The model's answer cannot be judged or is broken; nothing of it is released."""

    decision_id: str = ""


def of(answer: Whole, model: str) -> Exception:
    """The exception for an answer of the guard's with an error status."""
    return _error(answer.status, answer.headers, _inner(_json(answer.body)), model)


def is_block(answer: Whole) -> bool:
    """Whether the policy blocks, by whichever of its shapes."""
    return dict(answer.headers).get(ACTION) == b"block"


def in_stream(event: Any, model: str) -> Exception | None:
    """The exception for an event that carries an error in place of an answer."""
    if not isinstance(event, dict) or "choices" in event:
        return None
    kind = event.get("type")
    if kind == "response.failed":
        error = event.get("response", {}).get("error") or {}
    elif kind == "error" or (kind is None and isinstance(event.get("error"), dict)):
        error = _inner(event)
    else:
        return None
    status = error.get("status") or error.get("status_code")
    return _error(status if isinstance(status, int) else 503, (), error, model)


def broken(error: UpstreamError, model: str) -> Exception:
    """The exception for an answer that broke off on its way through the guard."""
    return _error(502, (), {"message": error.message, "code": error.kind.value}, model)


def unreadable(message: str, model: str) -> Exception:
    return GuardRefused(message, model, PROVIDER)


def forgotten(model: str) -> Exception:
    """For an answer whose prompt the guard does not know (any more)."""
    return GuardUnavailable("There are too many calls under way to judge this answer.", PROVIDER, model, num_retries=0)


def after(error: Exception, shown: str) -> Exception:
    """LiteLLM's error of a stream, from which a Router goes on elsewhere after what the caller really has."""
    if isinstance(error, MidStreamFallbackError):
        error.generated_content, error.is_pre_first_chunk = shown, not shown
    return error


def _error(status: int, headers: Headers, error: Mapping[str, Any], model: str) -> Exception:
    plain = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
    response = httpx.Response(status, headers=plain, request=httpx.Request("POST", _URL))
    message = str(error.get("message") or "The guard refused this.")
    blocked = plain.get(ACTION.decode()) == "block" or error.get("code") in _BLOCKED
    made: Any
    if status == 503:
        made = GuardUnavailable(message, PROVIDER, model, response=response, num_retries=0)
    elif status >= 500:
        made = AnswerUnreadable(message, PROVIDER, model, response=response, num_retries=0)
    elif blocked:
        made = GuardBlocked(message, model, PROVIDER, response=response, body=dict(error))
    else:
        made = GuardRefused(message, model, PROVIDER, response=response, body=dict(error))
    made.decision_id = plain.get(DECISION_ID.decode(), "")
    return made  # type: ignore[no-any-return]


def _inner(body: Any) -> Mapping[str, Any]:
    error = body.get("error") if isinstance(body, dict) else None
    return error if isinstance(error, dict) else body if isinstance(body, dict) else {}


def _json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
