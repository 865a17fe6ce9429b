"""What LiteLLM serves beside the APIs of the matrix: pass-through routes, MCP, and routes that nobody can judge."""

from __future__ import annotations

import base64
import contextlib
import io
import re
from typing import Any

import httpx
import pytest
import websockets.exceptions
from PIL import Image
from websockets.sync.client import connect

from tests.integrations.litellm.bodies import ENDPOINTS, NICE, picture
from tests.integrations.litellm.catalogue import tries
from tests.integrations.litellm.conftest import Stage
from tests.integrations.litellm.stage import GOOD, HARM, KEY, LEAK
from tests.support.gateway import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
PASSED = {
    "/pass/v1/chat/completions": ENDPOINTS["chat"],
    "/pass/v1/responses": ENDPOINTS["responses"],
    "/pass/v1/messages": ENDPOINTS["messages"],
}


@tries("A4")
@streamed
@pytest.mark.parametrize("path", PASSED)
def test_a_pass_through_route_of_a_known_api_is_judged_on_both_sides(scene: Stage, path: str, stream: bool) -> None:
    api = PASSED[path]

    def ask(answer: str, text: str) -> tuple[int, str, int]:
        model = api.model(answer)
        response = scene.proxy.post(path, {"model": model, **api.text(text), "stream": stream})
        return response.status_code, response.text, len(scene.upstream.of(model))

    status, text, calls = ask("good", NICE)
    assert (status, "oven" in text, calls) == (200, True, 1), text
    status, text, calls = ask("good", HARM)
    assert (status, calls) == (400, 0), text
    status, text, calls = ask("bad", NICE)
    assert (status, LEAK in text, calls) == (200, False, 1), text
    assert "blocked by the content policy" in text


@tries("G11")
def test_the_words_of_a_failing_upstream_stay_there(scene: Stage) -> None:
    for path, model in (("/pass/v1/chat/completions", "secretword.x"), ("/v1/chat/completions", "chat/secretword.x")):
        response = scene.proxy.post(path, {"model": model, **ENDPOINTS["chat"].text(NICE)})
        assert response.status_code == 404
        assert "unknown scripted model" not in response.text


@pytest.mark.parametrize("path", ["/pass/v1/embeddings", "/pass/v1/unnamed/chat/completions"])
def test_other_pass_through_routes_are_refused(scene: Stage, path: str) -> None:
    before = len(scene.upstream.bodies)
    response = scene.proxy.post(
        path, {"model": "good", **ENDPOINTS["chat"].text(NICE), "metadata": {"guardrails": ["guard"]}}
    )
    assert (response.status_code, len(scene.upstream.bodies)) == (403, before), response.text


#: routes of LiteLLM on which a text could reach a model, and a body for each
OTHERS: dict[str, dict[str, Any]] = {
    "/v1/moderations": {"model": "chat/good", "input": HARM},
    "/v1/images/generations": {"model": "chat/good", "prompt": HARM},
    "/v1/audio/speech": {"model": "chat/good", "input": HARM, "voice": "a"},
    "/v1/rerank": {"model": "chat/good", "query": HARM, "documents": [HARM]},
    "/v1beta/models/chat%2Fgood:generateContent": {"contents": [{"parts": [{"text": HARM}]}]},
    "/v1beta/models/chat%2Fgood:streamGenerateContent": {"contents": [{"parts": [{"text": HARM}]}]},
    "/v1/ocr": {"model": "chat/good", "document": {"type": "image_url", "image_url": "data:image/png;base64,AAAA"}},
    "/v1/responses/compact": {"model": "chat/good", "input": HARM},
    "/v1/videos": {"model": "chat/good", "prompt": HARM},
    "/v1/interactions": {"model": "chat/good", "input": HARM},
    "/queue/chat/completions": {"model": "chat/good", **ENDPOINTS["chat"].text(HARM)},
    "/cursor/chat/completions": {"model": "chat/good", "input": HARM, **ENDPOINTS["chat"].text(HARM)},
    "/engines/chat%2Fgood/chat/completions": ENDPOINTS["chat"].text(HARM),
    "/openai/deployments/chat%2Fgood/chat/completions": ENDPOINTS["chat"].text(HARM),
    "/openai/deployments/chat%2Fgood/completions": {"prompt": HARM},
    "/openai/v1/responses": {"model": "chat/good", "input": HARM},
    "/v1/threads": {"messages": [{"role": "user", "content": HARM}]},
    "/v1/assistants": {"model": "chat/good", "instructions": HARM},
    "/v1/search/any": {"query": HARM},
    "/v1/rag/query": {"model": "chat/good", "messages": [{"role": "user", "content": HARM}]},
    "/openai/chat/completions": {"model": "good", **ENDPOINTS["chat"].text(HARM)},
    "/anthropic/v1/messages": {"model": "good", **ENDPOINTS["messages"].text(HARM)},
    "/v1/messages/count_tokens": {"model": "claude/good", **ENDPOINTS["messages"].text(HARM)},
}


