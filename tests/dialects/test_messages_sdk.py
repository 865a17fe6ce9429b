"""Our shapes through the real anthropic SDK: what a caller's code sees, call by call. No network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic import beta_tool
from pydantic import BaseModel

from guard_middleware import enforce
from guard_middleware.dialects import MESSAGES, route
from guard_middleware.dialects.answer_shared import JSON_TYPE
from guard_middleware.dialects.base import Notice, Options, ParsedRequest, Reply, Ruling
from guard_middleware.errors import RejectKind, RequestRejected, UpstreamError, UpstreamErrorKind
from guard_middleware.history import History
from guard_middleware.limits import Limits
from guard_middleware.strictjson import dumps, loads
from guard_middleware.types import (
    Action,
    Basis,
    Conversation,
    Decision,
    Message,
    Text,
    ToolCallResponse,
    Usage,
    Verdict,
)
from tests.support.anthropic_events import Events, as_events, called, ending, said, start
from tests.support.streams import finished

ASKED = Conversation((Message("user", (Text("hi"),)),))
ASK: dict[str, Any] = {"model": "m", "max_tokens": 99, "messages": [{"role": "user", "content": "hi"}]}
STREAM_TYPE = ((b"content-type", b"text/event-stream; charset=utf-8"),)


class Weather(BaseModel):
    city: str


@beta_tool
def get_weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: its name
    """
    return f"Rain in {city}."


def notice(source: Any, action: Action) -> Notice:
    label: Any = "unharmful" if action is Action.ALLOW else "harmful"
    verdict = Verdict(label, label, 0.9, 0.9, "why", Usage(), "nano", "1")
    return enforce.notice(Decision(f"d.{source}", source, action, Basis.VERDICT, "p", "0", action, verdict), ASKED)


def ruling(action: Action, soft: bool = False) -> Ruling:
    return Ruling(notice("input", Action.ALLOW), {0: notice("output", action)}, soft)


def unknown_answer() -> RequestRejected:
    """What the gateway says of an earlier turn that it does not know."""
    with pytest.raises(RequestRejected) as caught:
        asyncio.run(History(None, max_bytes=1).find("anyone", "msg_1"))
    return caught.value


@dataclass
class Gateway:
    """Answers every request of the SDK with ``reply``, made from the request as our dialect reads it.

    ``threads`` is whether conversations that the service keeps are remembered.
    """

    reply: Callable[[ParsedRequest], Reply]
    hits: int = 0
    seen: list[ParsedRequest] = field(default_factory=list)
    threads: bool = True

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.hits += 1
        dialect = route(request.method, request.url.raw_path.partition(b"?")[0]).dialect
        assert dialect is not None
        self.seen.append(dialect.parse_request(loads(request.content), Limits(), Options()))
        if self.seen[-1].continues is not None and not self.threads:
            reply = enforce.render(MESSAGES, enforce.failure(unknown_answer(), "r1"))
        else:
            reply = self.reply(self.seen[-1])
        return httpx2.Response(reply.status, headers=list(reply.headers), content=reply.body)

    @property
    def sync(self) -> anthropic.Anthropic:
        http = httpx2.Client(transport=httpx2.MockTransport(self))
        return anthropic.Anthropic(api_key="k", base_url="http://gateway", http_client=http)

    @property
    def later(self) -> anthropic.AsyncAnthropic:
        http = httpx2.AsyncClient(transport=httpx2.MockTransport(self))
        return anthropic.AsyncAnthropic(api_key="k", base_url="http://gateway", http_client=http)


def fixed(reply: Reply) -> Gateway:
    return Gateway(lambda request: reply)


def whole(events: Events) -> dict[str, Any]:
    """The answer that a stream of these events stands for."""
    message: dict[str, Any] = {**events[0]["message"]}
    blocks: list[dict[str, Any]] = []
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append({**event["content_block"]})
            written = ""
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            if delta["type"] == "input_json_delta":
                written += delta["partial_json"]
                blocks[-1]["input"] = json.loads(written) if written.endswith("}") else {}
            else:
                name = delta["type"].removesuffix("_delta")
                blocks[-1][name] = blocks[-1][name] + delta[name]
        elif event["type"] == "message_delta":
            message |= event["delta"]
            message["usage"] = {**message["usage"], **event["usage"]}
    return {**message, "content": blocks}


