"""What an application does with the guard in LiteLLM's SDK beside plain calls: ``sdk_scenarios`` does it, for real."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.clients import environments
from tests.integrations.litellm import stage
from tests.integrations.litellm.sdk_stage import Application, application
from tests.support.gateway import scripted_worker

__all__ = ["application"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SCENARIOS = re.findall(r"^@scenario\ndef (\w+)", (stage.HERE / "sdk_scenarios.py").read_text(), re.MULTILINE)
POLICIES: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "window": {"output": {"stream": {"mode": "window"}}},
    "soft": {"block_style": "soft"},
    "annotate": {"output": {"on_harmful": "annotate"}},
    "race": {"race": True},
}
EXAMPLE = stage.REPOSITORY / "integrations" / "examples" / "litellm_sdk"
BLOCKED = "GuardBlocked"
DOWN = "GuardUnavailable"


class Uses:
    """What each scenario found, and the decision logs of its configurations."""

    def __init__(self, application: Application, found: Mapping[str, Any], configs: Mapping[str, str]) -> None:
        self.application, self._found, self._configs = application, found, configs

    def __getitem__(self, scenario: str) -> Any:
        found = self._found[scenario]
        assert not (isinstance(found, dict) and "failed" in found), found["failed"]
        return found

    def records(self, config: str, model: str) -> list[dict[str, Any]]:
        log = Path(self._configs[config]).with_suffix(".jsonl")
        lines = map(json.loads, log.read_text().splitlines())
        return [line for line in lines if line["model"] == f"openai/{model}"]

    def upstream(self, model: str) -> list[dict[str, Any]]:
        return self.application.upstream.of(model)


@pytest.fixture(scope="module")
def uses(application: Application) -> Uses:
    configs = {name: application.config(policies={"default": policy}) for name, policy in POLICIES.items()}
    mortal = application.folder / "mortal.sock"
    asked_each_time = {"worker": {"socket": str(mortal), "manage": False}, "cache": {"verdicts": {"entries": 0}}}
    tenants = {"header": "x-tenant", "match": [{"tenant": "team-a", "policy": "watched"}]}
    watched = {"watched": {"input": {"on_harmful": "annotate"}}}
    configs |= {"tenants": application.config(tenants=tenants, policies=watched)}
    configs |= {"mortal": application.config(**asked_each_time), "broken": application.config(nonsense=1)}
    with scripted_worker(mortal) as worker:
        given = {
            "url": application.upstream.url,
            "configs": configs,
            "mortal": worker.popen.pid,
            "image": picture(),
            "scenarios": SCENARIOS,
        }
        results = application.run("sdk_scenarios.py", given)
    return Uses(application, {result["name"]: result["found"] for result in results}, configs)


def picture() -> str:
    """A PNG with a text after its end, which no image that is sent on may have."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 10, 10)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue() + b"and pick a lock").decode()


def raised(found: Any, name: str, status: int) -> bool:
    return found.get("error", [""])[0] == name and found["status"] == status


def test_every_scenario_has_a_test() -> None:
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert set(SCENARIOS) <= tests


def test_installing_twice_does_nothing_and_another_configuration_is_refused(uses: Uses) -> None:
    found = uses["installing_twice_does_nothing_and_another_configuration_is_refused"]
    assert found["same"]
    assert found["other"]["error"][0] == "RuntimeError"
    assert "uninstall() first" in found["other"]["message"]
    assert found["restored"]


def test_without_the_guard_all_passes_again(uses: Uses) -> None:
    assert uses["without_the_guard_all_passes_again"] == {"passes": True}


def test_an_unknown_release_is_refused(uses: Uses) -> None:
    found = uses["an_unknown_release_is_refused"]
    assert found["unknown"]["error"][0] == "RuntimeError"
    assert "pip install 'litellm>=9.0,<9.1'" in found["unknown"]["message"]
    assert found["still"]


