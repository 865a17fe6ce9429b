"""``serve run`` with the example's configuration, changed where a test needs it, on a cluster of its own."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import httpx
import yaml

from tests.integrations.ray import environment

EXAMPLE = environment.ROOT / "integrations" / "examples" / "ray_serve"
#: seconds; 20 on an idle machine
START = 400.0
#: ``serve run`` starts a cluster where there is none: here a small one, on loopback and without a dashboard
_SERVE_RUN = """
import sys, ray
from ray.serve.scripts import cli
small = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80_000_000, "log_to_driver": False}
ray.init(address="local", namespace="serve", _node_ip_address="127.0.0.1", **small)
cli(["run", sys.argv[1]])
"""


class Cluster:
    """The example's deployment with ``changes`` to its one application, and with ``deployment`` to its replicas."""

    def __init__(self, folder: Path, deployment: dict[str, Any], **changes: Any) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder, self.pids = folder, folder / "pids"
        self.pids.mkdir()
        self._config, self._log = folder / "serve.yaml", folder / "serve.log"
        config = yaml.safe_load((EXAMPLE / "serve.yaml").read_text())
        config["http_options"]["port"] = self.port
        (app,) = config["applications"]
        app["deployments"][0].update(deployment)
        app.update(changes)
        self._config.write_text(yaml.safe_dump(config))

    def __enter__(self) -> Self:
        python = environment.serve()[0].replace("/bin/serve", "/bin/python")
        self._temporary = tempfile.TemporaryDirectory(
            prefix="ray-", ignore_cleanup_errors=True
        )  # sockets need it short
        settings = environment.variables(
            secrets.token_hex(32), RAY_TEST_PIDS=str(self.pids), RAY_TMPDIR=self._temporary.name
        )
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(
                [python, "-c", _SERVE_RUN, str(self._config)],
                env=settings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            end = time.monotonic() + START
            while not self._up():
                if self._popen.poll() is not None:
                    said = self._log.read_text()
                    if (
                        "node timed out during startup" in said
                    ):  # Ray waits 15 s for its own agents, whatever it is told
                        raise environment.Missing("this machine is too busy for Ray's own start")
                    raise AssertionError(said[-3000:])
                assert time.monotonic() < end, f"not up in {START:g} s: {self._log.read_text()[-3000:]}"
                time.sleep(1.0)  # asking more often would only slow the start
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def replicas(self) -> list[int]:
        """The process ids of the replicas that live, the oldest first."""
        files = sorted(self.pids.iterdir(), key=lambda file: file.stat().st_mtime)
        return [int(file.name) for file in files if _lives(int(file.name))]

    def _up(self) -> bool:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)) != 0:
                return False
        try:
            return httpx.get(f"{self.url}/ready", trust_env=False, timeout=10.0).status_code == 200
        except httpx.HTTPError:
            return False

    def _stop(self) -> None:
        self._popen.send_signal(signal.SIGINT)
        try:
            self._popen.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(self._popen.pid, signal.SIGKILL)  # Ray's own processes end with their driver
            self._popen.wait()
        self._temporary.cleanup()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _lives(pid: int) -> bool:
    try:
        return "ServeReplica" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
