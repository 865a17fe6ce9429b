"""How a proxy with the guard starts, or does not: each test is a proxy of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integrations.litellm import stage
from tests.integrations.litellm.bodies import ENDPOINTS, NICE
from tests.integrations.litellm.conftest import Stage
from tests.integrations.litellm.stage import HARM, LEAK, Proxy, Upstream, guardrail
from tests.support.gateway import Process, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
CHAT = ENDPOINTS["chat"]


@pytest.mark.usefixtures("python")
def test_a_configuration_that_is_wrong_stops_the_proxy(tmp_path: Path) -> None:
    (tmp_path / "guard.yaml").write_text("policies: {default: {input: {on_harmful: maybe}}}\n")
    proxy = Proxy(tmp_path / "proxy", "http://127.0.0.1:9", [guardrail(tmp_path / "guard.yaml")]).start()
    try:
        eventually(lambda: proxy.popen.poll() is not None, seconds=stage.STARTING)
        assert proxy.popen.poll() != 0
        assert "RuntimeError" in proxy.log
        assert "write block, annotate or shadow" in proxy.log
    finally:
        proxy.stop()


def test_the_log_says_that_the_guard_is_called(scene: Stage) -> None:
    assert "guard self-test passed: guard judges requests, answers and streams" in scene.proxy.log


SUBCLASS = """
from guard_integrations.litellm import GuardMiddlewareGuardrail

class Ours(GuardMiddlewareGuardrail):
    \"\"\"Inherits every hook, which LiteLLM looks for in the class itself.\"\"\"
"""
DEAF = """
from guard_integrations.litellm import GuardMiddlewareGuardrail

class Deaf(GuardMiddlewareGuardrail):
    def should_run_guardrail(self, data, event_type):
        return False
"""


@pytest.fixture
def worker(python: Path, tmp_path: Path) -> Iterator[Path]:
    """The guard's configuration, with a worker that runs."""
    socket = tmp_path / "w.sock"
    process = Process(
        [sys.executable, str(stage.HERE / "worker.py"), "--socket", str(socket)], tmp_path, "worker ready"
    )
    process.start()
    config = tmp_path / "guard.yaml"
    config.write_text(json.dumps({"worker": {"socket": str(socket), "manage": False}}))
    yield config
    process.stop()


def test_a_subclass_guards_and_a_mode_without_post_call_judges_requests_only(worker: Path, tmp_path: Path) -> None:
    (tmp_path / "proxy").mkdir()
    (tmp_path / "proxy" / "ours.py").write_text(SUBCLASS)
    rail = guardrail(worker, guardrail="ours.Ours", mode="during_call")
    with Upstream() as upstream, Proxy(tmp_path / "proxy", upstream.url, [rail]) as proxy:
        assert proxy.post(CHAT.path, {"model": "chat/good", **CHAT.text(HARM)}).status_code == 400
        assert LEAK in proxy.post(CHAT.path, {"model": "chat/bad", **CHAT.text(NICE)}).text
        assert "self-test passed" in proxy.log
        assert "output is UNGUARDED" in proxy.log


def test_a_guardrail_that_litellm_does_not_call_stops_the_proxy(worker: Path, tmp_path: Path) -> None:
    (tmp_path / "proxy").mkdir()
    (tmp_path / "proxy" / "deaf.py").write_text(DEAF)
    proxy = Proxy(tmp_path / "proxy", "http://127.0.0.1:9", [guardrail(worker, guardrail="deaf.Deaf")]).start()
    try:
        eventually(lambda: proxy.popen.poll() is not None, seconds=stage.STARTING)
        assert "LiteLLM does not call guard before a request" in proxy.log
    finally:
        proxy.stop()


def test_a_guard_that_is_bound_to_a_model_guards_that_model_once(worker: Path, tmp_path: Path) -> None:
    with Upstream() as upstream:
        params = {"model": "openai/good", "api_base": f"{upstream.url}/v1", "api_key": "k"}
        models = [
            {"model_name": "bound", "litellm_params": {**params, "guardrails": ["guard"]}},
            {"model_name": "free", "litellm_params": params},
        ]
        rail = guardrail(worker, default_on=False)
        with Proxy(tmp_path / "proxy", upstream.url, [rail], model_list=models) as proxy:
            response = proxy.post(CHAT.path, {"model": "bound", **CHAT.text(NICE)})
            assert (response.status_code, "oven" in response.text) == (200, True), response.text
            for stream in (False, True):
                bound = proxy.post(CHAT.path, {"model": "bound", **CHAT.text(HARM), "stream": stream})
                assert bound.status_code == 400, bound.text
            assert proxy.post(CHAT.path, {"model": "free", **CHAT.text(HARM)}).status_code == 200