TEXT = [start(), *said(0, ["hello ", "there"]), *ending()]
THOUGHTFUL = [start(), *said(0, ["let me see"], "thinking"), *said(1, ["hello"]), *ending()]
CALLS = [start(), *called(0, ['{"city": ', '"Ghent"}'], name="get_weather"), *ending("tool_use")]
JSON = [start(), *said(0, ['{"city": ', '"Ghent"}']), *ending()]


def answering(what: Ruling, *turns: Events) -> Gateway:
    """A gateway whose upstream says one of ``turns`` per request, streamed where that was asked for."""
    left = list(turns or [TEXT])

    def reply(request: ParsedRequest) -> Reply:
        events = left.pop(0)
        if request.stream:
            body = finished(MESSAGES.stream_parser(request, Options()), as_events(events)).render(what)
            return Reply(200, STREAM_TYPE, body)
        parsed = MESSAGES.parse_response(whole(events), request, Options())
        return Reply(200, ((b"content-type", JSON_TYPE),), parsed.render(what))

    return Gateway(reply)


def cut(events: Events, released: int, what: Ruling) -> Gateway:
    """A gateway that blocks after it has released so many of the upstream's events."""

    def reply(request: ParsedRequest) -> Reply:
        stream = MESSAGES.stream_parser(request, Options())
        frames = [frame for event in as_events(events) for frame in stream.feed(event)]
        out = b"".join(stream.release(frame) for frame in frames[:released]) + stream.keep_alive
        return Reply(200, STREAM_TYPE, out + stream.cut(0, what.choices[0], what.soft) + stream.close(what))

    return Gateway(reply)


def helper(gateway: Gateway, **fields: Any) -> Any:
    with gateway.sync.messages.stream(**{**ASK, **fields}) as events:
        for _ in events:
            pass
        return events.get_final_message()


def events_of(gateway: Gateway) -> Any:
    return list(gateway.sync.messages.create(**ASK, stream=True))


def later(gateway: Gateway) -> Any:
    return asyncio.run(gateway.later.messages.create(**ASK))


def later_helper(gateway: Gateway) -> Any:
    async def run() -> Any:
        async with gateway.later.messages.stream(**ASK) as events:
            async for _ in events:
                pass
            return await events.get_final_message()

    return asyncio.run(run())


def later_events(gateway: Gateway) -> Any:
    async def run() -> Any:
        return [event async for event in await gateway.later.messages.create(**ASK, stream=True)]

    return asyncio.run(run())


ANSWERS: dict[str, Callable[[Gateway], Any]] = {
    "create": lambda gateway: gateway.sync.messages.create(**ASK),
    "async create": later,
    "stream helper": helper,
    "async stream helper": later_helper,
    "beta": lambda gateway: gateway.sync.beta.messages.create(**ASK, betas=["x-2026-01-01"]),
}
RAW: dict[str, Callable[[Gateway], Any]] = {"create stream": events_of, "async create stream": later_events}
EVERY = {
    **ANSWERS,
    **RAW,
    "parse": lambda gateway: gateway.sync.messages.parse(**ASK, output_format=Weather),
    "tool runner": lambda gateway: gateway.sync.beta.messages.tool_runner(**ASK, tools=[get_weather]).until_done(),
}
COUNT = {"count": lambda gateway: gateway.sync.messages.count_tokens(model="m", messages=ASK["messages"])}


def each(calls: dict[str, Callable[[Gateway], Any]]) -> Any:
    return pytest.mark.parametrize("call", calls.values(), ids=list(calls))


@each(EVERY | COUNT)
def test_a_blocked_prompt_is_a_typed_error_and_not_retried(call: Callable[[Gateway], Any]) -> None:
    gateway = fixed(enforce.render(MESSAGES, enforce.blocked_prompt(notice("input", Action.BLOCK))))
    with pytest.raises(anthropic.BadRequestError) as caught:
        call(gateway)
    error: Any = caught.value
    assert (error.type, error.error_code, error.request_id) == ("invalid_request_error", "content_filter", "d.input")
    assert "blocked by the content policy" in error.api_message
    assert error.body["error"]["details"]["decision_id"] == "d.input"
    assert error.response.headers["x-guard-action"] == "block"
    assert gateway.hits == 1