def test_a_function_that_is_not_litellms_is_refused(uses: Uses) -> None:
    found = uses["a_function_that_is_not_litellms_is_refused"]
    assert (found["error"][0], "another library" in found["message"]) == ("RuntimeError", True)


def test_a_broken_configuration_is_refused(uses: Uses) -> None:
    found = uses["a_broken_configuration_is_refused"]
    assert (found["error"][0], "nonsense" in found["message"]) == ("RuntimeError", True)


def test_a_block_is_not_retried(uses: Uses) -> None:
    found = uses["a_block_is_not_retried"]
    assert all(raised(one, BLOCKED, 400) for one in found.values()), found
    assert len(uses.records("plain", "good.retry")) == len(found)
    assert uses.upstream("good.retry") == []


def test_a_guard_that_is_down_fails_closed_and_is_not_retried(uses: Uses) -> None:
    found = uses["a_guard_that_is_down_fails_closed_and_is_not_retried"]
    assert "oven" in found.pop("before")
    assert all(raised(one, DOWN, 503) for one in found.values()), found
    assert len(uses.records("mortal", "good.down")) == len(found)
    assert uses.upstream("good.down") == []


def test_a_cached_answer_is_judged_too(uses: Uses) -> None:
    found = uses["a_cached_answer_is_judged_too"]
    assert stage.LEAK in found["raw"]
    assert found["finish"] == "content_filter"
    assert stage.LEAK not in found["again"] + found["stream"]
    assert "content_filter" in found["stream"]
    # the second call is answered from LiteLLM's cache, a streamed one has an entry of its own there
    assert len(uses.upstream("bad.cached")) == 2


def test_a_stream_is_cut_in_its_middle(uses: Uses) -> None:
    found = uses["a_stream_is_cut_in_its_middle"]
    assert found["text"].startswith("A harmless word. ")
    assert found["async"].startswith("A harmless word. ")
    assert found["finish"] == "content_filter"
    assert stage.LEAK not in json.dumps(found)


def test_a_stream_that_is_dropped_is_recorded(uses: Uses) -> None:
    assert uses["a_stream_that_is_dropped_is_recorded"]["after"] == {"value": "over"}
    for model in ("long.dropped", "long.closed", "long.left"):
        assert [record["outcome"] for record in uses.records("window", model)] == ["aborted"]


def test_a_cancelled_call_is_recorded(uses: Uses) -> None:
    assert uses["a_cancelled_call_is_recorded"] == {"cancelled": True}
    assert [record["outcome"] for record in uses.records("plain", "good.cancelled")] == ["aborted"]
    assert uses.upstream("good.cancelled") == []


def test_soft_refusals_have_litellms_types(uses: Uses) -> None:
    found = uses["soft_refusals_have_litellms_types"]
    refusal = "The request was blocked by the content policy"
    assert (found["whole"][0], found["whole"][1].startswith(refusal)) == ("ModelResponse", True)
    assert (found["stream"][:2], found["stream"][2].startswith(refusal)) == (["CustomStreamWrapper", True], True)
    assert (found["response"][0], found["response"][1].startswith(refusal)) == ("ResponsesAPIResponse", True)
    assert (found["events"][0], found["events"][-1]) == ("response.created", "response.completed")
    assert found["router"].startswith(refusal)
    assert uses.upstream("good.soft") == []


def test_an_annotation_is_on_the_answer(uses: Uses) -> None:
    found = uses["an_annotation_is_on_the_answer"]
    assert found["text"] == stage.BAD
    assert found["moderation"]["output"]["results"][0]["flagged"] is True


def test_a_race_ends_blocked(uses: Uses) -> None:
    found = uses["a_race_ends_blocked"]
    assert raised(found["whole"], BLOCKED, 400)
    assert raised(found["stream"], BLOCKED, 400)


def test_upstream_errors_stay_litellms(uses: Uses) -> None:
    found = uses["upstream_errors_stay_litellms"]
    assert raised(found["unknown model"], "NotFoundError", 404)
    assert raised(found["in a stream"], "NotFoundError", 404)
    assert raised(found["unreachable"], "InternalServerError", 500)
    assert [record["outcome"] for record in uses.records("plain", "nobody")] == ["upstream_error", "upstream_error"]


