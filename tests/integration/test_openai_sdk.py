"""The real openai SDK against the real gateway: what an application sees, sync and async, call by call."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import ContentFilterFinishReasonError
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from PIL import Image
from pydantic import BaseModel

from tests.support.gateway import BAD, GOOD, LEAK, Gateway, Upstream, eventually, scripted_worker, unique

HARMFUL = "how do I pick a lock?"
KEY = "sk-test"


class Weather(BaseModel):
    city: str


def _client(kind: Any, http: Any, base: str) -> Any:
    """The SDK as it comes, but for the certificates, whose loading would be most of a test's time."""
    return kind(api_key=KEY, base_url=base, http_client=http(verify=False))


class Sdk:
    """One way to call the SDK: ``create``, ``raw``, ``stream``, ``helper`` or ``parse``, sync or async."""

    def __init__(self, how: str, asynchronous: bool) -> None:
        self.how, self.asynchronous = how, asynchronous

    def __call__(self, gateway: Gateway, model: str, text: Any = "how do I bake bread?", **extra: Any) -> Any:
        messages = text if isinstance(text, list) and "role" in text[0] else [{"role": "user", "content": text}]
        arguments = {"model": model, "messages": messages, **extra}
        base = f"{gateway.url}/v1"
        if self.asynchronous:

            async def run() -> Any:
                async with _client(openai.AsyncOpenAI, openai.DefaultAsyncHttpxClient, base) as client:
                    return await self._async(client, arguments)

            return asyncio.run(run())
        with _client(openai.OpenAI, openai.DefaultHttpxClient, base) as client:
            return self._sync(client, arguments)

    def _sync(self, client: openai.OpenAI, arguments: dict[str, Any]) -> Any:
        api = client.chat.completions
        match self.how:
            case "create":
                return api.create(**arguments)
            case "raw":
                return api.with_raw_response.create(**arguments)
            case "stream":
                return list(api.create(**arguments, stream=True))
            case "helper":
                with api.stream(**arguments) as events:
                    for _ in events:
                        pass
                    return events.get_final_completion()
            case _:
                return api.parse(**arguments, response_format=Weather)

    async def _async(self, client: openai.AsyncOpenAI, arguments: dict[str, Any]) -> Any:
        api = client.chat.completions
        match self.how:
            case "create":
                return await api.create(**arguments)
            case "raw":
                return await api.with_raw_response.create(**arguments)
            case "stream":
                return [chunk async for chunk in await api.create(**arguments, stream=True)]
            case "helper":
                async with api.stream(**arguments) as events:
                    async for _ in events:
                        pass
                    return await events.get_final_completion()
            case _:
                return await api.parse(**arguments, response_format=Weather)


def ways(*hows: str) -> pytest.MarkDecorator:
    found = [Sdk(how, asynchronous) for how in hows for asynchronous in (False, True)]
    return pytest.mark.parametrize(
        "sdk", found, ids=[f"{s.how}-{'async' if s.asynchronous else 'sync'}" for s in found]
    )


EVERY = ways("create", "raw", "stream", "helper", "parse")


def text_of(answer: Any, index: int = 0) -> str:
    """What an application would show of one choice."""
    if isinstance(answer, list):
        chunks: list[ChatCompletionChunk] = answer
        pieces = [c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == index]
        return "".join(pieces).strip()
    completion: ChatCompletion = answer.parse() if hasattr(answer, "http_response") else answer
    return (completion.choices[index].message.content or "").strip()


def finish_of(answer: Any, index: int = 0) -> list[str]:
    if isinstance(answer, list):
        return [c.finish_reason for chunk in answer for c in chunk.choices if c.index == index and c.finish_reason]
    completion = answer.parse() if hasattr(answer, "http_response") else answer
    return [completion.choices[index].finish_reason]


def once(gateway: Gateway, model: str) -> dict[str, Any]:
    """The record of the one request that reached us: there was no retry."""
    record = gateway.record(model=model)
    assert len(gateway.records(model=model)) == 1
    return record


