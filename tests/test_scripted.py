"""The scripted upstream speaks the API well enough for an SDK, and says what it is."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from guard_middleware.scripted import ANSWERS, ScriptedUpstream


def ask(path: str, body: dict[str, Any] | None = None) -> tuple[httpx.Response, ScriptedUpstream]:
    upstream = ScriptedUpstream()

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(upstream.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://upstream") as client:
            return await (client.get(path) if body is None else client.post(path, json=body))

    return asyncio.run(run()), upstream


@pytest.mark.parametrize("model", sorted(ANSWERS))
def test_the_models_name_chooses_the_answer(model: str) -> None:
    response, upstream = ask("/v1/chat/completions", {"model": model, "messages": [], "n": 2})
    assert [choice["message"]["content"] for choice in response.json()["choices"]] == [ANSWERS[model]] * 2
    assert upstream.requests == 1
    assert "scripted upstream" in ANSWERS[model]


def test_a_stream_ends_with_usage_where_asked_and_done() -> None:
    body = {"model": "scripted-helpful", "stream": True, "stream_options": {"include_usage": True}}
    response, _ = ask("/v1/chat/completions", body)
    *events, done = [line[6:] for line in response.text.splitlines() if line]
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])
    assert text.strip() == ANSWERS["scripted-helpful"]
    assert chunks[-1]["usage"]["completion_tokens"] > 0


def test_an_unknown_model_is_the_apis_error() -> None:
    response, _ = ask("/v1/chat/completions", {"model": "gpt"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_it_lists_its_models() -> None:
    response, _ = ask("/v1/models")
    assert [model["id"] for model in response.json()["data"]] == list(ANSWERS)