@each(EVERY | COUNT)
def test_a_dead_guard_is_a_server_error_and_not_retried(call: Callable[[Gateway], Any]) -> None:
    failed = Decision("d1", "input", Action.BLOCK, Basis.ERROR, "p", "0", Action.BLOCK, None, "unavailable")
    gateway = fixed(enforce.render(MESSAGES, enforce.guard_unavailable(failed)))
    with pytest.raises(anthropic.InternalServerError) as caught:
        call(gateway)
    error: Any = caught.value
    assert (error.status_code, error.type, error.error_code) == (503, "api_error", "guard_unavailable")
    assert gateway.hits == 1


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (RejectKind.UNSUPPORTED_FIELD, anthropic.BadRequestError),
        (RejectKind.NOT_FOUND, anthropic.NotFoundError),
        (RejectKind.BODY_TOO_LARGE, anthropic.APIStatusError),
    ],
)
def test_a_refusal_is_a_typed_error(kind: RejectKind, expected: type[anthropic.APIStatusError]) -> None:
    gateway = fixed(enforce.render(MESSAGES, enforce.failure(RequestRejected(kind, "no", param="x"), "r1")))
    with pytest.raises(expected) as caught:
        EVERY["create"](gateway)
    assert (caught.value.error_code, gateway.hits) == (kind.value, 1)


def test_an_answer_that_cannot_be_moderated_is_not_asked_for_again() -> None:
    error = enforce.failure(UpstreamError(UpstreamErrorKind.UNSUPPORTED), "r1")
    gateway = fixed(enforce.render(MESSAGES, error))
    with pytest.raises(anthropic.InternalServerError) as caught:
        EVERY["create"](gateway)
    assert (caught.value.error_code, gateway.hits) == ("upstream_unsupported", 1)


def test_the_upstreams_own_refusal_stays_what_it_was() -> None:
    headers = ((b"request-id", b"req_7"), (b"x-should-retry", b"false"))
    body: Any = {"type": "error", "error": {"type": "rate_limit_error", "message": "secret"}}
    gateway = fixed(enforce.render(MESSAGES, enforce.upstream_refused(429, body, headers, "r1")))
    with pytest.raises(anthropic.RateLimitError) as caught:
        EVERY["create"](gateway)
    assert (caught.value.type, caught.value.request_id) == ("rate_limit_error", "req_7")
    assert "secret" not in str(caught.value)


@each(ANSWERS)
@pytest.mark.parametrize("turn", [TEXT, THOUGHTFUL, CALLS], ids=["text", "thoughtful", "calls"])
def test_an_allowed_answer_is_what_the_upstream_said(call: Callable[[Gateway], Any], turn: Events) -> None:
    done = call(answering(ruling(Action.ALLOW), turn)).to_dict()
    known = whole(turn)
    assert done["content"] == known["content"]
    assert {name: done[name] for name in known} == known


@each(ANSWERS)
@pytest.mark.parametrize("turn", [TEXT, THOUGHTFUL, CALLS], ids=["text", "thoughtful", "calls"])
def test_a_blocked_answer_is_a_refusal_with_its_usage_and_without_content(
    call: Callable[[Gateway], Any], turn: Events
) -> None:
    gateway = answering(ruling(Action.BLOCK), turn)
    done = call(gateway)
    assert (done.content, done.stop_reason) == ([], "refusal")
    assert (done.stop_details.type, done.stop_details.category) == ("refusal", None)
    assert "decision d.output" in done.stop_details.explanation
    assert (done.usage.input_tokens, done.usage.output_tokens) == (3, 7)
    assert gateway.hits == 1


@pytest.mark.parametrize("how", ["create", "async create", "beta"])
def test_the_decision_stands_beside_a_blocked_answer(how: str) -> None:
    done = ANSWERS[how](answering(ruling(Action.BLOCK)))
    assert [side[0]["decision_id"] for side in done.x_guard.values()] == ["d.input", "d.output"]


@each(RAW)
def test_a_blocked_stream_is_a_start_and_an_end_in_a_plain_loop(call: Callable[[Gateway], Any]) -> None:
    events = call(answering(ruling(Action.BLOCK)))
    assert [event.type for event in events] == ["message_start", "message_delta", "message_stop"]
    assert events[1].delta.stop_reason == "refusal"
    assert events[1].x_guard["output"][0]["decision_id"] == "d.output"


