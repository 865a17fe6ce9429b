"""``serve run`` with the example's configuration, changed where a test needs it, on a cluster of its own."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Self

import httpx
import yaml

from tests.integrations.ray import environment
from tests.support.gateway import eventually

EXAMPLE = environment.ROOT / "integrations" / "examples" / "ray_serve"
#: seconds for each of the cluster and its deployment; they take 10 on an idle machine
START = 150.0


class Cluster:
    """The example's deployment with ``changes`` to its one application, and with ``deployment`` to its replicas."""

    def __init__(self, folder: Path, deployment: dict[str, Any], **changes: Any) -> None:
        port = free_port()
        self._processes: list[subprocess.Popen[bytes]] = []
        self.url = f"http://127.0.0.1:{port}"
        self.folder, self.pids = folder, folder / "pids"
        self.pids.mkdir()
        self._config = folder / "serve.yaml"
        config = yaml.safe_load((EXAMPLE / "serve.yaml").read_text())
        config["http_options"]["port"] = port
        (app,) = config["applications"]
        app["deployments"][0].update(deployment)
        app.update(changes)
        self._config.write_text(yaml.safe_dump(config))

    def __enter__(self) -> Self:
        serve = environment.serve()
        self._temporary = tempfile.TemporaryDirectory(
            prefix="ray-", ignore_cleanup_errors=True
        )  # sockets need it short
        self._settings = environment.variables(
            secrets.token_hex(32), RAY_TEST_PIDS=str(self.pids), RAY_TMPDIR=self._temporary.name
        )
        port = free_port()
        head = ["start", "--head", "--block", "--include-dashboard=false", "--num-cpus=1", f"--port={port}"]
        head += ["--node-ip-address=127.0.0.1", "--object-store-memory=80000000"]
        try:
            ray = self._start("ray", [str(Path(serve[0]).with_name("ray")), *head])
            eventually(lambda: _listens(port) or ray.poll() is not None, seconds=START)
            served = self._start("serve", [*serve, "run", f"--address=127.0.0.1:{port}", str(self._config)])
            eventually(lambda: self._up() or served.poll() is not None, seconds=START)
            assert self._up(), self._log("ray") + self._log("serve")
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
        try:
            return httpx.get(f"{self.url}/ready", trust_env=False, timeout=5.0).status_code == 200
        except httpx.HTTPError:
            return False

    def _start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=self._settings, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._processes.append(process)
        return process

    def _log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-3000:]

    def _stop(self) -> None:
        """Ends what was started, the newest first; Ray's own processes end with the one that started them."""
        for process in reversed(self._processes):
            process.send_signal(signal.SIGINT if process is not self._processes[0] else signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._temporary.cleanup()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _lives(pid: int) -> bool:
    try:
        return "ServeReplica" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