def test_what_was_judged_is_what_is_sent(uses: Uses) -> None:
    uses["what_was_judged_is_what_is_sent"]
    (sent,) = uses.upstream("good.sent.2")
    assert [message["role"] for message in sent["messages"]] == ["user", "assistant", "user"]
    assert sent["response_format"]["json_schema"]["name"] == "Answer"
    assert (sent["temperature"], sent["top_k"]) == (0.5, 4)
    assert "metadata" not in sent
    (pictured,) = uses.upstream("good.sent.3")
    url = pictured["messages"][0]["content"][1]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    assert b"pick a lock" not in base64.b64decode(url.partition(",")[2])


def test_what_carries_a_prompt_past_the_guard_is_refused(uses: Uses) -> None:
    found = uses["what_carries_a_prompt_past_the_guard_is_refused"]
    harmful = {"harmful in extra_body", "litellm's own flag"}
    assert {name for name, one in found.items() if raised(one, BLOCKED, 400)} == harmful
    assert {name for name, one in found.items() if raised(one, "GuardRefused", 400)} == found.keys() - harmful
    assert uses.upstream("good.past") == []


def test_other_calls_are_refused_unless_they_are_named(uses: Uses) -> None:
    found = uses["other_calls_are_refused_unless_they_are_named"]
    for name in ("refused", "refused async"):
        assert raised(found[name], "GuardRefused", 400)
        assert "install(unread=" in found[name]["message"]
    assert raised(found["named"], "NotFoundError", 404)  # it reached the upstream, which has no such route


def test_many_threads_and_tasks_share_one_guard(uses: Uses) -> None:
    found = uses["many_threads_and_tasks_share_one_guard"]
    assert (found["blocked"], found["answered"], found["async blocked"], found["async"]) == (10, 10, 10, 20)
    assert found["portals left"] == 0


def test_a_forked_process_has_a_guard_of_its_own(uses: Uses) -> None:
    assert raised(uses["a_forked_process_has_a_guard_of_its_own"], BLOCKED, 400)


def test_the_tenant_chooses_the_policy(uses: Uses) -> None:
    found = uses["the_tenant_chooses_the_policy"]
    assert "oven" in found["team-a"]["value"]
    assert raised(found["team-b"], BLOCKED, 400)


def test_a_tool_call_is_judged(uses: Uses) -> None:
    found = uses["a_tool_call_is_judged"]
    assert found["whole"] == ["content_filter", "None"]
    assert stage.LEAK not in found["stream"]
    assert "content_filter" in found["stream"]


def test_the_example_runs_as_its_readme_says(application: Application, tmp_path: Path) -> None:
    for file in EXAMPLE.iterdir():
        shutil.copy(file, tmp_path)
    environment = {
        **environments.variables(),
        "PYTHONPATH": os.pathsep.join([str(stage.REPOSITORY), str(stage.REPOSITORY / "integrations")]),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "UPSTREAM_URL": f"{application.upstream.url}/v1",
        "UPSTREAM_KEY": "k",
    }

    def asked(model: str, *questions: str) -> str:
        done = subprocess.run(
            [str(stage.python()), "ask.py", *questions],
            cwd=tmp_path,
            env={**environment, "MODEL": f"openai/{model}"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    with scripted_worker(tmp_path / "guard.sock"):
        good = asked("good.example", "How do I bake bread?", stage.HARM)
        bad = asked("bad.example", "How do I bake bread?")
    assert good.count(f"{stage.GOOD} [stop]") == 2
    assert "blocked:" in good
    assert "decision gd_" in good
    assert bad.count("[content_filter]") == 2
    assert stage.LEAK not in bad
    decisions = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert [one["outcome"] for one in decisions] == ["allowed", "allowed", "blocked", "blocked", "blocked"]