@pytest.mark.parametrize("released", range(len(THOUGHTFUL) - 1))
@pytest.mark.parametrize("how", ["stream helper", "async stream helper", "create stream"])
def test_a_stream_that_is_cut_at_any_event_ends_as_a_refusal(how: str, released: int) -> None:
    gateway = cut(THOUGHTFUL, released, ruling(Action.BLOCK))
    if how == "create stream":
        events = events_of(gateway)
        stops = [event.delta.stop_reason for event in events if event.type == "message_delta"]
        assert stops == ["refusal"]
        assert events[-1].type == "message_stop"
        return
    done = ANSWERS[how](gateway)
    assert done.stop_reason == "refusal"
    assert done.stop_details.category is None
    assert done.usage.output_tokens == 7
    shown = "".join(getattr(block, "text", "") + getattr(block, "thinking", "") for block in done.content)
    assert "let me seehello".startswith(shown)
    assert gateway.hits == 1


@pytest.mark.parametrize("released", [0, 3, 7])
def test_a_softly_cut_stream_ends_with_words_of_ours(released: int) -> None:
    done = helper(cut(THOUGHTFUL, released, ruling(Action.BLOCK, soft=True)))
    assert done.stop_reason == "end_turn"
    assert "decision d.output" in done.content[-1].text


@each(ANSWERS)
def test_soft_mode_is_an_ordinary_answer_everywhere(call: Callable[[Gateway], Any]) -> None:
    done = call(answering(ruling(Action.BLOCK, soft=True)))
    assert done.stop_reason == "end_turn"
    assert "blocked" in done.content[0].text


@each(ANSWERS)
def test_a_softly_blocked_prompt_is_an_ordinary_answer(call: Callable[[Gateway], Any]) -> None:
    done = call(Gateway(lambda request: MESSAGES.soft_block(request, notice("input", Action.BLOCK), 1)))
    assert (done.stop_reason, done.usage.output_tokens) == ("end_turn", 0)
    assert "blocked" in done.content[0].text


def test_a_softly_blocked_count_is_an_error_all_the_same() -> None:
    def reply(request: ParsedRequest) -> Reply:
        dialect = route("POST", b"/v1/messages/count_tokens").dialect
        assert dialect is not None
        return dialect.soft_block(request, notice("input", Action.BLOCK), 1)

    with pytest.raises(anthropic.BadRequestError) as caught:
        COUNT["count"](Gateway(reply))
    assert caught.value.error_code == "content_filter"


@each(ANSWERS)
def test_an_annotated_answer_is_untouched_and_typed_clients_take_it(call: Callable[[Gateway], Any]) -> None:
    done = call(answering(ruling(Action.ANNOTATE), THOUGHTFUL))
    assert [block.to_dict() for block in done.content] == whole(THOUGHTFUL)["content"]
    assert done.stop_reason == "end_turn"
    history = [*ASK["messages"], {"role": "assistant", "content": done.content}, {"role": "user", "content": "more"}]
    gateway = answering(ruling(Action.ALLOW))
    gateway.sync.messages.create(**{**ASK, "messages": history})
    assert [message.role for message in gateway.seen[0].conversation.messages] == ["user", "assistant", "user"]


@pytest.mark.parametrize("after", range(4))
def test_an_error_inside_a_stream_is_raised(after: int) -> None:
    def reply(request: ParsedRequest) -> Reply:
        stream = MESSAGES.stream_parser(request, Options())
        frames = [frame for event in as_events(TEXT) for frame in stream.feed(event)]
        out = b"".join(stream.release(frame) for frame in frames[:after])
        error = enforce.failure(UpstreamError(UpstreamErrorKind.RESET), "r1")
        return Reply(200, STREAM_TYPE, stream.keep_alive + out + stream.fail(error))

    calls: Iterable[Callable[[Gateway], Any]] = (*RAW.values(), helper, later_helper)
    for call in calls:
        gateway = Gateway(reply)
        with pytest.raises(anthropic.APIStatusError) as caught:
            call(gateway)
        assert (caught.value.error_code, gateway.hits) == ("upstream_reset", 1)


def test_pings_may_stand_anywhere() -> None:
    def reply(request: ParsedRequest) -> Reply:
        stream = MESSAGES.stream_parser(request, Options())
        frames = [frame for event in as_events(THOUGHTFUL) for frame in stream.feed(event)]
        out = b"".join(stream.keep_alive + stream.release(frame) for frame in frames)
        ending = (stream.keep_alive + stream.close(ruling(Action.ALLOW))).replace(
            b"event: message_stop", stream.keep_alive + b"event: message_stop"
        )
        return Reply(200, STREAM_TYPE, out + ending)

    assert helper(Gateway(reply)).to_dict()["content"] == whole(THOUGHTFUL)["content"]
    assert "ping" not in [event.type for event in events_of(Gateway(reply))]


