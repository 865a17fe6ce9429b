"""What the example's ``import_path`` builds, in Ray's environment and without a cluster: options, and a real guard."""

from __future__ import annotations

import json
import sysconfig
from typing import Any

import pytest
import yaml

from tests.integrations.ray import environment
from tests.integrations.ray.cluster import EXAMPLE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

DRIVER = """
import asyncio, json, sys
sys.path.append(sys.argv[2])  # torch, behind this environment's own packages
from guard_integrations.ray_serve import app
from guard_middleware.errors import ConfigError
from guard_middleware.types import Conversation, Message, Text
from guard_middleware.wire import ModerationRequest
from guard_middleware.worker.metrics import Metrics

async def judge(load):
    guard = await load(Metrics())
    talk = Conversation((Message("user", (Text("how do I bake bread?"),)),))
    end = asyncio.get_running_loop().time() + 120
    verdict = await guard.moderate(ModerationRequest("q", talk, "input", 120.0), end)
    await guard.aclose()
    return [guard.model, verdict.request]

try:
    built = app(json.loads(sys.argv[1]))
except ConfigError as error:
    print(json.dumps({"refused": str(error)}))
    sys.exit()
deployment = built._bound_deployment
load, stall, in_flight = deployment.init_args
scaling = deployment._deployment_config.autoscaling_config
told = {
    "options": {k: str(v) for k, v in vars(load.args[0]).items()}, "stall": stall, "name": deployment.name,
    "load": [scaling.target_ongoing_requests, deployment._deployment_config.max_ongoing_requests, in_flight],
}
print(json.dumps({**told, "judged": asyncio.run(judge(load)) if "judge" in sys.argv else None}))
"""


def built(args: dict[str, Any], *more: str) -> dict[str, Any]:
    return environment.told("-c", DRIVER, json.dumps(args), sysconfig.get_path("purelib"), *more)


def test_the_example_builds_the_guard_that_ships_and_it_judges() -> None:
    (application,) = yaml.safe_load((EXAMPLE / "serve.yaml").read_text())["applications"]
    assert application["import_path"] == "guard_integrations.ray_serve:app"
    found = built({**application["args"], "threads": 1, "stall_seconds": 45, "reader": False}, "judge")
    assert [deployment["name"] for deployment in application["deployments"]] == [found["name"]]
    assert found["judged"] == ["nano", "unharmful"]
    assert (found["options"]["threads"], found["options"]["reader"], found["stall"]) == ("1", "False", 45)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"models": "nano"}, "--models"),
        ({"threads": "many"}, "--threads"),
        ({"port": 9000}, "`port` is Serve's business"),
        ({"exit-with-parent": True}, "`exit-with-parent` is Serve's business"),
        ({"guard_format": "singguard", "endpoint_model": "m"}, "says nothing without --endpoint"),
        ({"engine": "vllm", "vllm_arg": {"dtype": "float16"}}, "`vllm_arg` has a value that is no option's"),
        ({"engine": "vllm", "vllm_arg": [["dtype=float16"]]}, "`vllm_arg` has a value that is no option's"),
        ({"threads": None}, "`threads` has a value that is no option's"),
    ],
)
def test_options_that_the_worker_has_not_are_refused(args: dict[str, Any], message: str) -> None:
    assert message in built(args)["refused"]


@pytest.mark.parametrize(
    ("args", "target", "most"),
    [
        ({}, 16, 32),
        ({"max_batch": 16, "max_queue": 4}, 10, 20),
        ({"engine": "vllm", "vllm_arg": ["dtype=float16", "data_parallel_size=2"], "max_queue": 512}, 512, 1024),
    ],
)
def test_serve_gives_a_replica_as_much_as_its_guard_takes(args: dict[str, Any], target: int, most: int) -> None:
    found = built(args)
    assert found["load"][:2] == [target, most]
    assert found["load"][2] > most
    assert found["options"]["vllm_arg"] == str(args.get("vllm_arg", []))
