"""The state machine alone: what it commands for what it is fed, and what it keeps back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from guard_middleware.commands import Ask, Begin, Call, End, Forward, Judged, Respond, Send, Stop
from guard_middleware.config import Config, OutputPolicy, Policy, SourcePolicy, StreamRules
from guard_middleware.dialects import CHAT_COMPLETIONS
from guard_middleware.dialects.base import Options
from guard_middleware.errors import GuardError, RejectKind, RequestRejected, UpstreamError, UpstreamErrorKind
from guard_middleware.limits import Limits
from guard_middleware.policy import PolicySet
from guard_middleware.transaction import Phase, Transaction
from guard_middleware.types import Judging, Usage, Verdict

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


def judge(tx: Transaction, commands: list[Any], *outcomes: Verdict | GuardError) -> list[Any]:
    """Answers the questions among ``commands``, in order; what the last answer (and the others) commanded."""
    asked = [command for command in commands if isinstance(command, Ask)]
    out: list[Any] = []
    for ask, outcome in zip(asked, outcomes, strict=True):
        out += tx.judged(Judged(ask.call, outcome, 0.1))
    return out


def only(commands: list[Any]) -> Any:
    """The one command."""
    assert len(commands) == 1, commands
    return commands[0]


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
    asked = only(tx.request(parsed()))
    assert asked.call.source == "input"
    assert isinstance(only(judge(tx, [asked], verdict())), Forward)
    assert tx.upstream_called
    tx.upstream_head(200, JSON)
    body = completion(ANSWER)
    for byte in body:  # whatever the pieces, nothing comes back before the end
        assert tx.upstream_data(bytes([byte])) == []
    asked = only(tx.upstream_end())
    assert asked.call.conversation.answer is not None
    command = only(judge(tx, [asked], verdict(response="unharmful")))
    assert isinstance(command, Respond)
    assert command.reply.status == 200
    assert json.loads(command.reply.body)["choices"][0]["message"]["content"] == ANSWER
    record = tx.record()
    assert (record.outcome, record.status, len(record.calls)) == ("allowed", 200, 2)
    assert record.released_bytes == len(command.reply.body)


def test_each_source_is_judged_in_the_mode_of_its_policy() -> None:
    hybrid = SourcePolicy(mode="hybrid", think_between=(0.2, 0.8))
    tx = transaction(input=hybrid, output=OutputPolicy(mode="label"))
    asked = only(tx.request(parsed()))
    assert asked.call.rules.judging == Judging("hybrid", 0.2, 0.8)
    judge(tx, [asked], verdict())
    tx.upstream_head(200, JSON)
    tx.upstream_data(completion(ANSWER))
    assert only(tx.upstream_end()).call.rules.judging == Judging("label")


def test_a_harmful_request_never_reaches_the_upstream() -> None:
    tx = transaction()
    command = only(judge(tx, tx.request(parsed()), verdict("harmful")))
    assert isinstance(command, Respond)
    assert command.reply.status == 400
    assert json.loads(command.reply.body)["error"]["code"] == "content_filter"
    record = tx.record()
    assert (record.outcome, record.upstream_called, record.released_bytes) == ("blocked", False, 0)


def test_a_soft_policy_blocks_with_an_ordinary_answer() -> None:
    tx = transaction(block_style="soft")
    command = only(judge(tx, tx.request(parsed()), verdict("harmful")))
    assert command.reply.status == 200
    assert json.loads(command.reply.body)["choices"][0]["finish_reason"] == "stop"
    assert (b"x-guard-action", b"block") in command.reply.headers


@pytest.mark.parametrize("kind", ["timeout", "overloaded", "unavailable", "unparseable", "truncated", "internal"])
def test_a_guard_error_on_input_is_503_and_stops_there(kind: str) -> None:
    tx = transaction()
    command = only(judge(tx, tx.request(parsed()), GuardError(kind, revision="r1")))
    assert tx.record().calls[0].revision == "r1"
    assert command.reply.status == 503
    assert json.loads(command.reply.body)["error"]["code"] == "guard_unavailable"
    assert not tx.upstream_called
    assert (tx.record().outcome, tx.record().error) == ("guard_error", kind)


def answered(tx: Transaction, body: bytes, *outcomes: Verdict | GuardError, stream: bool = False, **extra: Any) -> Any:
    assert isinstance(only(judge(tx, tx.request(parsed(stream=stream, **extra)), verdict())), Forward)
    tx.upstream_head(200, SSE if stream else JSON)
    tx.upstream_data(body)
    return judge(tx, tx.upstream_end(), *outcomes)[-1]


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
    command = only(judge(tx, tx.request(parsed()), verdict("harmful")))
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
    assert isinstance(only(tx.request(parsed())), Forward)
    tx.upstream_head(200, JSON)
    tx.upstream_data(completion(ANSWER))
    command = only(tx.upstream_end())
    assert isinstance(command, Respond)
    assert ANSWER.encode() in command.reply.body
    assert tx.record().calls == ()


def forwarded(tx: Transaction, *, stream: bool = False, **extra: Any) -> Transaction:
    assert isinstance(only(judge(tx, tx.request(parsed(stream=stream, **extra)), verdict())), Forward)
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
    reply = tx.fail(caught.value)[-1].reply
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
    reply = only(tx.upstream_end()).reply
    assert reply.status == 429
    assert b"rate_limit_exceeded" in reply.body
    assert b"wrench" not in reply.body
    assert (b"retry-after", b"7") in reply.headers
    assert b"x-secret" not in dict(reply.headers)


def test_a_rejected_request_is_recorded_as_such() -> None:
    tx = transaction()
    reply = only(tx.fail(RequestRejected(RejectKind.BODY_TOO_LARGE, "too much"))).reply
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
        tx.judged(Judged(Call("gd_1.input", "input", None, parsed().conversation, SourcePolicy()), verdict(), 0.1))
    tx.request(parsed())
    with pytest.raises(RuntimeError):
        tx.request(parsed())


# -- streams that leave before their end --

WINDOW = {
    "output": OutputPolicy(stream=StreamRules(mode="window", first_window=16, last_window=16, growth=1, overlap=8))
}
ASYNC = {"output": OutputPolicy(stream=StreamRules(mode="async", leak_bound=10))}
TEXT = "Bread needs flour, water, salt and an hour of patience."


def chunk(text: str) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    value = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def streaming(**policy: Any) -> Transaction:
    tx = forwarded(transaction(**policy), stream=True)
    tx.upstream_head(200, SSE)
    return tx


def said(commands: list[Any]) -> str:
    """The content that a client reads out of what is sent."""
    data = b"".join(c.data if isinstance(c, Send) else c.reply.body for c in commands if isinstance(c, Send | Respond))
    lines = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: {")]
    deltas = [json.loads(line)["choices"] for line in lines]
    return "".join(choices[0]["delta"].get("content") or "" for choices in deltas if choices)


def asks(commands: list[Any]) -> list[Ask]:
    return [command for command in commands if isinstance(command, Ask)]


def text_of(ask: Ask) -> str:
    assert ask.call.conversation.answer is not None
    return "".join(part.text for part in ask.call.conversation.answer.parts)  # type: ignore[union-attr]


def test_a_window_leaves_after_its_verdict_and_overlaps_the_next() -> None:
    tx = streaming(**WINDOW)
    commands = [c for letter in TEXT[:20] for c in tx.upstream_data(chunk(letter))]
    first = only(asks(commands))
    assert (text_of(first), said(commands)) == (TEXT[:16], "")
    commands = judge(tx, [first], verdict(response="unharmful"))
    assert isinstance(commands[0], Begin)
    assert said(commands) == TEXT[:16]
    commands = [c for letter in TEXT[20:32] for c in tx.upstream_data(chunk(letter))]
    second = only(asks(commands))
    assert text_of(second) == TEXT[8:32]
    assert said(commands) == ""


def test_a_harmful_window_cuts_the_stream_and_stops_the_upstream() -> None:
    tx = streaming(**WINDOW)
    commands = [c for letter in TEXT[:40] for c in tx.upstream_data(chunk(letter))]
    commands = judge(tx, commands, verdict(response="unharmful"))
    shown = said(commands)
    commands = judge(tx, commands, verdict(response="harmful"))
    assert [type(command) for command in commands] == [Stop, Send, End]
    assert b"content_filter" in commands[1].data
    assert b"[DONE]" in commands[1].data
    assert shown == TEXT[:16]
    assert tx.upstream_data(chunk("x")) == []
    assert (tx.record().outcome, tx.record().leaked_characters) == ("blocked", 0)


def test_a_guard_that_fails_in_mid_stream_ends_it_with_an_error_and_drops_the_rest() -> None:
    tx = streaming(**WINDOW)
    commands = judge(tx, [c for t in TEXT[:40] for c in tx.upstream_data(chunk(t))], verdict(response="unharmful"))
    commands = judge(tx, commands, GuardError("timeout"))
    assert [type(command) for command in commands] == [Stop, Send, End]
    assert b'"guard_unavailable"' in commands[1].data
    assert said(commands[:1]) == ""
    assert tx.record().outcome == "guard_error"


def test_an_upstream_that_breaks_in_mid_stream_is_said_in_the_stream() -> None:
    tx = streaming(**WINDOW)
    judge(tx, [c for t in TEXT[:40] for c in tx.upstream_data(chunk(t))], verdict(response="unharmful"))
    commands = tx.fail(UpstreamError(UpstreamErrorKind.RESET))
    assert b'"error"' in commands[-2].data
    assert isinstance(commands[-1], End)
    assert tx.fail(UpstreamError(UpstreamErrorKind.RESET)) == []


@pytest.mark.parametrize("policy", [WINDOW, ASYNC, {}])
def test_a_clean_stream_arrives_whole_in_every_mode(policy: Any) -> None:
    tx = streaming(**policy)
    seen, todo = "", [c for t in TEXT for c in tx.upstream_data(chunk(t))]
    todo += tx.upstream_data(events("").split(b"\n\n")[-3] + b"\n\ndata: [DONE]\n\n") + tx.upstream_end()
    while todo:
        seen += said(todo)
        todo = judge(tx, todo, *[verdict(response="unharmful")] * len(asks(todo)))
    assert seen == TEXT
    assert tx.phase is Phase.CLOSED
    assert tx.record().outcome == "allowed"


def test_a_short_stream_of_one_window_is_judged_once() -> None:
    tx = streaming(output=OutputPolicy(stream=StreamRules(mode="window", first_window=16, overlap=8)))
    asked = asks(tx.upstream_data(chunk("x" * 20)))
    tx.upstream_data(events("").split(b"\n\n")[-3] + b"\n\ndata: [DONE]\n\n")
    assert tx.upstream_end() == []
    commands = judge(tx, asked, verdict(response="unharmful"))
    assert said(commands) == "x" * 20
    assert len(tx.record().calls) == 2


def test_async_shows_at_once_and_never_more_than_its_bound() -> None:
    tx = streaming(**ASYNC)
    commands = [c for letter in TEXT for c in tx.upstream_data(chunk(letter))]
    assert said(commands) == TEXT[:10]
    assert tx.paused
    following = judge(tx, commands, verdict(response="unharmful"))
    assert said(following) == TEXT[10:11]  # one letter was judged
    judge(tx, following, verdict(response="harmful"))
    assert tx.record().leaked_characters == 10


def test_silence_shows_a_sign_of_life_only_once_the_input_is_cleared() -> None:
    tx = transaction(race=True)
    asked = tx.request(parsed(stream=True))
    tx.upstream_head(200, SSE)
    assert tx.silent() == []
    judge(tx, asked, verdict())
    begin, sign = tx.silent()
    assert isinstance(begin, Begin)
    assert sign == Send(b": guard pending\n\n")
    assert tx.silent() == [sign]


# -- the race --


def test_a_race_calls_both_and_shows_nothing_before_the_inputs_verdict() -> None:
    tx = transaction(race=True)
    asked, forward = tx.request(parsed())
    assert isinstance(forward, Forward)
    tx.upstream_head(200, JSON)
    assert tx.upstream_data(completion(ANSWER)) == []
    assert tx.upstream_end() == []
    (second,) = judge(tx, [asked], verdict())
    assert second.call.source == "output"
    assert isinstance(only(judge(tx, [second], verdict(response="unharmful"))), Respond)


def test_a_race_that_the_guard_wins_stops_the_upstream_and_says_that_it_was_called() -> None:
    tx = transaction(race=True)
    asked, _ = tx.request(parsed())
    stop, reply = judge(tx, [asked], verdict("harmful"))
    assert isinstance(stop, Stop)
    assert reply.reply.status == 400
    assert (tx.record().outcome, tx.record().upstream_called) == ("blocked", True)
    assert tx.upstream_end() == []


def test_a_race_whose_upstream_breaks_first_still_says_that_the_prompt_was_blocked() -> None:
    tx = transaction(race=True)
    asked, _ = tx.request(parsed())
    assert tx.fail(UpstreamError(UpstreamErrorKind.RESET)) == []
    reply = only(judge(tx, [asked], verdict("harmful"))).reply
    assert (reply.status, tx.record().outcome) == (400, "blocked")


def test_a_race_whose_upstream_breaks_first_says_so_once_the_prompt_is_cleared() -> None:
    tx = transaction(race=True)
    asked, _ = tx.request(parsed())
    tx.fail(UpstreamError(UpstreamErrorKind.RESET))
    reply = only(judge(tx, [asked], verdict())).reply
    assert (reply.status, tx.record().outcome, tx.record().error) == (502, "upstream_error", "upstream_reset")


def test_a_race_refuses_what_the_upstream_would_act_upon() -> None:
    tx = transaction(race=True)
    with pytest.raises(RequestRejected) as caught:
        tx.request(replace(parsed(), server_tools=True))
    assert caught.value.kind is RejectKind.UNSUPPORTED_FIELD
    assert only(tx.fail(caught.value)).reply.status == 400
    assert not tx.upstream_called
    assert transaction(race=False).request(replace(parsed(), server_tools=True))


# -- answers of several questions, in any order --

END = events("").split(b"\n\n")[-3] + b"\n\ndata: [DONE]\n\n"


@pytest.mark.parametrize("whole_first", [True, False])
@pytest.mark.parametrize("harmful", ["window", "whole"])
def test_a_block_counts_whichever_question_of_a_choice_is_answered_first(harmful: str, whole_first: bool) -> None:
    tx = streaming(**WINDOW)
    (window,) = asks([c for t in TEXT[:40] for c in tx.upstream_data(chunk(t))])
    (whole,) = asks(tx.upstream_data(END) + tx.upstream_end())
    outcomes = {name: verdict(response="harmful" if name == harmful else "unharmful") for name in ("window", "whole")}
    questions = [(whole, outcomes["whole"]), (window, outcomes["window"])]
    commands: list[Any] = []
    for ask, outcome in questions if whole_first else questions[::-1]:
        if tx.phase is not Phase.CLOSED:
            commands += judge(tx, [ask], outcome)
    assert said(commands) == ""
    assert b'"content_filter"' in b"".join(c.reply.body for c in commands if isinstance(c, Respond))
    assert (tx.record().outcome, tx.record().released_characters) == ("blocked", 0)


def of_choice(index: int, text: str, finish: str | None = None, **extra: Any) -> bytes:
    delta = {"content": text} if text else {}
    value: Any = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", **extra}
    value["choices"] = [{"index": index, "delta": delta, "finish_reason": finish}]
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def first_of_each(commands: list[Any]) -> list[int]:
    """The choices in the order in which a client first hears of them."""
    data = b"".join(command.data for command in commands if isinstance(command, Send))
    lines = [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {")]
    return list(dict.fromkeys(choice["index"] for line in lines for choice in line["choices"]))


def test_a_choice_that_is_cut_is_not_heard_of_before_those_that_appeared_before_it() -> None:
    tx = forwarded(transaction(**WINDOW), stream=True, n=2)
    tx.upstream_head(200, SSE)
    commands = tx.upstream_data(of_choice(0, "a") + of_choice(1, "x" * 20))
    commands = judge(tx, commands, verdict(response="harmful"))
    assert first_of_each(commands) == []
    commands = tx.upstream_data(of_choice(0, "b" * 20))
    commands = judge(tx, commands, verdict(response="unharmful"))
    assert first_of_each(commands) == [0, 1]
    assert b"content_filter" in commands[-1].data


def test_a_choice_that_said_nothing_of_its_own_is_cut_where_what_was_said_of_all_is_harmful() -> None:
    options = Options(extra_fields={"x_note": "moderated"})
    tx = transaction()
    tx.routed(CHAT_COMPLETIONS, options, tx._effective)
    forwarded(tx, stream=True, n=2)
    tx.upstream_head(200, SSE)
    tx.upstream_data(of_choice(0, "hello", "stop") + of_choice(1, "", "stop", x_note="a note") + b"data: [DONE]\n\n")
    commands = judge(tx, tx.upstream_end(), *[verdict(response="harmful")] * 2)
    assert commands[-1].reply.body.count(b'"finish_reason":"content_filter"') == 2
    assert b'"finish_reason":"stop"' not in commands[-1].reply.body


def test_what_is_longer_than_a_piece_leaves_piece_by_piece() -> None:
    tx = streaming()
    words = [f"{n:05}" + "x" * 1000 for n in range(3000)]
    for word in words:
        tx.upstream_data(chunk(word))
    tx.upstream_data(END)
    begin, rest = judge(tx, tx.upstream_end(), verdict(response="unharmful"))
    assert (b"x-guard-action", b"allow") in begin.headers
    pieces = []
    for piece in rest.pieces:
        pieces.append(piece)
        assert tx.record().released_bytes == sum(map(len, pieces))
    assert [len(piece) // 2**20 for piece in pieces] == [1, 1, 1, 0]
    assert said([Send(b"".join(pieces))]) == "".join(words)
    assert pieces[-1].endswith(b"data: [DONE]\n\n")
    assert tx.record().released_characters == len("".join(words))
    assert tx.phase is Phase.CLOSED


def test_a_long_hold_back_comes_out_as_it_went_in() -> None:
    tx = streaming()
    words = [f"w{n} " for n in range(3000)]
    for word in words:
        tx.upstream_data(chunk(word))
    tx.upstream_data(END)
    commands = judge(tx, tx.upstream_end(), verdict(response="unharmful"))
    assert said(commands) == "".join(words)
    assert tx.record().released_characters == len("".join(words))
