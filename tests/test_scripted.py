"""The scripted upstream speaks every API as the services' own SDKs read it, and says what it is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anthropic
import httpx
import httpx2
import openai
import pytest

from guard_middleware.scripted import ANSWERS, Calls, ScriptedUpstream, Turn

HELPFUL = "scripted-helpful"
SCRIPT = {**ANSWERS, "calls": Calls({"query": "how long does bread need"}, "It needs an hour.")}
PARAMETERS = {"type": "object", "properties": {"query": {"type": "string"}}}
CHAT_TOOL = {"type": "function", "function": {"name": "look_up", "parameters": PARAMETERS}}
RESPONSES_TOOL = {"type": "function", "name": "look_up", "parameters": PARAMETERS}
MESSAGES_TOOL = {"name": "look_up", "input_schema": PARAMETERS}


def ask(path: str, body: dict[str, Any] | None = None) -> tuple[httpx.Response, ScriptedUpstream]:
    upstream = ScriptedUpstream()

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(upstream.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://upstream") as client:
            return await (client.get(path) if body is None else client.post(path, json=body))

    return asyncio.run(run()), upstream


class Sdks:
    """Both SDKs at one upstream."""

    def __init__(self) -> None:
        app = ScriptedUpstream(SCRIPT).app
        self.openai = openai.AsyncOpenAI(
            api_key="k", base_url="http://u/v1", http_client=httpx.AsyncClient(transport=httpx.ASGITransport(app))
        )
        self.anthropic = anthropic.AsyncAnthropic(
            api_key="k", base_url="http://u", http_client=httpx2.AsyncClient(transport=httpx2.ASGITransport(app))
        )

    async def chat(self, model: str, history: list[Any], stream: bool) -> Any:
        arguments: Any = {"model": model, "messages": history, "tools": [CHAT_TOOL]}
        if not stream:
            return (await self.openai.chat.completions.create(**arguments)).choices[0].message
        async with self.openai.chat.completions.stream(**arguments) as events:
            return (await events.get_final_completion()).choices[0].message

    async def responses(self, model: str, history: list[Any], stream: bool) -> Any:
        arguments: Any = {"model": model, "input": history, "tools": [RESPONSES_TOOL]}
        if not stream:
            return await self.openai.responses.create(**arguments)
        async with self.openai.responses.stream(**arguments) as events:
            return await events.get_final_response()

    async def messages(self, model: str, history: list[Any], stream: bool) -> Any:
        arguments: Any = {"model": model, "max_tokens": 99, "messages": history, "tools": [MESSAGES_TOOL]}
        if not stream:
            return await self.anthropic.messages.create(**arguments)
        async with self.anthropic.messages.stream(**arguments) as events:
            return await events.get_final_message()


Said = tuple[str, tuple[str, str, str] | None]


def chat_said(message: Any) -> Said:
    call = message.tool_calls[0] if message.tool_calls else None
    return message.content or "", call and (call.id, call.function.name, call.function.arguments)


def responses_said(response: Any) -> Said:
    (item,) = response.output
    return response.output_text, (item.call_id, item.name, item.arguments) if item.type == "function_call" else None


def messages_said(message: Any) -> Said:
    (block,) = message.content
    if block.type == "text":
        return block.text, None
    return "", (block.id, block.name, json.dumps(block.input, separators=(",", ":")))


def chat_turns(message: Any, id: str) -> Iterator[Any]:
    yield message.to_dict()
    yield {"role": "tool", "tool_call_id": id, "content": "an hour"}


def responses_turns(response: Any, id: str) -> Iterator[Any]:
    yield response.output[0].to_dict()
    yield {"type": "function_call_output", "call_id": id, "output": "an hour"}


def messages_turns(message: Any, id: str) -> Iterator[Any]:
    yield {"role": "assistant", "content": message.to_dict()["content"]}
    yield {"role": "user", "content": [{"type": "tool_result", "tool_use_id": id, "content": "an hour"}]}


APIS: dict[str, tuple[Callable[..., Awaitable[Any]], Callable[[Any], Said], Callable[[Any, str], Iterator[Any]]]] = {
    "chat": (Sdks.chat, chat_said, chat_turns),
    "responses": (Sdks.responses, responses_said, responses_turns),
    "messages": (Sdks.messages, messages_said, messages_turns),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("model", sorted(ANSWERS))
def test_the_models_name_chooses_the_answer(api: str, model: str, stream: bool) -> None:
    call, said, _ = APIS[api]
    user = {"role": "user", "content": "hi"}
    for name in (model, f"{model}.17"):
        assert said(asyncio.run(call(Sdks(), name, [user], stream))) == (ANSWERS[model], None)
    assert "scripted upstream" in ANSWERS[model]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", APIS)
def test_a_tool_is_called_and_its_result_answered(api: str, stream: bool) -> None:
    call, said, turns = APIS[api]

    async def run() -> None:
        sdks, user = Sdks(), {"role": "user", "content": "how long?"}
        first = await call(sdks, "calls", [user], stream)
        text, asked = said(first)
        assert asked is not None
        assert (text, asked[1:]) == ("", ("look_up", '{"query":"how long does bread need"}'))
        history = [user, *turns(first, asked[0])]
        assert said(await call(sdks, "calls", history, stream)) == ("It needs an hour.", None)

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_the_legacy_api_answers_in_text(stream: bool) -> None:
    async def run() -> str:
        api = Sdks().openai.completions
        if not stream:
            return (await api.create(model=HELPFUL, prompt="hi")).choices[0].text
        chunks = [chunk async for chunk in await api.create(model=HELPFUL, prompt="hi", stream=True)]
        assert chunks[-1].choices[0].finish_reason == "stop"
        return "".join(chunk.choices[0].text for chunk in chunks)

    assert asyncio.run(run()) == ANSWERS[HELPFUL]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_as_many_choices_as_were_asked_for(path: str) -> None:
    response, upstream = ask(path, {"model": HELPFUL, "messages": [], "prompt": "hi", "n": 2})
    assert [choice["index"] for choice in response.json()["choices"]] == [0, 1]
    assert upstream.requests == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_ends_with_usage_where_asked_and_done(path: str) -> None:
    body = {"model": HELPFUL, "prompt": "hi", "stream": True, "stream_options": {"include_usage": True}}
    response, _ = ask(path, body)
    *events, done = [line[6:] for line in response.text.splitlines() if line]
    assert done == "[DONE]"
    last = json.loads(events[-1])
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] > 0


def test_an_unknown_model_is_each_apis_error() -> None:
    async def run(call: Callable[..., Awaitable[Any]]) -> None:
        await call(Sdks(), "gpt", [{"role": "user", "content": "hi"}], False)

    for api, kind in (("chat", openai.NotFoundError), ("responses", openai.NotFoundError)):
        with pytest.raises(kind) as caught:
            asyncio.run(run(APIS[api][0]))
        assert caught.value.code == "model_not_found"
    with pytest.raises(anthropic.NotFoundError):
        asyncio.run(run(APIS["messages"][0]))


def test_it_lists_its_models() -> None:
    response, _ = ask("/v1/models")
    assert [model["id"] for model in response.json()["data"]] == list(ANSWERS)


def test_a_stream_goes_at_the_pace_it_is_given() -> None:
    paced: list[bytes] = []

    async def pace(turn: Turn, event: bytes) -> None:
        assert turn.model == HELPFUL
        paced.append(event)

    async def run() -> bytes:
        transport = httpx.ASGITransport(ScriptedUpstream(pace=pace).app)
        async with httpx.AsyncClient(transport=transport, base_url="http://u") as client:
            return (await client.post("/v1/messages", json={"model": HELPFUL, "stream": True})).content

    assert asyncio.run(run()) == b"".join(paced)
    assert len(paced) > len(ANSWERS[HELPFUL].split())
