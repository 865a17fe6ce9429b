"""The environment in which the tests run the real Ray Serve: exact versions, in ``.clients/ray/``.

Made once (two minutes and 500 MB) and reused while ``requirements.txt`` is unchanged. It has no torch.
"""

from __future__ import annotations

import fcntl
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.clients import environments
from tests.clients.environments import CACHE, Missing

__all__ = ["Missing", "serve", "variables"]

ROOT = Path(__file__).parents[3]
_FOLDER = CACHE / "ray"
_REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def serve() -> list[str]:
    """``serve``, as its users type it; raises ``Missing`` where the environment cannot be made."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "ray.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test processes must not make it at once
        if not environments._made(_FOLDER, _REQUIREMENTS):
            _make()
    return [str(_FOLDER / "bin" / "serve")]


def _make() -> None:
    shutil.rmtree(_FOLDER, ignore_errors=True)
    environments._run([sys.executable, "-m", "venv", "--without-pip", str(_FOLDER)])
    program = str(_FOLDER / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", program, "--disable-pip-version-check", "install"]
    environments._run([*pip, "--quiet", "--no-deps", "--no-compile", "-r", str(_REQUIREMENTS)])
    environments._make(_FOLDER, _REQUIREMENTS)


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
