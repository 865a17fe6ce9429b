"""What the client gets for each outcome: statuses, public words, headers. Pure; the dialect gives it its shape.

Public text is fixed words, ids and numbers. It never holds content, and the guard's reasoning only where the
decision says so. Every name of a header that this project reads or sets is here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from guard_middleware.dialects.base import Dialect, Headers, Notice, PublicError, Reply
from guard_middleware.dialects.openai_error import openai_error
from guard_middleware.errors import GuardErrorKind, RejectKind, RequestRejected, UpstreamError, UpstreamErrorKind
from guard_middleware.strictjson import JSONValue
from guard_middleware.types import Action, Basis, Conversation, Decision, Source

#: id of the decision (of the request, where none was made), on every answer
DECISION_ID = b"x-guard-decision-id"
#: allow, annotate, block, reject (refused before a verdict) or error
ACTION = b"x-guard-action"
#: keeps the OpenAI and Anthropic SDKs from their two silent retries
NO_RETRY = (b"x-should-retry", b"false")

_BLOCKED: dict[Source, str] = {
    "input": "The request was blocked by the content policy of this service",
    "output": "The answer was blocked by the content policy of this service",
}
_UPSTREAM: dict[UpstreamErrorKind, tuple[int, str]] = {
    UpstreamErrorKind.UNREACHABLE: (502, "The model service cannot be reached"),
    UpstreamErrorKind.TIMEOUT: (504, "The model service did not answer in time"),
    UpstreamErrorKind.RESET: (502, "The model service broke off its answer"),
    UpstreamErrorKind.MALFORMED: (502, "The model service gave an answer that is not valid"),
    UpstreamErrorKind.TOO_LARGE: (502, "The model service gave an answer that is too large"),
    UpstreamErrorKind.UNSUPPORTED: (502, "The model service gave an answer that cannot be moderated"),
}
#: guard errors that the request itself causes: the same request can never succeed, so no 503
_REQUEST_FAULTS: dict[str, tuple[int, str, str]] = {
    GuardErrorKind.TOO_LONG: (413, "content_too_long", "The request is longer than can be moderated"),
    GuardErrorKind.MEDIA: (400, "invalid_image", "An image of the request could not be moderated"),
}
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def notice(decision: Decision, conversation: Conversation) -> Notice:
    """What the client may know of a decision about (an answer to) ``conversation``.

    A verdict that policy does not act on (shadow) is not shown. The score is left out of a block, so that nobody
    can climb it, unless the policy shows the reasoning too.
    """
    verdict = decision.verdict if decision.would is decision.action else None
    label = verdict.label(decision.source) if verdict else None
    score = verdict.score(decision.source) if verdict else None
    blocked = decision.action is Action.BLOCK
    return Notice(
        id=decision.id,
        source=decision.source,
        action=decision.action,
        basis=decision.basis,
        message=f"{_BLOCKED[decision.source]} (decision {decision.id})." if blocked else "",
        flagged=label == "harmful" if label else None,
        score=None if blocked and not decision.show_reasoning else score,
        categories=verdict.categories if verdict and label == "harmful" else (),
        model=verdict.model if verdict else "",
        input_types=("text", "image") if decision.source == "input" and conversation.blobs() else ("text",),
        error=decision.error,
        reasoning=verdict.reasoning if verdict and decision.show_reasoning else None,
    )


def not_moderated(id: str, source: Source) -> Notice:
    """The notice for what the operator's policy leaves unread: released, and said to be unread."""
    return Notice(id, source, Action.ALLOW, Basis.COVERAGE, "", None, None, (), "", ("text",))


def blocked_prompt(notice: Notice) -> PublicError:
    """400 ``content_filter``: never a 5xx, which SDKs retry and dashboards count as an outage."""
    detail: dict[str, JSONValue] = {
        "code": "guard_blocked",
        "decision_id": notice.id,
        "source": notice.source,
        "flagged": notice.flagged,
        "categories": list(notice.categories),
        "model": notice.model,
    }
    if notice.reasoning is not None:
        detail |= {"score": notice.score, "reasoning": notice.reasoning}
    return PublicError(
        status=400,
        code="content_filter",
        type="invalid_request_error",
        message=notice.message,
        about_prompt=True,
        detail=detail,
        headers=guard_headers(notice.id, "block"),
    )


def guard_unavailable(decision: Decision, retry_after: float | None = None) -> PublicError:
    """503 ``guard_unavailable`` for a decision that blocks because there is no verdict.

    SDKs are told not to retry, except where the guard said when (``retry_after``, seconds): then ``retry-after``
    is all they get, and they keep to it. A prompt that can never be judged is a 4xx.
    """
    fault = _REQUEST_FAULTS.get(decision.error or "") if decision.source == "input" else None
    headers = guard_headers(decision.id, "error")
    if fault is not None:
        status, code, message = fault
        return PublicError(
            status, code, "invalid_request_error", f"{message}.", about_prompt=True, headers=(*headers, NO_RETRY)
        )
    retry = NO_RETRY if retry_after is None else (b"retry-after", str(max(1, math.ceil(retry_after))).encode())
    message = f"The content could not be moderated, so it was not let through (decision {decision.id})."
    return PublicError(503, "guard_unavailable", "server_error", message, headers=(*headers, retry))


