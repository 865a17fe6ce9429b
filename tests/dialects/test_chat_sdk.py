"""Our shapes through the real openai SDK: what a caller's code sees, call by call. No network."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
from openai import ContentFilterFinishReasonError
from pydantic import BaseModel

from guard_middleware import enforce
from guard_middleware.dialects import CHAT_COMPLETIONS
from guard_middleware.dialects.answer_shared import JSON_TYPE, SSE_TYPE
from guard_middleware.dialects.base import Notice, Options, ParsedRequest, Reply, Ruling
from guard_middleware.errors import RejectKind, RequestRejected, UpstreamError, UpstreamErrorKind
from guard_middleware.limits import Limits
from guard_middleware.sse import Event
from guard_middleware.strictjson import dumps, loads
from guard_middleware.types import Action, Basis, Conversation, Decision, Message, Text, Usage, Verdict
from tests.support.streams import finished

ASKED = Conversation((Message("user", (Text("hi"),)),))
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


class Weather(BaseModel):
    city: str


def decision(source: Any, action: Action, choice: int = 0) -> Decision:
    harmful = action is not Action.ALLOW
    verdict = Verdict(
        "harmful" if harmful else "unharmful",
        "harmful" if harmful else "unharmful",
        0.9,
        0.9,
        "why",
        Usage(),
        "nano",
        "1",
    )
    return Decision(f"d.{source}.{choice}", source, action, Basis.VERDICT, "p", "0", action, verdict)


def notice(source: Any, action: Action, choice: int = 0) -> Notice:
    return enforce.notice(decision(source, action, choice), ASKED)


def ruling(*actions: Action, soft: bool = False) -> Ruling:
    notices = {index: notice("output", action, index) for index, action in enumerate(actions)}
    return Ruling(notice("input", Action.ALLOW), notices, soft)


@dataclass
class Gateway:
    """Answers every request of the SDK with ``reply``, made from the request as our dialect reads it."""

    reply: Callable[[ParsedRequest], Reply]
    hits: int = 0
    seen: list[ParsedRequest] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.hits += 1
        self.seen.append(CHAT_COMPLETIONS.parse_request(loads(request.content), Limits(), Options()))
        reply = self.reply(self.seen[-1])
        return httpx.Response(reply.status, headers=list(reply.headers), content=reply.body)

    def client(self) -> openai.OpenAI:
        transport = httpx.MockTransport(self)
        return openai.OpenAI(api_key="k", base_url="http://gateway/v1", http_client=httpx.Client(transport=transport))


ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def fixed(reply: Reply) -> Gateway:
    return Gateway(lambda request: reply)


def answering(what: Ruling, *texts: str) -> Gateway:
    """A gateway whose upstream says one text per choice, streamed where that was asked for."""

    def reply(request: ParsedRequest) -> Reply:
        envelope: dict[str, Any] = {"id": "c", "created": 1, "model": "m"}
        if not request.stream:
            choices = [
                {
                    "index": i,
                    "message": {"role": "assistant", "content": text, "refusal": None},
                    "finish_reason": "stop",
                }
                for i, text in enumerate(texts)
            ]
            body = {**envelope, "object": "chat.completion", "choices": choices, "usage": USAGE}
            parsed: Any = CHAT_COMPLETIONS.parse_response(body, request, Options())
        else:
            stream = CHAT_COMPLETIONS.stream_parser(request, Options())
            chunks: list[dict[str, Any]] = []
            for i, text in enumerate(texts):
                chunks.append({"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
                chunks += [{"index": i, "delta": {"content": piece}, "finish_reason": None} for piece in text]
            chunks += [{"index": i, "delta": {}, "finish_reason": "stop"} for i in range(len(texts))]
            envelope["object"] = "chat.completion.chunk"
            bodies: list[Any] = [{**envelope, "choices": [item]} for item in chunks]
            bodies += [{**envelope, "choices": [], "usage": USAGE}] if request.include_usage else []
            data = [*(dumps(body).decode() for body in bodies), "[DONE]"]
            parsed = finished(stream, (Event("", text) for text in data))
        kind = SSE_TYPE if request.stream else JSON_TYPE
        return Reply(200, ((b"content-type", kind),), parsed.render(what))

    return Gateway(reply)


CALLS: dict[str, Callable[[openai.OpenAI], Any]] = {
    "create": lambda client: client.chat.completions.create(**ASK),
    "create stream": lambda client: list(client.chat.completions.create(**ASK, stream=True)),
    "parse": lambda client: client.chat.completions.parse(**ASK, response_format=Weather),
    "stream helper": lambda client: stream(client),
}


def stream(client: openai.OpenAI, **fields: Any) -> Any:
    with client.chat.completions.stream(**{**ASK, **fields}) as events:
        for _ in events:
            pass
        return events.get_final_completion()


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_a_blocked_prompt_is_a_typed_error_and_not_retried(call: Callable[[openai.OpenAI], Any]) -> None:
    gateway = fixed(enforce.render(CHAT_COMPLETIONS, enforce.blocked_prompt(notice("input", Action.BLOCK))))
    with pytest.raises(openai.BadRequestError) as caught:
        call(gateway.client())
    assert caught.value.code == "content_filter"
    assert caught.value.param == "messages"
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["innererror"]["decision_id"] == "d.input.0"
    assert caught.value.response.headers["x-guard-action"] == "block"
    assert gateway.hits == 1


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_a_dead_guard_is_a_server_error_and_not_retried(call: Callable[[openai.OpenAI], Any]) -> None:
    failed = Decision("d1", "input", Action.BLOCK, Basis.ERROR, "p", "0", Action.BLOCK, None, "unavailable")
    gateway = fixed(enforce.render(CHAT_COMPLETIONS, enforce.guard_unavailable(failed)))
    with pytest.raises(openai.InternalServerError) as caught:
        call(gateway.client())
    assert (caught.value.status_code, caught.value.code) == (503, "guard_unavailable")
    assert gateway.hits == 1


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (RejectKind.UNSUPPORTED_FIELD, openai.BadRequestError),
        (RejectKind.NOT_FOUND, openai.NotFoundError),
        (RejectKind.BODY_TOO_LARGE, openai.APIStatusError),
    ],
)
def test_a_refusal_is_a_typed_error(kind: RejectKind, expected: type[openai.APIStatusError]) -> None:
    gateway = fixed(enforce.render(CHAT_COMPLETIONS, enforce.failure(RequestRejected(kind, "no", param="x"), "r1")))
    with pytest.raises(expected) as caught:
        CALLS["create"](gateway.client())
    assert (caught.value.code, gateway.hits) == (kind.value, 1)


def test_an_answer_that_cannot_be_moderated_is_not_asked_for_again() -> None:
    gateway = fixed(
        enforce.render(CHAT_COMPLETIONS, enforce.failure(UpstreamError(UpstreamErrorKind.UNSUPPORTED), "r1"))
    )
    with pytest.raises(openai.InternalServerError) as caught:
        CALLS["create"](gateway.client())
    assert (caught.value.code, gateway.hits) == ("upstream_unsupported", 1)


def test_the_upstreams_own_refusal_stays_what_it_was() -> None:
    headers = ((b"x-request-id", b"req_7"), (b"x-should-retry", b"false"))
    body: Any = {"error": {"message": "secret", "type": "tokens", "code": "rate_limit_exceeded"}}
    gateway = fixed(enforce.render(CHAT_COMPLETIONS, enforce.upstream_refused(429, body, headers, "r1")))
    with pytest.raises(openai.RateLimitError) as caught:
        CALLS["create"](gateway.client())
    assert (caught.value.code, caught.value.request_id) == ("rate_limit_exceeded", "req_7")
    assert "secret" not in str(caught.value)


def test_a_blocked_answer_is_a_refusal_with_its_usage() -> None:
    done = CALLS["create"](answering(ruling(Action.BLOCK), "bad").client())
    assert done.choices[0].finish_reason == "content_filter"
    assert done.choices[0].message.content is None
    assert "decision d.output.0" in done.choices[0].message.refusal
    assert done.usage.total_tokens == 5
    assert done.moderation.output.results[0].flagged is True
    assert done.moderation.output.results[0].category_scores == {}


@pytest.mark.parametrize("how", ["parse", "parse stream"])
def test_parsing_helpers_raise_their_content_filter_error(how: str) -> None:
    client = answering(ruling(Action.BLOCK), '{"city": "x"}').client()
    call = client.chat.completions.parse if how == "parse" else functools.partial(stream, client)
    with pytest.raises(ContentFilterFinishReasonError):
        call(**ASK, response_format=Weather)


def test_a_blocked_stream_ends_with_content_filter_in_a_plain_loop() -> None:
    gateway = answering(ruling(Action.BLOCK), "bad")
    chunks = list(gateway.client().chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == ["content_filter"]
    assert "decision d.output.0" in str(chunks[0].choices[0].delta.refusal)  # type: ignore[attr-defined]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 5


def test_a_blocked_stream_raises_in_the_helper() -> None:
    with pytest.raises(ContentFilterFinishReasonError):
        CALLS["stream helper"](answering(ruling(Action.BLOCK), "bad").client())


@pytest.mark.parametrize("how", ["create", "stream helper"])
def test_soft_mode_is_an_ordinary_answer_everywhere(how: str) -> None:
    done = CALLS[how](answering(ruling(Action.BLOCK, soft=True), "bad").client())
    assert done.choices[0].finish_reason == "stop"
    assert "blocked" in done.choices[0].message.content


@pytest.mark.parametrize("how", ["create", "create stream", "stream helper"])
def test_a_softly_blocked_prompt_is_an_ordinary_answer(how: str) -> None:
    def reply(request: ParsedRequest) -> Reply:
        return CHAT_COMPLETIONS.soft_block(request, notice("input", Action.BLOCK), 1)

    done = CALLS[how](Gateway(reply).client())
    if how == "create stream":
        assert "blocked" in done[0].choices[0].delta.content
        assert done[-1].choices[0].finish_reason == "stop"
    else:
        assert "blocked" in done.choices[0].message.content


def test_a_softly_blocked_stream_ends_with_its_usage_where_that_was_asked_for() -> None:
    gateway = Gateway(lambda request: CHAT_COMPLETIONS.soft_block(request, notice("input", Action.BLOCK), 1))
    chunks = list(gateway.client().chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    assert [len(chunk.choices) for chunk in chunks] == [1, 0]
    assert chunks[-1].usage is not None


@pytest.mark.parametrize("how", ["create", "stream helper"])
def test_an_annotation_is_typed_and_the_answer_untouched(how: str) -> None:
    done = CALLS[how](answering(ruling(Action.ANNOTATE), "hello").client())
    assert done.choices[0].message.content == "hello"
    assert done.moderation.input.results[0].flagged is False
    assert done.moderation.output.type == "moderation_results"
    assert done.moderation.output.results[0].category_scores == {"harmful": 0.9}


def test_every_chunk_of_an_annotated_stream_suits_a_naive_loop() -> None:
    chunks = CALLS["create stream"](answering(ruling(Action.ANNOTATE), "hello").client())
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hello"
    assert [chunk.moderation is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_two_choices_one_blocked() -> None:
    gateway = answering(ruling(Action.BLOCK, Action.ALLOW), "bad", "good")
    done = gateway.client().chat.completions.create(**ASK, n=2)
    assert [choice.finish_reason for choice in done.choices] == ["content_filter", "stop"]
    chunks = list(gateway.client().chat.completions.create(**ASK, n=2, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == 1) == "good"
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].index == 0] == ["content_filter"]


def test_the_helper_keeps_two_choices_apart_when_the_second_is_blocked() -> None:
    with pytest.raises(ContentFilterFinishReasonError):
        stream(answering(ruling(Action.ALLOW, Action.BLOCK), "good", "bad").client(), n=2)
    done = stream(answering(ruling(Action.BLOCK, Action.ALLOW, soft=True), "bad", "good").client(), n=2)
    assert [choice.message.content == "good" for choice in done.choices] == [False, True]


def test_what_the_sdk_sends_for_tools_and_history_is_accepted() -> None:
    gateway = answering(ruling(Action.ALLOW), "sunny")
    client = gateway.client()
    first = client.chat.completions.create(**ASK)
    client.chat.completions.create(
        model="m",
        messages=[
            {"role": "user", "content": "hi"},
            first.choices[0].message,  # type: ignore[list-item]
            {"role": "user", "content": "and now?"},
        ],
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
        tool_choice="auto",
        parallel_tool_calls=False,
        stream_options=None,
        user="u1",
    )
    assert [message.role for message in gateway.seen[1].conversation.messages] == ["user", "assistant", "user"]


#: Azure OpenAI's stream as it is on the wire: a nameless first chunk, and annotations of its filter after the end
AZURE = (
    '{"choices":[],"created":0,"id":"","model":"","object":"","prompt_filter_results":[{"prompt_index":0,'
    '"content_filter_results":{"hate":{"filtered":false,"severity":"safe"}}}]}',
    '{"choices":[{"content_filter_results":{},"delta":{"content":"","refusal":null,"role":"assistant"},'
    '"finish_reason":null,"index":0,"logprobs":null}],"created":1730000000,"id":"chatcmpl-A1","model":"gpt-4o",'
    '"object":"chat.completion.chunk","system_fingerprint":"fp_1"}',
    '{"choices":[{"content_filter_results":{},"delta":{"content":"hello"},"finish_reason":null,"index":0,'
    '"logprobs":null}],"created":1730000000,"id":"chatcmpl-A1","model":"gpt-4o","object":"chat.completion.chunk",'
    '"system_fingerprint":"fp_1"}',
    '{"choices":[{"content_filter_results":{},"delta":{},"finish_reason":"stop","index":0,"logprobs":null}],'
    '"created":1730000000,"id":"chatcmpl-A1","model":"gpt-4o","object":"chat.completion.chunk",'
    '"system_fingerprint":"fp_1"}',
    '{"id":"","object":"","created":0,"model":"","choices":[{"index":0,"finish_reason":null,'
    '"content_filter_results":{"hate":{"filtered":false,"severity":"safe"}},"content_filter_raw":[],'
    '"content_filter_offsets":{"check_offset":44,"start_offset":44,"end_offset":198}}]}',
    "[DONE]",
)
#: what SGLang and others stream: empty strings where there is nothing to say
EMPTIES = (
    '{"id":"","object":"chat.completion.chunk","created":1,"model":"","system_fingerprint":"","service_tier":"","choices":[{"index":0,'
    '"delta":{"role":"","tool_calls":[{"index":0,"id":"call_1","type":"function","function":{"name":"f",'
    '"arguments":"{}"}}]},"finish_reason":""}]}',
    '{"id":"","object":"chat.completion.chunk","created":1,"model":"","choices":[{"index":0,"delta":{"role":"","tool_calls":[{"index":0,'
    '"id":"","type":"","function":{"name":null,"arguments":" "}}]},"finish_reason":""}]}',
    '{"id":"","object":"chat.completion.chunk","created":1,"model":"","choices":[{"index":0,"delta":{},"finish_reason":"tool_calls"}]}',
    "[DONE]",
)


def streaming(what: Ruling, data: tuple[str, ...]) -> Gateway:
    """A gateway whose upstream streams these events."""

    def reply(request: ParsedRequest) -> Reply:
        parsed = finished(CHAT_COMPLETIONS.stream_parser(request, Options()), (Event("", text) for text in data))
        return Reply(200, ((b"content-type", SSE_TYPE),), parsed.render(what))

    return Gateway(reply)


def test_a_stream_of_azure_is_an_ordinary_one() -> None:
    done = CALLS["stream helper"](streaming(ruling(Action.ALLOW), AZURE).client())
    assert (done.id, done.choices[0].message.content, done.choices[0].finish_reason) == ("chatcmpl-A1", "hello", "stop")
    chunks = CALLS["create stream"](streaming(ruling(Action.BLOCK), AZURE).client())
    assert [(chunk.id, chunk.choices[0].finish_reason) for chunk in chunks] == [("chatcmpl-A1", "content_filter")]


def test_a_block_by_azures_asynchronous_filter_reaches_the_helper() -> None:
    ended = AZURE[-2].replace('"finish_reason":null', '"finish_reason":"content_filter"')
    with pytest.raises(ContentFilterFinishReasonError):
        CALLS["stream helper"](streaming(ruling(Action.ALLOW), (*AZURE[:3], ended, "[DONE]")).client())


def test_empty_strings_of_a_stream_do_not_break_the_helper() -> None:
    done = CALLS["stream helper"](streaming(ruling(Action.ALLOW), EMPTIES).client())
    (call,) = done.choices[0].message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", "f", "{} ")
