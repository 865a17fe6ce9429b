"""Policies, records, headers, errors and faults, on a real LiteLLM proxy."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.integrations.litellm.bodies import ENDPOINTS, NICE
from tests.integrations.litellm.catalogue import tries
from tests.integrations.litellm.conftest import Stage
from tests.integrations.litellm.stage import HARM, KEY, LEAK
from tests.support.gateway import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
CHAT = ENDPOINTS["chat"]
three = pytest.mark.parametrize("name", ["chat", "messages", "responses"])
streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def _record(scene: Stage, call_id: str) -> dict[str, Any]:
    """LiteLLM's own logging record of a request, which it writes after its answer."""
    found = eventually(lambda: [record for record in scene.proxy.records() if call_id in json.dumps(record)])
    return found[0]  # type: ignore[no-any-return]


# -- who asks selects the policy --


@pytest.mark.parametrize("key", ["sk-key-annotate", "sk-team-annotate"])
def test_key_and_team_select_the_policy(scene: Stage, key: str) -> None:
    body = {"model": "chat/good", **CHAT.text(HARM)}
    response = scene.proxy.post(CHAT.path, body, key=key)
    assert (response.status_code, response.headers["x-guard-action"]) == (200, "annotate"), response.text
    assert scene.proxy.post(CHAT.path, body).status_code == 400
    tenant = key[3:].replace("-", ":", 1)
    assert eventually(lambda: [d for d in scene.decisions() if d["tenant"] == tenant])


def test_the_model_selects_the_policy(scene: Stage) -> None:
    for model, status in (("good.annotate", 200), ("good.other", 400)):
        assert scene.proxy.post(CHAT.path, {"model": f"chat/{model}", **CHAT.text(HARM)}).status_code == status


def test_the_raw_key_is_in_no_record(scene: Stage) -> None:
    scene.proxy.post(CHAT.path, {"model": "chat/good", **CHAT.text(NICE)}, key="sk-unmistakable")
    assert "sk-unmistakable" not in (scene.folder / "decisions.jsonl").read_text()


# -- what policies do --


def decided(scene: Stage, response: httpx.Response) -> dict[str, Any]:
    """The record of a request, which is written beside its answer."""
    id = response.headers["x-guard-decision-id"]
    return eventually(lambda: [d for d in scene.decisions() if id.startswith(d["id"])])[0]


@three
@streamed
def test_annotations_come_in_the_apis_own_form(scene: Stage, name: str, stream: bool) -> None:
    api = ENDPOINTS[name]
    response = scene.proxy.post(api.path, {"model": f"{api.shape}/bad.annotate", **api.text(HARM), "stream": stream})
    assert (response.status_code, LEAK in response.text) == (200, True), response.text
    assert "x_guard" in response.text or '"flagged":true' in response.text
    if not stream:
        assert response.headers["x-guard-action"] == "annotate"
        assert response.headers["x-guard-decision-id"].startswith("gd_")


@three
@streamed
def test_a_soft_refusal_is_an_ordinary_answer(scene: Stage, name: str, stream: bool) -> None:
    api = ENDPOINTS[name]
    before = len(scene.upstream.bodies)
    body = {"model": f"{api.shape}/good.soft", **api.text(HARM), "stream": stream}
    response = scene.proxy.post(api.path, body)
    assert (response.status_code, "blocked by the content policy" in response.text) == (200, True), response.text
    assert scene.upstream.bodies[before:] == []


@three
def test_shadow_changes_nothing_and_records_what_it_would_have_done(scene: Stage, name: str) -> None:
    api = ENDPOINTS[name]
    response = scene.proxy.post(api.path, {"model": f"{api.shape}/bad.shadow", **api.text(NICE)})
    assert (response.status_code, LEAK in response.text, "x_guard" in response.text) == (200, True, False)
    decision = decided(scene, response)
    assert [d["would"] for d in decision["decisions"]] == ["allow", "block"]


@three
@streamed
def test_in_a_race_the_upstream_is_called_and_the_client_gets_the_refusal(
    scene: Stage, name: str, stream: bool
) -> None:
    api = ENDPOINTS[name]
    before = len(scene.upstream.bodies)
    body = {"model": f"{api.shape}/good.race", **api.text(f"[wait 0.3] {HARM}"), "stream": stream}
    response = scene.proxy.post(api.path, body)
    assert response.status_code == 400, response.text
    assert "Bread" not in response.text
    assert len(scene.upstream.bodies) == before + 1


@pytest.mark.parametrize("name", ["chat", "messages", "responses over an Anthropic upstream"])
def test_a_window_is_released_before_the_stream_has_ended(scene: Stage, name: str) -> None:
    api = ENDPOINTS[name]
    body = {"model": f"{api.shape}/long.window", **api.text(NICE), "stream": True}
    response = scene.proxy.post(api.path, body)
    assert (response.status_code, LEAK in response.text) == (200, False), response.text
    assert "harmless" in response.text
    assert "blocked by the content policy" in response.text


# -- what is said of it --


@three
@streamed
def test_verdict_and_reasoning_are_in_litellms_record_and_not_in_the_answer(
    scene: Stage, name: str, stream: bool
) -> None:
    api = ENDPOINTS[name]
    for answer, text, action in (("good", NICE, "allow"), ("good", HARM, "block"), ("bad", NICE, "block")):
        model = api.model(answer)
        response = scene.proxy.post(api.path, {"model": f"{api.shape}/{model}", **api.text(text), "stream": stream})
        assert "Step 1" not in response.text
        record = _record(scene, model)
        entries = record["guardrail_information"]
        said = entries[-1]["guardrail_response"]
        assert (entries[-1]["guardrail_name"], entries[-1]["guardrail_provider"]) == ("guard", "guard_middleware")
        assert said["action"] == action, entries
        assert said["reasoning"].startswith("Step 1")
        assert said["decision_id"].startswith("gd_")
        status = {"allow": "success", "block": "guardrail_intervened"}[action]
        assert entries[-1]["guardrail_status"] == status


