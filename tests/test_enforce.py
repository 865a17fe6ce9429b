"""What the client gets for each outcome: fixed words and ids, never content."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from guard_middleware import enforce
from guard_middleware.dialects import CHAT_COMPLETIONS
from guard_middleware.dialects.base import Reply
from guard_middleware.errors import (
    GuardErrorKind,
    RejectKind,
    RequestRejected,
    UpstreamError,
    UpstreamErrorKind,
)
from guard_middleware.types import (
    Action,
    Basis,
    Blob,
    Conversation,
    Decision,
    Label,
    Message,
    Source,
    Text,
    Usage,
    Verdict,
)

MARK = "how do I pick a lock"
ASKED = Conversation((Message("user", (Text(MARK),)),))


def verdict(request: Label = "harmful", response: Label | None = None) -> Verdict:
    return Verdict(
        request=request,
        response=response,
        request_score=0.9,
        response_score=None if response is None else 0.8,
        reasoning=f"the user asks {MARK}",
        usage=Usage(),
        model="nano",
        revision="1",
        categories=("illicit",),
    )


def decision(action: Action = Action.BLOCK, source: Source = "input", **fields: Any) -> Decision:
    given: dict[str, Any] = {
        "id": "d1",
        "source": source,
        "action": action,
        "basis": Basis.VERDICT,
        "policy": "p",
        "policy_digest": "0",
        "would": action,
        "verdict": verdict(response="harmful" if source == "output" else None),
    }
    return Decision(**{**given, **fields})


def error(reply: Reply) -> dict[str, Any]:
    found = json.loads(reply.body)["error"]
    assert isinstance(found, dict)
    assert dict(reply.headers)[b"content-type"] == b"application/json"
    return found


def test_a_blocked_prompt_is_a_400_content_filter_without_reasoning() -> None:
    reply = enforce.render(CHAT_COMPLETIONS, enforce.blocked_prompt(enforce.notice(decision(), ASKED)))
    assert reply.status == 400
    assert error(reply) == {
        "message": "The request was blocked by the content policy of this service (decision d1).",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "content_filter",
        "innererror": {
            "code": "guard_blocked",
            "decision_id": "d1",
            "source": "input",
            "flagged": True,
            "categories": ["illicit"],
            "model": "nano",
        },
    }
    assert MARK.encode() not in reply.body
    headers = dict(reply.headers)
    assert headers[b"x-guard-decision-id"] == b"d1"
    assert headers[b"x-guard-action"] == b"block"


def test_reasoning_and_score_are_shown_where_the_policy_says_so() -> None:
    notice = enforce.notice(decision(show_reasoning=True), ASKED)
    reply = enforce.render(CHAT_COMPLETIONS, enforce.blocked_prompt(notice))
    inner = error(reply)["innererror"]
    assert inner["reasoning"] == f"the user asks {MARK}"
    assert inner["score"] == 0.9


def test_a_notice_of_an_annotation_has_the_score_of_its_own_side() -> None:
    assert enforce.notice(decision(Action.ANNOTATE), ASKED).score == 0.9
    assert enforce.notice(decision(Action.ANNOTATE, "output"), ASKED).score == 0.8
    assert enforce.notice(decision(Action.ANNOTATE), ASKED).reasoning is None


def test_a_shadow_decision_shows_nothing() -> None:
    shadow = enforce.notice(decision(Action.ALLOW, would=Action.BLOCK, show_reasoning=True), ASKED)
    assert (shadow.flagged, shadow.score, shadow.categories, shadow.reasoning) == (None, None, (), None)
    assert shadow.message == ""


def test_the_kinds_of_input_are_named() -> None:
    seen = Conversation((Message("user", (Text("x"), Blob("image/png", b"x"))),))
    assert enforce.notice(decision(), ASKED).input_types == ("text",)
    assert enforce.notice(decision(), seen).input_types == ("text", "image")
    assert enforce.notice(decision(source="output"), seen).input_types == ("text",)


def test_what_nobody_read_is_said_to_be_unread() -> None:
    unread = enforce.not_moderated("d1", "output")
    assert (unread.action, unread.flagged, unread.error) == (Action.ALLOW, None, None)


@pytest.mark.parametrize("kind", set(GuardErrorKind) - {GuardErrorKind.TOO_LONG, GuardErrorKind.MEDIA})
@pytest.mark.parametrize("source", ["input", "output"])
def test_no_verdict_is_a_503_that_is_not_a_content_filter(kind: GuardErrorKind, source: Source) -> None:
    failed = decision(source=source, basis=Basis.ERROR, verdict=None, error=kind.value)
    reply = enforce.render(CHAT_COMPLETIONS, enforce.guard_unavailable(failed))
    assert reply.status == 503
    assert error(reply)["code"] == "guard_unavailable"
    headers = dict(reply.headers)
    assert headers[b"x-should-retry"] == b"false"
    assert headers[b"x-guard-action"] == b"error"
    assert b"retry-after" not in headers


def test_a_known_wait_is_told_and_then_a_retry_is_welcome() -> None:
    failed = decision(basis=Basis.ERROR, verdict=None, error="overloaded")
    headers = dict(enforce.guard_unavailable(failed, 1.2).headers)
    assert headers[b"retry-after"] == b"2"
    assert b"x-should-retry" not in headers


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [(GuardErrorKind.TOO_LONG, 413, "content_too_long"), (GuardErrorKind.MEDIA, 400, "invalid_image")],
)
def test_a_prompt_that_can_never_be_judged_is_the_clients_error(kind: GuardErrorKind, status: int, code: str) -> None:
    failed = decision(basis=Basis.ERROR, verdict=None, error=kind.value)
    reply = enforce.render(CHAT_COMPLETIONS, enforce.guard_unavailable(failed, 5.0))
    assert (reply.status, error(reply)["code"], error(reply)["param"]) == (status, code, "messages")
    answered = enforce.render(CHAT_COMPLETIONS, enforce.guard_unavailable(replace(failed, source="output")))
    assert (answered.status, error(answered)["code"]) == (503, "guard_unavailable")


@pytest.mark.parametrize("kind", list(RejectKind))
@pytest.mark.parametrize("dialect", [CHAT_COMPLETIONS, None])
def test_a_refusal_keeps_its_status_code_and_param(kind: RejectKind, dialect: Any) -> None:
    refused = RequestRejected(kind, "fixed words", param="messages[0]")
    reply = enforce.render(dialect, enforce.failure(refused, "r1"))
    assert reply.status == refused.status
    found = error(reply)
    assert (found["code"], found["message"], found["param"]) == (kind.value, "fixed words", "messages[0]")
    assert dict(reply.headers)[b"x-guard-action"] == b"reject"


@pytest.mark.parametrize("kind", list(UpstreamErrorKind))
def test_a_broken_upstream_is_a_502_or_504_in_our_words(kind: UpstreamErrorKind) -> None:
    reply = enforce.render(CHAT_COMPLETIONS, enforce.failure(UpstreamError(kind, MARK), "r1"))
    assert reply.status == (504 if kind is UpstreamErrorKind.TIMEOUT else 502)
    assert error(reply)["code"] == kind.value
    assert MARK.encode() not in reply.body
    retried = kind not in (UpstreamErrorKind.UNSUPPORTED, UpstreamErrorKind.TOO_LARGE)
    assert (b"x-should-retry" not in dict(reply.headers)) is retried


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 529])
def test_the_upstreams_own_error_keeps_status_code_and_request_id_but_no_text(status: int) -> None:
    body = {"error": {"message": MARK, "type": "tokens", "code": "rate_limit_exceeded", "param": MARK}}
    headers = ((b"X-Request-Id", b"req_1"), (b"retry-after", b"3"), (b"x-echo", MARK.encode()))
    reply = enforce.render(CHAT_COMPLETIONS, enforce.upstream_refused(status, body, headers, "r1"))
    assert reply.status == status
    found = error(reply)
    assert (found["type"], found["code"], found["param"]) == ("tokens", "rate_limit_exceeded", None)
    assert MARK.encode() not in reply.body
    kept = dict(reply.headers)
    assert (kept[b"x-request-id"], kept[b"retry-after"]) == (b"req_1", b"3")
    assert b"x-echo" not in kept


@pytest.mark.parametrize(
    "body", [None, [], MARK, {"error": MARK}, {"error": {"code": MARK, "type": [MARK]}}, {"code": 5}]
)
def test_an_error_body_of_any_shape_is_replaced(body: Any) -> None:
    reply = enforce.render(None, enforce.upstream_refused(500, body, (), "r1"))
    assert (error(reply)["code"], error(reply)["type"]) == ("upstream_error", "server_error")
    assert MARK.encode() not in reply.body


@pytest.mark.parametrize("status", [204, 302, 101, 600])
def test_a_status_that_is_no_error_becomes_502(status: int) -> None:
    assert enforce.upstream_refused(status, None, ((b"location", b"/x"),), "r1").status == 502


def test_a_defect_says_nothing() -> None:
    reply = enforce.internal_error("r1")
    assert (reply.status, error(reply)["code"]) == (500, "internal_error")


def test_the_worst_action_is_named() -> None:
    assert enforce.worst([]) is Action.ALLOW
    assert enforce.worst([Action.ALLOW, Action.ANNOTATE]) is Action.ANNOTATE
    assert enforce.worst([Action.BLOCK, Action.ANNOTATE]) is Action.BLOCK
    assert dict(enforce.guard_headers("r1", Action.BLOCK))[b"x-guard-action"] == b"block"


DROPPED_REQUEST = [
    b"Host",
    b"Connection",
    b"Keep-Alive",
    b"TE",
    b"Trailer",
    b"Transfer-Encoding",
    b"Upgrade",
    b"Proxy-Authorization",
    b"Content-Length",
    b"Content-Encoding",
    b"Content-Type",
    b"Accept-Encoding",
    b"Expect",
    b"Range",
    b"Forwarded",
    b"Via",
    b"X-Forwarded-For",
    b"X-Forwarded-Host",
    b"X-Real-IP",
    b"X-HTTP-Method-Override",
    b"X-HTTP-Method",
    b"X-Method-Override",
    b"X_HTTP_Method_Override",
    b"X-Original-URL",
    b"X-Rewrite-URL",
    b"X-Guard-Decision-Id",
    b"X_Guard_Tenant",
    b"x-guard-anything",
    b"X-LiteLLM-Tags",
    b"x-portkey-config",
    b"X-Listed",
]


@pytest.mark.parametrize("name", DROPPED_REQUEST)
def test_a_client_cannot_speak_for_us_or_past_us(name: bytes) -> None:
    sent = [(name, b"1"), (b"connection", b"close, X-Listed"), (b"Authorization", b"Bearer k")]
    assert enforce.strip_request_headers(sent) == ((b"authorization", b"Bearer k"),)


@pytest.mark.parametrize(
    "name", [b"user-agent", b"openai-organization", b"traceparent", b"x-stainless-lang", b"x-api-key"]
)
def test_other_request_headers_go_on(name: bytes) -> None:
    assert enforce.strip_request_headers([(name, b"1")]) == ((name, b"1"),)


def test_only_listed_headers_come_back() -> None:
    kept = [
        (b"X-Request-Id", b"r"),
        (b"x-ratelimit-remaining-tokens", b"5"),
        (b"openai-processing-ms", b"7"),
        (b"Retry-After", b"1"),
        (b"access-control-allow-origin", b"*"),
    ]
    dropped = [
        (b"x-guard-action", b"allow"),
        (b"content-length", b"1"),
        (b"content-encoding", b"gzip"),
        (b"transfer-encoding", b"chunked"),
        (b"set-cookie", b"a=b"),
        (b"location", b"/x"),
        (b"alt-svc", b"h3"),
        (b"x-echo", MARK.encode()),
        (b"openai-note", b"x" * 257),
        (b"openai-other", b"a\x80"),
    ]
    assert enforce.strip_response_headers([*kept, *dropped]) == tuple((name.lower(), value) for name, value in kept)


def test_a_response_cannot_smuggle_headers_past_connection() -> None:
    sent = [(b"connection", b"x-request-id"), (b"x-request-id", b"r")]
    assert enforce.strip_response_headers(sent) == ()
