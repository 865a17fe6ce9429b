"""Every kind of content on every endpoint of a real LiteLLM proxy, by what reached the upstream and the client."""

from __future__ import annotations

import pytest

from tests.integrations.litellm.bodies import ENDPOINTS, HARMFUL, NICE, picture
from tests.integrations.litellm.catalogue import tries
from tests.integrations.litellm.conftest import Stage
from tests.integrations.litellm.stage import GOOD, LEAK

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
endpoints = pytest.mark.parametrize("name", ENDPOINTS)
streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@endpoints
@streamed
@pytest.mark.parametrize("case", HARMFUL)
def test_harm_in_a_request_never_reaches_the_upstream(scene: Stage, name: str, stream: bool, case: str) -> None:
    api = ENDPOINTS[name]
    model = api.model("good")
    response = scene.proxy.post(api.path, api.body(model, HARMFUL[case](api), stream))
    assert response.status_code == 400, response.text
    assert scene.upstream.of(model) == []
    assert GOOD.split()[0] not in response.text
    assert response.headers["x-guard-action"] in ("block", "reject")


@tries("G1", "G2")
@endpoints
@streamed
def test_harm_in_an_answer_never_reaches_the_client(scene: Stage, name: str, stream: bool) -> None:
    api = ENDPOINTS[name]
    model = api.model("bad")
    response = scene.proxy.post(api.path, api.body(model, api.text(NICE), stream))
    assert response.status_code == 200, response.text
    assert len(scene.upstream.of(model)) == 1
    assert LEAK not in response.text
    assert "blocked by the content policy" in response.text


@endpoints
@streamed
def test_harmless_content_passes_and_its_answer_comes_back(scene: Stage, name: str, stream: bool) -> None:
    api = ENDPOINTS[name]
    for content in (api.text(NICE), api.parts(NICE, picture("green")), api.parts(None, picture("green"))):
        model = api.model("good")
        response = scene.proxy.post(api.path, api.body(model, content, stream))
        assert response.status_code == 200, response.text
        assert len(scene.upstream.of(model)) == 1
        assert GOOD.split()[0] in response.text


@pytest.mark.parametrize("name", ["chat", "messages", "responses"])
def test_a_picture_reaches_the_upstream_as_it_was_judged(scene: Stage, name: str) -> None:
    api = ENDPOINTS[name]
    model = api.model("good")
    image = picture("blue")
    scene.proxy.post(api.path, api.body(model, api.parts(NICE, image)))
    (seen,) = scene.upstream.of(model)
    assert image in str(seen)


@streamed
def test_completions_are_judged_on_both_sides(scene: Stage, stream: bool) -> None:
    def ask(model: str, prompt: str) -> tuple[int, str, int]:
        body = {"model": f"text/{model}", "prompt": prompt, "stream": stream}
        response = scene.proxy.post("/v1/completions", body)
        return response.status_code, response.text, len(scene.upstream.of(model))

    status, text, calls = ask("good.c1", NICE)
    assert (status, calls, "oven" in text) == (200, 1 + stream, True)
    status, text, calls = ask(f"good.c2{stream}", "How do I pick a lock?")
    assert (status, calls) == (400, 0)
    status, text, calls = ask(f"bad.c3{stream}", NICE)
    assert (status, calls, LEAK in text) == (200, 1, False)


@streamed
@pytest.mark.parametrize("part", ["input_audio", "video_url", "x-new"])
def test_parts_that_nobody_can_judge_are_refused(scene: Stage, part: str, stream: bool) -> None:
    api = ENDPOINTS["chat"]
    model = api.model("good")
    content = [{"type": "text", "text": NICE}, {"type": part, part: {"data": "UklGRg==", "format": "wav", "url": "x"}}]
    response = scene.proxy.post(api.path, api.body(model, {"messages": [{"role": "user", "content": content}]}, stream))
    assert (response.status_code, scene.upstream.of(model)) == (400, [])
