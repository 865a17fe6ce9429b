"""The scripted guard as a Serve application; each replica leaves a file in ``RAY_TEST_PIDS``, its process id."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve

from guard_integrations.ray_serve import application
from guard_middleware.worker.metrics import Metrics
from tests.support.scripted_worker import ScriptedGuard


async def load(metrics: Metrics) -> ScriptedGuard:
    (Path(os.environ["RAY_TEST_PIDS"]) / str(os.getpid())).touch()
    return ScriptedGuard()


def app(args: Mapping[str, Any]) -> serve.Application:
    return application(load)