def test_the_guards_spans_are_below_litellms(scene: Stage) -> None:
    response = scene.proxy.post(CHAT.path, {"model": "chat/good", **CHAT.text(NICE)})
    id = response.headers["x-guard-decision-id"]

    def spans() -> list[Any]:
        return [span for span in scene.collector.spans if id in str(span)]

    ours = eventually(spans)[0]
    above = eventually(lambda: [span for span in scene.collector.spans if span.span_id == ours.parent_span_id])
    assert above[0].trace_id == ours.trace_id
    assert "guard_middleware.convention" not in str(above[0])


def test_the_openai_sdk_raises_its_own_error_for_a_refusal(scene: Stage) -> None:
    client = openai.OpenAI(api_key=KEY, base_url=f"{scene.proxy.url}/v1", max_retries=0)
    with client, pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="chat/good", messages=[{"role": "user", "content": HARM}])
    assert caught.value.body["provider_specific_fields"]["error_code"] == "content_filter"  # type: ignore[index]


# -- faults --


@tries("E10")
def test_without_a_worker_requests_fail_closed_and_recover(scene: Stage) -> None:
    """Killed before a request, and started again."""
    before = len(scene.upstream.bodies)
    with scene.without_worker():
        for name, stream in (("chat", False), ("chat", True), ("messages", False), ("responses", True)):
            api = ENDPOINTS[name]
            response = scene.proxy.post(api.path, {"model": f"{api.shape}/good", **api.text(NICE), "stream": stream})
            assert response.status_code == 503, response.text
            assert response.json()["error"]["message"].startswith("The content could not be moderated")
            assert response.headers["x-guard-action"] == "error"
        client = openai.OpenAI(api_key=KEY, base_url=f"{scene.proxy.url}/v1", max_retries=0)
        with client, pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="chat/good", messages=[{"role": "user", "content": NICE}])
        assert caught.value.status_code == 503
        assert scene.upstream.bodies[before:] == []
        model = CHAT.model("good")
        scene.proxy.post(CHAT.path, {"model": f"chat/{model}", **CHAT.text(NICE)})
        entry = _record(scene, model)["guardrail_information"][-1]
        assert entry["guardrail_status"] == "guardrail_failed_to_respond"


@pytest.mark.parametrize("policy", ["hold", "window"])
@pytest.mark.parametrize("name", ["chat", "messages", "responses over an Anthropic upstream"])
def test_a_worker_that_dies_under_a_stream_ends_it_with_an_error(scene: Stage, name: str, policy: str) -> None:
    """What was judged before may be out, nothing after it; the upstream goes on meanwhile and ends well."""
    api = ENDPOINTS[name]
    model = f"long.{policy}"
    before = len(scene.upstream.of(model))
    body = {"model": f"{api.shape}/{model}", **api.text(NICE), "stream": True}
    headers = {"authorization": f"Bearer {KEY}"}
    shown: list[str] = []

    def ask() -> int:
        url = f"{scene.proxy.url}{api.path}"
        with httpx.stream("POST", url, json=body, headers=headers, timeout=60, trust_env=False) as response:
            for piece in response.iter_text():
                shown.append(piece)
            return response.status_code

    with ThreadPoolExecutor(1) as asking:
        status = asking.submit(ask)
        if policy == "window":
            eventually(lambda: "harmless" in "".join(shown))
        else:
            eventually(lambda: len(scene.upstream.of(model)) > before)
        with scene.without_worker():
            ended = status.result(60)
    text = "".join(shown)
    assert LEAK not in text, text
    assert ("harmless" in text) is (policy == "window"), text
    assert ended in ((200,) if policy == "window" else (200, 503))
    assert "could not be moderated" in text
    decision = eventually(lambda: [d for d in scene.decisions() if d["model"] == f"{api.shape}/{model}"])[-1]
    assert decision["decisions"][-1]["basis"] == "error"


def test_the_openai_sdk_raises_in_a_stream_whose_worker_dies(scene: Stage) -> None:
    client = openai.OpenAI(api_key=KEY, base_url=f"{scene.proxy.url}/v1", max_retries=0)
    said = [{"role": "user", "content": NICE}]
    with client, client.chat.completions.create(model="chat/long.window", messages=said, stream=True) as stream:  # type: ignore[call-overload]
        next(stream)
        with scene.without_worker(), pytest.raises(openai.APIError):
            list(stream)


def test_an_operator_may_fail_open_and_the_record_says_so(scene: Stage) -> None:
    with scene.without_worker():
        response = scene.proxy.post(CHAT.path, {"model": "chat/good.open", **CHAT.text(NICE)})
        assert response.status_code == 200, response.text
    decision = decided(scene, response)
    assert decision["bypassed"] != []


def test_a_client_that_goes_away_leaves_a_record(scene: Stage) -> None:
    with pytest.raises(httpx.TimeoutException):
        httpx.post(
            f"{scene.proxy.url}{CHAT.path}",
            json={"model": "chat/good.gone", **CHAT.text(f"[wait 2] {NICE}"), "stream": True},
            headers={"authorization": f"Bearer {KEY}"},
            timeout=0.5,
            trust_env=False,
        )
    time.sleep(0.1)
    eventually(lambda: [d for d in scene.decisions() if d["model"] == "chat/good.gone"])
