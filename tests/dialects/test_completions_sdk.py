"""The legacy shapes through the real openai SDK: what a caller's code sees, call by call. No network."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from guard_middleware import enforce
from guard_middleware.dialects import COMPLETIONS
from guard_middleware.dialects.base import Options, ParsedRequest, Reply, Ruling
from guard_middleware.types import Action
from tests.support import sdk

ASK: dict[str, Any] = {"model": "m", "prompt": "hi"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
HEAD = {"id": "c", "object": "text_completion", "created": 1, "model": "m"}

CALLS: dict[str, Callable[[openai.OpenAI], Any]] = {
    "create": lambda client: client.completions.create(**ASK),
    "create stream": lambda client: list(client.completions.create(**ASK, stream=True)),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))


def answering(what: Ruling, *texts: str) -> sdk.Gateway:
    def choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
        return {"text": text, "index": index, "logprobs": None, "finish_reason": finish}

    def stream(request: ParsedRequest) -> bytes:
        pieces = [choice(i, letter, None) for i, text in enumerate(texts) for letter in text]
        bodies: list[Any] = [
            {**HEAD, "choices": [p]} for p in [*pieces, *(choice(i, "", "stop") for i in range(len(texts)))]
        ]
        bodies += [{**HEAD, "choices": [], "usage": USAGE}] if request.include_usage else []
        return b"".join(f"data: {line}\n\n".encode() for line in [*map(json.dumps, bodies), "[DONE]"])

    whole = {**HEAD, "choices": [choice(i, text, "stop") for i, text in enumerate(texts)], "usage": USAGE}
    return sdk.answering(COMPLETIONS, what, lambda request: whole, stream)


@each_call
def test_a_blocked_prompt_is_a_typed_error_and_not_retried(call: Callable[[openai.OpenAI], Any]) -> None:
    gateway = sdk.failing(COMPLETIONS, enforce.blocked_prompt(sdk.notice("input", Action.BLOCK)))
    with pytest.raises(openai.BadRequestError) as caught:
        call(gateway.client())
    assert (caught.value.code, caught.value.param, gateway.hits) == ("content_filter", "prompt", 1)


@each_call
def test_a_dead_guard_is_a_server_error_and_not_retried(call: Callable[[openai.OpenAI], Any]) -> None:
    gateway = sdk.failing(COMPLETIONS, sdk.unavailable())
    with pytest.raises(openai.InternalServerError) as caught:
        call(gateway.client())
    assert (caught.value.code, gateway.hits) == ("guard_unavailable", 1)


@pytest.mark.parametrize("action", [Action.ALLOW, Action.ANNOTATE])
def test_an_answer_that_is_let_through_is_whole(action: Action) -> None:
    done = CALLS["create"](answering(sdk.ruling(action), "hello").client())
    assert (done.choices[0].text, done.choices[0].finish_reason, done.usage.total_tokens) == ("hello", "stop", 5)
    assert ("moderation" in done.model_extra) is (action is Action.ANNOTATE)
    chunks = CALLS["create stream"](answering(sdk.ruling(action), "hello").client())
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hello"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_blocked_answer_is_empty_and_says_why() -> None:
    done = CALLS["create"](answering(sdk.ruling(Action.BLOCK), "bad").client())
    assert (done.choices[0].text, done.choices[0].finish_reason, done.usage.total_tokens) == ("", "content_filter", 5)
    chunks = CALLS["create stream"](answering(sdk.ruling(Action.BLOCK), "bad").client())
    assert "".join(chunk.choices[0].text for chunk in chunks) == ""
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["content_filter"]
    assert chunks[-1].model_extra["moderation"]["output"]["results"][0]["flagged"] is True


def test_usage_ends_a_stream_that_asked_for_it() -> None:
    client = answering(sdk.ruling(Action.ALLOW, Action.BLOCK), "hello", "bad").client()
    chunks = list(client.completions.create(**ASK, n=2, stream=True, stream_options={"include_usage": True}))
    said = ["".join(c.text for chunk in chunks for c in chunk.choices if c.index == i) for i in (0, 1)]
    assert said == ["hello", ""]
    assert chunks[-1].usage is not None


def test_an_error_in_mid_stream_is_raised() -> None:
    def reply(request: ParsedRequest) -> Reply:
        data = COMPLETIONS.stream_parser(request, Options()).fail(sdk.unavailable())
        return Reply(200, ((b"content-type", b"text/event-stream"),), data)

    with pytest.raises(openai.APIError) as caught:
        CALLS["create stream"](sdk.Gateway(COMPLETIONS, reply).client())
    assert caught.value.code == "guard_unavailable"


@each_call
def test_a_soft_block_of_the_prompt_is_an_ordinary_answer(call: Callable[[openai.OpenAI], Any]) -> None:
    soft = sdk.Gateway(COMPLETIONS, lambda r: COMPLETIONS.soft_block(r, sdk.notice("input", Action.BLOCK), 1))
    done = call(soft.client())
    last = done[-1] if isinstance(done, list) else done
    assert "decision d.input.0" in last.choices[0].text
    assert last.choices[0].finish_reason == "stop"