def failure(error: RequestRejected | UpstreamError, id: str) -> PublicError:
    """A refusal before any verdict (4xx), or an upstream that broke (502, 504): our words, never theirs."""
    if isinstance(error, RequestRejected):
        kind = "not_found_error" if error.kind is RejectKind.NOT_FOUND else "invalid_request_error"
        return PublicError(
            status=error.status,
            code=error.kind.value,
            type=kind,
            message=error.message,
            param=error.param,
            headers=guard_headers(id, "reject"),
        )
    status, message = _UPSTREAM[error.kind]
    # Retrying an answer that cannot be moderated costs tokens and ends the same way.
    lasting = error.kind in (UpstreamErrorKind.UNSUPPORTED, UpstreamErrorKind.TOO_LARGE)
    headers = guard_headers(id, "error") + ((NO_RETRY,) if lasting else ())
    return PublicError(status, error.kind.value, "server_error", f"{message}.", headers=headers)


def upstream_refused(status: int, body: JSONValue, headers: Headers, id: str) -> PublicError:
    """The upstream's own 4xx or 5xx: status, type and code are kept where they are short words, its text never.

    ``body`` is its parsed body or None; ``headers`` its raw headers. A status below 400 becomes 502.
    """
    inner = body.get("error") if isinstance(body, dict) else None
    said = inner if isinstance(inner, dict) else body if isinstance(body, dict) else {}
    kept = status if 400 <= status <= 599 else 502
    default = "invalid_request_error" if kept < 500 else "server_error"
    return PublicError(
        status=kept,
        code=_word(said.get("code")) or "upstream_error",
        type=_word(said.get("type")) or default,
        message=f"The model service refused the request (status {status}).",
        headers=(*strip_response_headers(headers), *guard_headers(id, "error")),
    )


def internal_error(id: str) -> Reply:
    """500 for a defect of ours; nothing is known to be safe to say."""
    headers = (*guard_headers(id, "error"), NO_RETRY)
    return openai_error(PublicError(500, "internal_error", "server_error", "Internal error.", headers=headers))


def guard_headers(id: str, action: str) -> Headers:
    """The headers that every answer carries; ``action`` is an ``Action``, ``reject`` or ``error``."""
    return (DECISION_ID, id.encode("latin-1", "replace")), (ACTION, str(action).encode("latin-1"))


def worst(actions: Iterable[Action]) -> Action:
    """The action that one header names for several decisions: block before annotate before allow."""
    found = set(actions)
    return Action.BLOCK if Action.BLOCK in found else Action.ANNOTATE if Action.ANNOTATE in found else Action.ALLOW


def render(dialect: Dialect | None, error: PublicError) -> Reply:
    """The error as a reply in the dialect's shape, or, where none is known, in OpenAI's."""
    return dialect.error(error) if dialect is not None else openai_error(error)


def _word(value: object) -> str | None:
    return value if isinstance(value, str) and _WORD.fullmatch(value) else None


_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)
#: what a client may not say to the upstream: body framing is ours, and so are hosts, routes and the guard
_REQUEST_DROPPED = _HOP_BY_HOP | frozenset(
    b"accept accept-encoding content-encoding content-length content-md5 content-type digest content-digest "
    b"repr-digest expect forwarded host range if-range if-match if-none-match if-modified-since if-unmodified-since "
    b"max-forwards via x-real-ip x-http-method x-http-method-override x-method-override x-original-url x-original-uri "
    b"x-rewrite-url x-original-host x-host true-client-ip x-policy-id".split()
)
#: our own, internal hops', and those with which gateways behind us let a caller choose routes, caches and guards
_REQUEST_DROPPED_PREFIXES = (
    b"x-forwarded-", b"x-envoy-", b"x-litellm-", b"x-portkey-", b"helicone-", b"cf-aig-", b"x-ai-eg-", b"x-gateway-",
    b"x-higress-", b"x-amzn-bedrock-",
)  # fmt: skip
_REQUEST_GUARD = re.compile(rb"guard|moderat|safety|content-?filter")
#: an answer's headers are an allow-list: any other could carry text that nobody screened
_RESPONSE_KEPT = frozenset(
    b"cache-control request-id retry-after retry-after-ms server-timing traceresponse vary x-request-id "
    b"x-should-retry allow".split()
)
_RESPONSE_KEPT_PREFIXES = (
    b"access-control-",
    b"anthropic-ratelimit-",
    b"openai-",
    b"ratelimit-",
    b"x-ratelimit-",
)
_VALUE = re.compile(rb"[ -~]{0,256}")


def strip_request_headers(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """What goes on to the upstream; content type, encoding and length are for the carrier to set."""
    pairs = [(name.lower(), value) for name, value in headers]
    dropped = _REQUEST_DROPPED | _named_by_connection(pairs)
    return tuple(
        (name, value)
        for name, value in pairs
        if (plain := name.replace(b"_", b"-")) not in dropped
        and not plain.startswith(_REQUEST_DROPPED_PREFIXES)
        and not _REQUEST_GUARD.search(plain)
    )


def strip_response_headers(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """What comes back to the client; content type and length are for the carrier to set."""
    pairs = [(name.lower(), value) for name, value in headers]
    dropped = _named_by_connection(pairs)
    return tuple(
        (name, value)
        for name, value in pairs
        if (name in _RESPONSE_KEPT or name.startswith(_RESPONSE_KEPT_PREFIXES))
        and name not in dropped
        and _VALUE.fullmatch(value)
    )


def _named_by_connection(pairs: list[tuple[bytes, bytes]]) -> frozenset[bytes]:
    listed = b",".join(value for name, value in pairs if name == b"connection")
    return frozenset(name.strip().lower() for name in listed.split(b",") if name.strip())
