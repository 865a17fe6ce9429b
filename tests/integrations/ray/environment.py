"""The environment in which the tests run the real Ray Serve: exact versions, in ``.clients/ray/``.

Made once (two minutes and 500 MB) and reused while ``requirements.txt`` is unchanged. It has no torch.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.clients import environments
from tests.support.virtualenv import Missing, made

__all__ = ["Missing", "serve", "told", "variables"]

ROOT = Path(__file__).parents[3]


def serve() -> list[str]:
    """``serve``, as its users type it; raises ``Missing`` where the environment cannot be made."""
    return [str(made("ray", Path(__file__).with_name("requirements.txt")).with_name("serve"))]


def told(*arguments: str) -> dict[str, Any]:
    """What Python of that environment prints last, as JSON; skips the test where there is none."""
    try:
        python = str(Path(serve()[0]).with_name("python"))
    except Missing as error:
        pytest.skip(f"no Ray here: {error}")
    done = subprocess.run([python, *arguments], env=variables("none"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def variables(token: str, **more: str) -> Mapping[str, str]:
    """What a Ray process gets: this repository's packages, the cluster's token and a small share of the machine."""
    return {
        **environments.variables(),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'integrations'}",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",  # a cluster runs what it is sent, and its ports are open to other users of the host
        "RAY_AUTH_TOKEN": token,
        # other work on the machine must not make Ray kill replicas; the tests do that
        "RAY_memory_monitor_refresh_ms": "0",
        # nor may Ray and Serve take their own processes for dead because it is slow
        "RAY_raylet_start_wait_time_s": "150",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "90",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "90",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        **more,
    }