@EVERY
def test_an_allowed_answer_is_whole(gateway: Gateway, upstream: Upstream, sdk: Sdk) -> None:
    parsed = sdk.how == "parse"
    model = unique("json" if parsed else "good")
    answer = sdk(gateway, model)
    assert text_of(answer) == ('{"city": "Paris"}' if parsed else GOOD)
    assert finish_of(answer) == ["stop"]
    if parsed:
        assert answer.choices[0].message.parsed == Weather(city="Paris")
    if sdk.how == "raw":
        assert answer.headers["x-guard-action"] == "allow"
        assert answer.headers["x-guard-decision-id"].startswith("gd_")
    assert once(gateway, model)["outcome"] == "allowed"
    (seen,) = upstream.of(model)
    assert seen.header("authorization") == [f"Bearer {KEY}"]


@EVERY
def test_a_blocked_prompt_is_a_typed_error_and_calls_nobody(gateway: Gateway, upstream: Upstream, sdk: Sdk) -> None:
    model = unique("good")
    with pytest.raises(openai.BadRequestError) as caught:
        sdk(gateway, model, HARMFUL)
    error = caught.value
    assert (error.code, error.param, error.type) == ("content_filter", "messages", "invalid_request_error")
    assert isinstance(error.body, dict)
    record = once(gateway, model)
    assert error.body["innererror"]["decision_id"] == f"{record['id']}.input"
    assert error.body["innererror"]["flagged"] is True
    assert "reasoning" not in error.body["innererror"]
    assert error.response.headers["x-guard-action"] == "block"
    assert record["outcome"] == "blocked"
    assert upstream.of(model) == []


@ways("create", "raw", "stream")
def test_a_blocked_answer_says_why_it_is_empty(gateway: Gateway, sdk: Sdk) -> None:
    model = unique("bad")
    answer = sdk(gateway, model)
    assert text_of(answer) == ""
    assert finish_of(answer) == ["content_filter"]
    record = once(gateway, model)
    assert (record["outcome"], record["upstream_called"]) == ("blocked", True)
    if sdk.how == "stream":
        refusals = [chunk.choices[0].delta.refusal for chunk in answer if chunk.choices[0].delta.refusal]
        assert record["id"] in refusals[0]
        assert answer[-1].moderation.output.results[0].flagged is True
        assert LEAK not in repr(answer)
    else:
        completion = answer.parse() if sdk.how == "raw" else answer
        assert record["id"] in completion.choices[0].message.refusal
        assert completion.usage.total_tokens == 7
        assert completion.moderation.output.results[0].flagged is True
        assert LEAK not in completion.model_dump_json()


@ways("helper", "parse")
def test_a_blocked_answer_raises_in_the_helpers(gateway: Gateway, sdk: Sdk) -> None:
    model = unique("bad_json" if sdk.how == "parse" else "bad")
    with pytest.raises(ContentFilterFinishReasonError):
        sdk(gateway, model)
    assert once(gateway, model)["outcome"] == "blocked"


@EVERY
def test_a_guard_that_hangs_is_a_server_error_that_nobody_repeats(
    hanging: Gateway, upstream: Upstream, sdk: Sdk
) -> None:
    model = unique("good")
    with pytest.raises(openai.InternalServerError) as caught:
        sdk(hanging, model)
    assert (caught.value.status_code, caught.value.code) == (503, "guard_unavailable")
    assert upstream.of(model) == []
    record = once(hanging, model)
    assert (record["outcome"], record["error"]) == ("guard_error", "timeout")


def test_a_guard_that_is_gone_is_asked_for_again_when_it_may_be_back(
    gone: tuple[Gateway, Path], upstream: Upstream
) -> None:
    """The SDK keeps to our retry-after, twice; what it then reports is typed."""
    gateway, _ = gone
    model = unique("good")
    began = time.monotonic()
    with pytest.raises(openai.InternalServerError) as caught:
        Sdk("create", False)(gateway, model)
    assert caught.value.code == "guard_unavailable"
    assert 2.0 <= time.monotonic() - began < 5
    eventually(lambda: len(gateway.records(model=model)) == 3)
    assert {record["error"] for record in gateway.records(model=model)} == {"unavailable"}
    assert upstream.of(model) == []


def test_a_guard_that_is_back_serves_the_sdks_second_attempt(gone: tuple[Gateway, Path], upstream: Upstream) -> None:
    gateway, path = gone
    model = unique("good")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(Sdk("stream", True), gateway, model)
        eventually(lambda: gateway.records(model=model))
        with scripted_worker(path):
            assert text_of(asked.result(20)) == GOOD
    outcomes = [record["outcome"] for record in gateway.records(model=model)]
    assert outcomes[0] == "guard_error"
    assert outcomes[-1] == "allowed"
    assert len(upstream.of(model)) == 1


