"""A program that calls LiteLLM's SDK in LiteLLM's environment, between a scripted upstream and a scripted worker."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients import environments
from tests.integrations.litellm import stage
from tests.support.gateway import scripted_worker
from tests.support.virtualenv import Missing

_NUMBERS = itertools.count()


class Application:
    """Runs the driver in LiteLLM's environment."""

    def __init__(self, folder: Path, upstream: stage.Upstream, worker: Path) -> None:
        self.folder, self.upstream, self.worker = folder, upstream, worker

    def config(self, **sections: Any) -> str:
        name = f"{next(_NUMBERS)}"
        file = self.folder / f"{name}.yaml"
        settings = {
            "worker": {"socket": str(self.worker), "manage": False},
            "audit": {"path": str(self.folder / f"{name}.jsonl")},
            **sections,
        }
        file.write_text(json.dumps(settings))
        return str(file)

    def run(self, script: str, given: Any) -> list[Any]:
        """The results that a driver prints; its standard error is shown where it fails."""
        environment = {
            **environments.variables(),
            "PYTHONPATH": os.pathsep.join([str(stage.REPOSITORY), str(stage.REPOSITORY / "integrations")]),
            "OMP_NUM_THREADS": "1",
        }
        argv = [str(stage.python()), str(stage.HERE / script)]
        done = subprocess.run(
            argv, input=json.dumps(given), env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-6000:]
        lines = done.stdout.splitlines()
        return [json.loads(line.removeprefix("result ")) for line in lines if line.startswith("result ")]


@pytest.fixture(scope="session")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    folder = tmp_path_factory.mktemp("litellm-sdk")
    try:
        stage.python()
    except Missing as missing:
        pytest.skip(f"LiteLLM's environment: {missing}")
    with stage.Upstream() as upstream, scripted_worker(folder / "worker.sock"):
        yield Application(folder, upstream, folder / "worker.sock")