def test_parsing_gives_the_parsed_output_and_none_where_it_is_blocked() -> None:
    parsed = answering(ruling(Action.ALLOW), JSON).sync.messages.parse(**ASK, output_format=Weather)
    assert parsed.parsed_output == Weather(city="Ghent")
    gateway = answering(ruling(Action.BLOCK), JSON)
    blocked = gateway.sync.messages.parse(**ASK, output_format=Weather)
    assert (blocked.parsed_output, blocked.stop_reason) == (None, "refusal")
    (definition,) = gateway.seen[0].conversation.definitions
    assert "city" in definition.text


@pytest.mark.parametrize("streamed", [False, True])
def test_the_tool_runner_runs_an_allowed_call_and_its_thread_goes_on(streamed: bool) -> None:
    gateway = answering(ruling(Action.ALLOW), CALLS, TEXT)
    done: Any = gateway.sync.beta.messages.tool_runner(**ASK, tools=[get_weather], stream=streamed).until_done()
    assert done.content[0].text == "hello there"
    first, second = gateway.seen
    assert (first.continues, second.continues) == (None, "msg_1")
    (definition,) = first.conversation.definitions
    assert "The weather of a city." in definition.text
    assert second.conversation.messages == (Message("tool", (ToolCallResponse("toolu_1", "Rain in Ghent."),)),)
    assert second.body["messages"][0]["content"][0]["tool_use_id"] == "toolu_1"  # type: ignore[index, call-overload]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("threads", [False, None])
def test_where_threads_are_not_remembered_the_tool_runner_sends_the_whole_conversation(
    threads: bool | None, streamed: bool
) -> None:
    gateway = answering(ruling(Action.ALLOW), CALLS, TEXT)
    gateway.threads = False
    how: dict[str, Any] = {"stream": streamed} | ({"thread": False} if threads is False else {})
    done: Any = gateway.sync.beta.messages.tool_runner(**ASK, tools=[get_weather], **how).until_done()
    assert done.content[0].text == "hello there"
    assert gateway.hits == (2 if threads is False else 3)
    read = gateway.seen[-1].conversation.messages
    assert [message.role for message in read] == ["user", "assistant", "tool"]
    assert read[2].parts == (ToolCallResponse("call00001", "Rain in Ghent."),)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_is_known_by_its_id_only_where_a_thread_can_go_on_from_it(streamed: bool) -> None:
    for thread, expected in ((None, None), ({"type": "create"}, "msg_1")):
        body: Any = {**ASK, "stream": streamed, "thread": thread}
        request = MESSAGES.parse_request(body, Limits(), Options())
        if streamed:
            found = finished(MESSAGES.stream_parser(request, Options()), as_events(TEXT)).parser.answer_id
        else:
            found = MESSAGES.parse_response(whole(TEXT), request, Options()).answer_id
        assert found == expected


def test_the_tool_runner_stops_at_a_blocked_call() -> None:
    gateway = answering(ruling(Action.BLOCK), CALLS, TEXT)
    done = gateway.sync.beta.messages.tool_runner(**ASK, tools=[get_weather]).until_done()
    assert (done.stop_reason, gateway.hits) == ("refusal", 1)


def test_counting_tokens_passes_and_is_read() -> None:
    gateway = fixed(Reply(200, ((b"content-type", b"application/json"),), dumps({"input_tokens": 5})))
    counted = gateway.sync.messages.count_tokens(model="m", messages=ASK["messages"], system="be brief")
    assert counted.input_tokens == 5
    assert gateway.seen[0].conversation.messages[0] == Message("system", (Text("be brief"),))


def test_what_the_sdk_sends_is_accepted() -> None:
    gateway = answering(ruling(Action.ALLOW))
    gateway.sync.messages.create(
        model="m",
        max_tokens=99,
        system=[{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}},
                    {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a page"}},
                ],
            }
        ],
        tools=[get_weather.to_dict(), {"type": "bash_20250124", "name": "bash"}],  # type: ignore[list-item]
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        thinking={"type": "enabled", "budget_tokens": 1024},
        metadata={"user_id": "u-1"},
        stop_sequences=["END"],
    )
    assert gateway.seen[0].media == ("data:image/png;base64,QUJD",)
