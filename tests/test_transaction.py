"""The state machine alone: what it commands for what it is fed, and what it keeps back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from guard_middleware.config import Config, OutputPolicy, Policy, SourcePolicy
from guard_middleware.dialects import CHAT_COMPLETIONS
from guard_middleware.dialects.base import Options
from guard_middleware.errors import GuardError, RejectKind, RequestRejected, UpstreamError, UpstreamErrorKind
from guard_middleware.limits import Limits
from guard_middleware.policy import PolicySet
from guard_middleware.transaction import Forward, Judged, Moderate, Phase, Respond, Transaction
from guard_middleware.types import Usage, Verdict

JSON = ((b"content-type", b"application/json"),)
SSE = ((b"content-type", b"text/event-stream"),)
ANSWER = "Turn the tension wrench gently."


def transaction(limits: Limits | None = None, **policy: Any) -> Transaction:
    limits = limits or Limits()
    tx = Transaction("gd_1", "POST", "/v1/chat/completions", limits=limits, created=0)
    config = Config(policies={"p": Policy(**policy)}, default_policy="p")
    tx.routed(CHAT_COMPLETIONS, Options(), PolicySet(config).resolve(path="/v1/chat/completions"))
    return tx


def parsed(**extra: Any) -> Any:
    body = {"model": "m", "messages": [{"role": "user", "content": "how do I open it?"}], **extra}
    return CHAT_COMPLETIONS.parse_request(body, Limits(), Options())


def verdict(request: str = "unharmful", response: str | None = None) -> Verdict:
    def score(label: str) -> float:
        return 0.9 if label == "harmful" else 0.1

    return Verdict(
        request=request,  # type: ignore[arg-type]
        response=response,  # type: ignore[arg-type]
        request_score=score(request),
        response_score=None if response is None else score(response),
        reasoning="a reason",
        usage=Usage(1, 2, 1),
        model="g",
        revision="0",
    )


def judge(tx: Transaction, command: Any, *outcomes: Verdict | GuardError) -> Any:
    assert isinstance(command, Moderate)
    return tx.judged([Judged(call, o, 0.1) for call, o in zip(command.calls, outcomes, strict=True)])


def completion(*texts: str) -> bytes:
    choices = [
        {"index": n, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        for n, text in enumerate(texts)
    ]
    return json.dumps({"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": choices}).encode()


def events(text: str, *, done: bool = True) -> bytes:
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    deltas: list[Any] = [({"role": "assistant", "content": ""}, None), *(({"content": c}, None) for c in text)]
    chunks = [{**head, "choices": [{"index": 0, "delta": d, "finish_reason": f}]} for d, f in [*deltas, ({}, "stop")]]
    body = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)
    return body + (b"data: [DONE]\n\n" if done else b"")


def test_a_clean_exchange_asks_forwards_asks_and_releases() -> None:
    tx = transaction()
    command = tx.request(parsed())
    assert isinstance(command, Moderate)
    assert [call.source for call in command.calls] == ["input"]
    command = judge(tx, command, verdict())
    assert isinstance(command, Forward)
    assert tx.upstream_called
    tx.upstream_head(200, JSON)
    body = completion(ANSWER)
    for byte in body:  # whatever the pieces, nothing comes back before the end
        assert tx.upstream_data(bytes([byte])) is None
    command = tx.upstream_end()
    assert isinstance(command, Moderate)
    assert command.calls[0].conversation.answer is not None
    command = judge(tx, command, verdict(response="unharmful"))
    assert isinstance(command, Respond)
    assert command.reply.status == 200
    assert json.loads(command.reply.body)["choices"][0]["message"]["content"] == ANSWER
    record = tx.record()
    assert (record.outcome, record.status, len(record.calls)) == ("allowed", 200, 2)
    assert record.released_bytes == len(command.reply.body)


def test_a_harmful_request_never_reaches_the_upstream() -> None:
    tx = transaction()
    command = judge(tx, tx.request(parsed()), verdict("harmful"))
    assert isinstance(command, Respond)
    assert command.reply.status == 400
    assert json.loads(command.reply.body)["error"]["code"] == "content_filter"
    record = tx.record()
    assert (record.outcome, record.upstream_called, record.released_bytes) == ("blocked", False, 0)


def test_a_soft_policy_blocks_with_an_ordinary_answer() -> None:
    tx = transaction(block_style="soft")
    command = judge(tx, tx.request(parsed()), verdict("harmful"))
    assert command.reply.status == 200
    assert json.loads(command.reply.body)["choices"][0]["finish_reason"] == "stop"
    assert (b"x-guard-action", b"block") in command.reply.headers


@pytest.mark.parametrize("kind", ["timeout", "overloaded", "unavailable", "unparseable", "truncated", "internal"])
def test_a_guard_error_on_input_is_503_and_stops_there(kind: str) -> None:
    tx = transaction()
    command = judge(tx, tx.request(parsed()), GuardError(kind))
    assert command.reply.status == 503
    assert json.loads(command.reply.body)["error"]["code"] == "guard_unavailable"
    assert not tx.upstream_called
    assert (tx.record().outcome, tx.record().error) == ("guard_error", kind)


def answered(tx: Transaction, body: bytes, *outcomes: Verdict | GuardError, stream: bool = False, **extra: Any) -> Any:
    command = judge(tx, tx.request(parsed(stream=stream, **extra)), verdict())
    assert isinstance(command, Forward)
    tx.upstream_head(200, SSE if stream else JSON)
    tx.upstream_data(body)
    return judge(tx, tx.upstream_end(), *outcomes)


@pytest.mark.parametrize("stream", [False, True])
def test_a_harmful_answer_is_replaced_and_its_bytes_are_dropped(stream: bool) -> None:
    tx = transaction()
    body = events(ANSWER) if stream else completion(ANSWER)
    command = answered(tx, body, verdict(response="harmful"), stream=stream)
    assert command.reply.status == 200
    assert b"content_filter" in command.reply.body
    assert b"wrench" not in command.reply.body
    assert tx.record().outcome == "blocked"


@pytest.mark.parametrize("stream", [False, True])
def test_a_guard_error_on_output_is_503_and_releases_nothing(stream: bool) -> None:
    tx = transaction()
    body = events(ANSWER) if stream else completion(ANSWER)
    command = answered(tx, body, GuardError("timeout"), stream=stream)
    assert command.reply.status == 503
    assert b"wrench" not in command.reply.body
    assert tx.record().released_bytes == 0


def test_each_choice_is_judged_and_only_the_harmful_one_is_replaced() -> None:
    tx = transaction()
    body = completion("Bread needs an hour.", ANSWER)
    command = answered(tx, body, verdict(response="unharmful"), verdict(response="harmful"), n=2)
    choices = json.loads(command.reply.body)["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["stop", "content_filter"]
    assert choices[0]["message"]["content"] == "Bread needs an hour."
    assert choices[1]["message"]["content"] is None


def test_one_unjudged_choice_withholds_the_others() -> None:
    tx = transaction()
    body = completion("Bread needs an hour.", "Yeast is alive.")
    command = answered(tx, body, verdict(response="unharmful"), GuardError("unavailable"), n=2)
    assert command.reply.status == 503
    assert b"Bread" not in command.reply.body


def test_shadow_lets_pass_and_records_what_it_would_have_done() -> None:
    tx = transaction(input=SourcePolicy(on_harmful="shadow"), output=OutputPolicy(on_harmful="shadow"))
    command = judge(tx, tx.request(parsed()), verdict("harmful"))
    assert isinstance(command, Forward)
    decision = tx.record().calls[0].decision
    assert (decision.action, decision.would) == ("allow", "block")


def test_annotate_passes_the_answer_with_the_moderation_object() -> None:
    tx = transaction(output=OutputPolicy(on_harmful="annotate"))
    command = answered(tx, completion(ANSWER), verdict(response="harmful"))
    value = json.loads(command.reply.body)
    assert value["choices"][0]["message"]["content"] == ANSWER
    assert "moderation" in value
    assert (b"x-guard-action", b"annotate") in command.reply.headers


def test_an_unguarded_source_is_not_asked_about() -> None:
    tx = transaction(input=SourcePolicy(moderate=False), output=OutputPolicy(moderate=False))
    assert isinstance(tx.request(parsed()), Forward)
    tx.upstream_head(200, JSON)
    tx.upstream_data(completion(ANSWER))
    command = tx.upstream_end()
    assert isinstance(command, Respond)
    assert ANSWER.encode() in command.reply.body
    assert tx.record().calls == ()


def forwarded(tx: Transaction, *, stream: bool = False) -> Transaction:
    assert isinstance(judge(tx, tx.request(parsed(stream=stream)), verdict()), Forward)
    return tx


@pytest.mark.parametrize(
    ("status", "headers", "stream", "body", "kind"),
    [
        (200, (*JSON, (b"Content-Encoding", b"gzip")), False, b"x", UpstreamErrorKind.UNSUPPORTED),
        (200, SSE, False, b"", UpstreamErrorKind.MALFORMED),
        (200, JSON, True, b"{}", UpstreamErrorKind.MALFORMED),
        (200, JSON, False, b"{", UpstreamErrorKind.MALFORMED),
        (200, JSON, False, b'{"choices": [], "choices": []}', UpstreamErrorKind.MALFORMED),
        (206, JSON, False, completion(ANSWER), UpstreamErrorKind.UNSUPPORTED),
        (200, SSE, True, events(ANSWER, done=False), UpstreamErrorKind.RESET),
        (200, SSE, True, b"data: \xff\n\n", UpstreamErrorKind.MALFORMED),
    ],
)
def test_an_answer_that_cannot_be_screened_is_an_upstream_error(
    status: int, headers: Any, stream: bool, body: bytes, kind: UpstreamErrorKind
) -> None:
    tx = forwarded(transaction(), stream=stream)
    with pytest.raises(UpstreamError) as caught:  # noqa: PT012
        tx.upstream_head(status, headers)
        tx.upstream_data(body)
        tx.upstream_end()
    assert caught.value.kind is kind
    reply = tx.fail(caught.value).reply
    assert reply.status == 502
    assert b"wrench" not in reply.body
    assert tx.record().released_bytes == 0


def test_an_answer_beyond_the_limit_is_dropped() -> None:
    tx = forwarded(transaction(Limits(answer_bytes=100)))
    tx.upstream_head(200, JSON)
    with pytest.raises(UpstreamError) as caught:
        tx.upstream_data(b"x" * 101)
    assert caught.value.kind is UpstreamErrorKind.TOO_LARGE


def test_the_upstreams_own_error_keeps_its_status_and_loses_its_words() -> None:
    tx = forwarded(transaction())
    tx.upstream_head(429, (*JSON, (b"retry-after", b"7"), (b"x-secret", b"wrench")))
    tx.upstream_data(b'{"error": {"message": "quote: wrench", "code": "rate_limit_exceeded"}}')
    reply = tx.upstream_end().reply  # type: ignore[union-attr]
    assert reply.status == 429
    assert b"rate_limit_exceeded" in reply.body
    assert b"wrench" not in reply.body
    assert (b"retry-after", b"7") in reply.headers
    assert b"x-secret" not in dict(reply.headers)


def test_a_rejected_request_is_recorded_as_such() -> None:
    tx = transaction()
    reply = tx.fail(RequestRejected(RejectKind.BODY_TOO_LARGE, "too much")).reply
    assert reply.status == 413
    assert (tx.record().outcome, tx.record().error) == ("rejected", "body_too_large")


def test_an_aborted_transaction_holds_nothing_and_says_why() -> None:
    tx = forwarded(transaction())
    tx.upstream_head(200, JSON)
    tx.upstream_data(b"half")
    tx.abort("client_disconnected")
    assert tx.phase is Phase.CLOSED
    assert (tx.record().outcome, tx.record().error) == ("aborted", "client_disconnected")


def test_out_of_order_feeds_are_defects_and_never_release() -> None:
    tx = transaction()
    with pytest.raises(RuntimeError):
        tx.judged([])
    tx.request(parsed())
    with pytest.raises(RuntimeError):
        tx.request(parsed())