@tries("A3")
@pytest.mark.parametrize("path", OTHERS)
def test_harm_reaches_no_upstream_by_any_other_route(scene: Stage, path: str) -> None:
    before = len(scene.upstream.bodies)
    response = scene.proxy.post(path, OTHERS[path])
    harm = [body for body in scene.upstream.bodies[before:] if "pick a lock" in str(body)]
    assert harm == []
    assert GOOD not in response.text


def test_counting_tokens_is_not_shown_to_guardrails_and_generates_nothing(scene: Stage) -> None:
    """The exception that docs/litellm.md lists; once LiteLLM shows it, it belongs to the table above."""
    before = len(scene.upstream.bodies)
    response = scene.proxy.post("/v1/responses/input_tokens", {"model": "chat/good", "input": HARM})
    assert [body["path"] for body in scene.upstream.bodies[before:]] == ["/v1/responses/input_tokens"]
    assert GOOD not in response.text


def test_a_call_type_that_the_operator_names_passes_unread(scene: Stage) -> None:
    scene.proxy.post("/v1/embeddings", {"model": "chat/good.embedded", "input": HARM})
    assert len(scene.upstream.of("good.embedded")) == 1


@tries("A6", "A7")
@pytest.mark.parametrize("path", ["/v1/responses/resp_1", "/v1/files", "/v1/batches"])
def test_stored_answers_cannot_be_read(scene: Stage, path: str) -> None:
    before = len(scene.upstream.bodies)
    response = scene.proxy.get(path)
    assert response.status_code >= 400, response.text
    assert len(scene.upstream.bodies) == before


@tries("A5")
def test_websockets_reach_no_model(scene: Stage) -> None:
    before = len(scene.upstream.bodies)
    url = scene.proxy.url.replace("http", "ws") + "/v1/realtime?model=chat/good"
    headers = {"authorization": f"Bearer {KEY}"}
    said = []
    with (
        contextlib.suppress(websockets.exceptions.WebSocketException),
        connect(url, additional_headers=headers, proxy=None, open_timeout=20) as socket,
    ):
        socket.send("{}")
        said += [str(message) for message in socket]
    assert all('"error"' in message for message in said)
    assert len(scene.upstream.bodies) == before


def _tool(scene: Stage, name: str, arguments: dict[str, Any], key: str = KEY) -> httpx.Response:
    listed = scene.proxy.get("/mcp-rest/tools/list").json()
    (tool,) = [tool for tool in listed["tools"] if tool["name"].endswith(name)]
    server = tool["mcp_info"]["server_id"] if "server_id" in tool["mcp_info"] else tool["mcp_info"]["server_name"]
    asked = {"server_id": server, "name": tool["name"], "arguments": arguments}
    return scene.proxy.post("/mcp-rest/tools/call", asked, key=key)


def test_an_mcp_tool_is_called_and_its_result_comes_back(scene: Stage) -> None:
    response = _tool(scene, "say", {"text": "bread"})
    assert (response.status_code, "It said: bread" in response.text) == (200, True), response.text


def test_harm_in_an_mcp_call_never_reaches_the_tool(scene: Stage) -> None:
    response = _tool(scene, "say", {"text": HARM})
    assert "It said" not in response.text
    assert response.status_code == 400, response.text


def test_harm_in_an_mcp_result_never_reaches_the_client(scene: Stage) -> None:
    response = _tool(scene, "advise", {})
    assert LEAK not in response.text
    assert response.status_code == 400, response.text


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("red picture", 400),
        ("green picture", 200),
        ("sound", 400),
        ("bytes", 400),
        ("harmful file", 400),
        ("harmless file", 200),
        ("harmful link", 400),
        ("harm beside a text", 400),
    ],
)
def test_all_that_an_mcp_result_shows_is_judged_or_refused(scene: Stage, name: str, status: int) -> None:
    response = _tool(scene, "show", {"name": name})
    assert response.status_code == status, response.text
    if status == 200:
        (item,) = response.json()["content"]
        assert item.get("data", "") == (picture("green") if "picture" in name else "")
    else:
        assert not re.search(r"wire|UklGRg|iVBOR", response.text)


def test_the_picture_of_an_mcp_result_is_the_one_that_was_judged(scene: Stage) -> None:
    """Judged is what a model sees of it: without its alpha channel."""
    (item,) = _tool(scene, "show", {"name": "picture with alpha"}).json()["content"]
    assert Image.open(io.BytesIO(base64.b64decode(item["data"]))).mode == "RGB"


@pytest.mark.parametrize("key", ["sk-key-annotate", "sk-team-annotate"])
def test_key_and_team_select_the_policy_of_mcp_calls_and_results(scene: Stage, key: str) -> None:
    tenant = key[3:].replace("-", ":", 1)

    def judged() -> int:
        return len([decision for decision in scene.decisions() if decision["tenant"] == tenant])

    before = judged()
    for name, arguments in (("advise", {}), ("say", {"text": HARM})):
        response = _tool(scene, name, arguments, key)
        assert response.status_code == 200, response.text
    eventually(lambda: judged() >= before + 4), judged()
