"""One replica as Serve runs it, without a cluster: started by uvicorn's lifespan, asked for its health, and scaled.

Prints one JSON object: scenario -> what was seen.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any
from unittest.mock import patch

import httpx
from ray.serve._private.constants import HEALTH_CHECK_METHOD
from ray.serve.autoscaling_policy import default_autoscaling_policy
from ray.serve.config import AutoscalingContext
from uvicorn import Config
from uvicorn.lifespan.on import LifespanOn

from guard_integrations import ray_serve
from guard_middleware.errors import GuardError
from guard_middleware.types import Conversation, Message, Text
from guard_middleware.wire import CONTENT_TYPE, ModerationRequest, encode_request
from guard_middleware.worker import app as worker
from guard_middleware.worker.metrics import Metrics
from tests.support.scripted_worker import ScriptedGuard

STALL = 60.0
QUESTION = ModerationRequest("q", Conversation((Message("user", (Text("how do I bake bread?"),)),)), "input", 5.0)


class Guard(ScriptedGuard):
    stuck = 0.0

    def stalled(self) -> float:
        return self.stuck


class Replica:
    """The deployment's class with its arguments; ``lifespan`` is what Serve starts and ends it by."""

    def __init__(self, load: ray_serve.Load) -> None:
        deployment = ray_serve.application(load, stall_seconds=STALL)._bound_deployment
        assert issubclass(deployment.func_or_class, ray_serve.Replica)  # in a wrapper of Serve's, which needs a cluster
        self._it = ray_serve.Replica(*deployment.init_args)
        self.asgi = self._it.__serve_build_asgi_app__()
        self.lifespan = LifespanOn(Config(self.asgi, lifespan="on", log_config=None))

    async def health(self) -> str:
        """What Serve is told: nothing, or the reason to replace it."""
        try:
            await getattr(self._it, HEALTH_CHECK_METHOD)()
        except Exception as error:
            return str(error)
        return ""

    async def seen(self) -> dict[str, Any]:
        transport = httpx.ASGITransport(self.asgi)
        async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
            ready = await client.get("/ready")
            headers = {"content-type": CONTENT_TYPE}
            judged = await client.post("/v1/moderate", content=encode_request(QUESTION), headers=headers)
        return {"health": await self.health(), "ready": ready.status_code, "judged": judged.status_code}


async def loads_and_gets_stuck(stalled: float) -> dict[str, Any]:
    guard, may = Guard(), asyncio.Event()

    async def load(metrics: Metrics) -> Guard:
        await may.wait()
        return guard

    replica = Replica(load)
    starting = asyncio.create_task(replica.lifespan.startup())
    await asyncio.sleep(0.1)
    found: dict[str, Any] = {"loading": {"started": starting.done(), "health": await replica.health()}}
    may.set()
    await starting
    found["sound"] = {"refused": replica.lifespan.should_exit, **await replica.seen()}
    guard.stuck = STALL - 0.5
    await asyncio.sleep(0.1)
    found["slow"] = await replica.seen()
    guard.stuck = stalled
    async with asyncio.timeout(10):
        while not await replica.health():
            await asyncio.sleep(0.01)
    found["stuck"] = await replica.seen()
    await replica.lifespan.shutdown()
    return found


async def cannot_load() -> dict[str, Any]:
    async def load(metrics: Metrics) -> Guard:
        raise GuardError("unavailable", "no such model")

    replica = Replica(load)
    await replica.lifespan.startup()
    found = {"refused": replica.lifespan.should_exit, "health": await replica.health()}
    for task in asyncio.all_tasks() - {asyncio.current_task()}:  # uvicorn ends no lifespan that did not start
        task.cancel()
    return found


def scaled(args: dict[str, Any], replicas: int, load: float) -> float:
    """How many replicas Serve's policy wants for questions in flight and queued of so many replicas' full load."""
    options = ray_serve.app(args)._bound_deployment._deployment_config
    context = dict.fromkeys(AutoscalingContext.__init__.__code__.co_varnames[1:])
    scaling, total = options.autoscaling_config, load * replicas * options.max_ongoing_requests
    context |= {"config": scaling, "current_num_replicas": replicas, "total_num_requests": total}
    wanted, _ = default_autoscaling_policy(AutoscalingContext(**context))
    return min(max(wanted, scaling.min_replicas), scaling.max_replicas)


async def main() -> dict[str, Any]:
    with patch.object(worker, "_WATCH_SECONDS", 0.01):
        return {
            "stuck": await loads_and_gets_stuck(STALL),
            "dead": await loads_and_gets_stuck(math.inf),
            "unloadable": await cannot_load(),
            "scaled": [
                [scaled(args, replicas, load) for replicas, load in ((1, 0), (1, 0.5), (1, 1), (2, 0.25), (2, 9))]
                for args in ({}, {"max_batch": 16, "max_queue": 4}, {"engine": "vllm"})
            ],
        }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main())))