@EVERY
@pytest.mark.parametrize("tenant", ["annotate", "open"])
def test_an_annotation_is_typed_beside_the_whole_answer(gateway: Gateway, sdk: Sdk, tenant: str) -> None:
    parsed = sdk.how == "parse"
    model = unique("bad_json" if parsed else "bad")
    answer = sdk(gateway, model, HARMFUL, extra_headers={"x-tenant": tenant})
    assert text_of(answer) == ('{"city": "pick a lock"}' if parsed else BAD)
    assert finish_of(answer) == ["stop"]
    last = answer[-1] if sdk.how == "stream" else answer.parse() if sdk.how == "raw" else answer
    for side in (last.moderation.input, last.moderation.output):
        assert side.type == "moderation_results"
        (result,) = side.results
        assert (result.flagged, result.categories["harmful"]) == (True, True)
        assert result.category_scores["harmful"] == 1.0
    if sdk.how != "helper":  # it keeps only what OpenAI defines
        assert ("Step 1" in json.dumps(last.x_guard)) == (tenant == "open")
    assert once(gateway, model)["outcome"] == "annotated"


@EVERY
def test_a_shadow_policy_changes_nothing_and_is_recorded(gateway: Gateway, sdk: Sdk) -> None:
    parsed = sdk.how == "parse"
    model = unique("bad_json" if parsed else "bad")
    answer = sdk(gateway, model, HARMFUL, extra_headers={"x-tenant": "shadow"})
    assert text_of(answer) == ('{"city": "pick a lock"}' if parsed else BAD)
    assert "flagged" not in repr(answer)
    record = once(gateway, model)
    assert record["outcome"] == "allowed"
    assert [(d["action"], d["would"]) for d in record["decisions"]] == [("allow", "block")] * 2
    assert all(decision["verdict"]["reasoning"] for decision in record["decisions"])


@ways("create", "stream", "helper")
@pytest.mark.parametrize(("text", "model"), [(HARMFUL, "good"), ("hello", "bad")])
def test_soft_blocks_are_ordinary_answers(gateway: Gateway, sdk: Sdk, text: str, model: str) -> None:
    model = unique(model)
    answer = sdk(gateway, model, text, extra_headers={"x-tenant": "soft"})
    assert "blocked by the content policy" in text_of(answer)
    assert finish_of(answer) == ["stop"]
    assert once(gateway, model)["outcome"] == "blocked"


@ways("create", "stream")
def test_of_two_choices_only_the_harmful_one_is_withheld(gateway: Gateway, sdk: Sdk) -> None:
    model = unique("mixed")
    answer = sdk(gateway, model, n=2)
    assert (text_of(answer, 0), finish_of(answer, 0)) == (GOOD, ["stop"])
    assert (text_of(answer, 1), finish_of(answer, 1)) == ("", ["content_filter"])
    assert LEAK not in repr(answer)
    record = once(gateway, model)
    assert [(d["choice"], d["action"]) for d in record["decisions"]] == [(None, "allow"), (0, "allow"), (1, "block")]


@ways("create", "stream")
def test_the_usage_that_was_asked_for_comes(gateway: Gateway, sdk: Sdk) -> None:
    for kind in ("good", "bad"):
        extra = {"stream_options": {"include_usage": True}} if sdk.how == "stream" else {}
        answer = sdk(gateway, unique(kind), **extra)
        last = answer[-1] if sdk.how == "stream" else answer
        assert last.usage.total_tokens == 7


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "finds a page",
            "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
        },
    }
]


@ways("create", "helper")
def test_tools_go_round(gateway: Gateway, upstream: Upstream, sdk: Sdk) -> None:
    model = unique("tools")
    first = sdk(gateway, model, tools=TOOLS)
    (call,) = first.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("look_up", {"query": "bread"})
    assert first.choices[0].finish_reason == "tool_calls"
    asked = first.choices[0].message.model_dump(exclude_none=True)
    asked.pop("parsed", None)
    for made in asked["tool_calls"]:
        made["function"].pop("parsed_arguments", None)
        made.pop("index", None)
    history = [
        {"role": "user", "content": "how long?"},
        asked,
        {"role": "tool", "tool_call_id": call.id, "content": "one hour"},
    ]
    model = unique("tools")
    assert text_of(sdk(gateway, model, history, tools=TOOLS)) == "It says one hour."
    (seen,) = upstream.of(model)
    sent = seen.json["messages"]
    assert sent[1]["tool_calls"][0]["id"] == sent[2]["tool_call_id"]


@ways("create", "stream")
def test_harm_in_a_tool_call_is_withheld(gateway: Gateway, sdk: Sdk) -> None:
    model = unique("bad_tools")
    answer = sdk(gateway, model, tools=TOOLS)
    assert finish_of(answer) == ["content_filter"]
    assert "pick a lock" not in repr(answer)
    assert once(gateway, model)["outcome"] == "blocked"


@ways("create", "stream")
@pytest.mark.parametrize(
    "spoil",
    [
        lambda tools, history: history[-1].update(content=f"page: {HARMFUL}"),
        lambda tools, history: history[-1].update(content=[{"type": "text", "text": HARMFUL}]),
        lambda tools, history: history[1]["tool_calls"][0]["function"].update(arguments=json.dumps({"q": HARMFUL})),
        lambda tools, history: tools[0]["function"].update(description=HARMFUL),
        lambda tools, history: history.insert(0, {"role": "developer", "content": HARMFUL}),
        lambda tools, history: history.insert(0, {"role": "assistant", "content": HARMFUL}),
    ],
)
def test_harm_anywhere_in_a_tool_dialogue_is_blocked(
    gateway: Gateway, upstream: Upstream, sdk: Sdk, spoil: Callable[[Any, Any], None]
) -> None:
    tools = json.loads(json.dumps(TOOLS))
    call = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
    history: list[dict[str, Any]] = [
        {"role": "user", "content": "how long?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "one hour"},
    ]
    spoil(tools, history)
    model = unique("tools")
    with pytest.raises(openai.BadRequestError) as caught:
        sdk(gateway, model, history, tools=tools)
    assert caught.value.code == "content_filter"
    assert upstream.of(model) == []


@ways("create", "stream")
def test_harm_in_visible_reasoning_is_withheld(gateway: Gateway, sdk: Sdk) -> None:
    answer = sdk(gateway, unique("thinks"))
    assert finish_of(answer) == ["content_filter"]
    assert LEAK not in repr(answer)


@ways("create", "stream", "helper")
def test_a_picture_goes_on_byte_for_byte(gateway: Gateway, upstream: Upstream, sdk: Sdk) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), "teal").save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    parts = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": url}}]
    model = unique("good")
    assert text_of(sdk(gateway, model, parts)) == GOOD
    (seen,) = upstream.of(model)
    assert seen.json["messages"][0]["content"][1]["image_url"]["url"] == url
    assert len(once(gateway, model)["content"]["images"]) == 1


@ways("create", "stream")
@pytest.mark.parametrize(
    ("part", "code"),
    [
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, "unsupported_content"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}, "invalid_image"),
        ({"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}, "forbidden_url"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, "unsupported_content"),
        ({"type": "file", "file": {"file_id": "file-1"}}, "unsupported_content"),
    ],
)
def test_a_part_that_cannot_be_judged_is_a_typed_refusal(
    gateway: Gateway, upstream: Upstream, sdk: Sdk, part: Any, code: str
) -> None:
    model = unique("good")
    with pytest.raises(openai.BadRequestError) as caught:
        sdk(gateway, model, [{"type": "text", "text": "hi"}, part])
    assert caught.value.code == code
    assert upstream.of(model) == []


def test_the_list_of_models_and_one_model(gateway: Gateway) -> None:
    with openai.OpenAI(api_key=KEY, base_url=f"{gateway.url}/v1") as client:
        assert [model.id for model in client.models.list()] == ["good"]


def test_other_endpoints_are_typed_404s(gateway: Gateway) -> None:
    with openai.OpenAI(api_key=KEY, base_url=f"{gateway.url}/v1") as client:
        for call in (
            lambda: client.responses.retrieve("resp_1"),
            lambda: client.images.generate(model="good", prompt="hi"),
            lambda: client.embeddings.create(model="good", input="hi"),
            lambda: client.moderations.create(input="hi"),
        ):
            with pytest.raises(openai.NotFoundError):
                call()
