"""The real SDKs over guarded transports: every call and case of ``tests/clients``, without any gateway."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.server import ServerConnection, unix_serve

from tests.clients import environments
from tests.clients.conftest import Upstream
from tests.clients.contract import CALLS, SETTINGS, Call, Case, wrong
from tests.support.gateway import scripted_worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
#: (client, library) -> its driver
CARRIED = {
    ("openai (Python)", "httpx2"): "openai_sdk",
    ("openai (Python)", "httpx"): "openai_sdk",
    ("anthropic (Python)", "httpx2"): "anthropic_sdk",
}
EVERY = [
    pytest.param(client, library, call, case, id=f"{client}-{library}-{call.name}-{case.name}")
    for client, library in CARRIED
    for call in CALLS[client]
    for case in call.cases
]
_ROOT = Path(__file__).parents[2]


class Stage:
    """Three guards (one works, one hangs, one is gone), the provider, and what every call saw."""

    def __init__(self, folder: Path, upstream: Upstream, sockets: Mapping[str, Path]) -> None:
        self._folder, self._upstream, self._sockets = folder, upstream, sockets
        self._models: dict[str, str] = {}
        self._played: dict[tuple[str, str], dict[str, dict[str, Any]] | AssertionError] = {}

    def saw(self, client: str, library: str) -> dict[str, dict[str, Any]]:
        """What the callers saw, by call and case; raises what made the one run fail."""
        if (client, library) not in self._played:
            try:
                self._played[client, library] = self._play(client, library)
            except AssertionError as error:
                self._played[client, library] = error
        played = self._played[client, library]
        if isinstance(played, AssertionError):
            raise played
        return played

    def _play(self, client: str, library: str) -> dict[str, dict[str, Any]]:
        """Does every call of a client in every case, in one process."""
        asked = [(call, case) for call in CALLS[client] for case in call.cases]
        done = subprocess.run(
            [sys.executable, "-m", "tests.integrations.sdk_driver", CARRIED[client, library], library],
            input=json.dumps([self._job(client, library, call, case) for call, case in asked]),
            capture_output=True,
            text=True,
            timeout=200,
            cwd=_ROOT,
            env={**environments.variables(), "PYTHONPATH": f"{_ROOT}:{_ROOT / 'integrations'}"},
            check=False,
        )
        lines = [line.removeprefix("result ") for line in done.stdout.splitlines() if line.startswith("result ")]
        assert len(lines) == len(asked), f"{len(lines)} of {len(asked)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr[-4000:]
        return {result["id"]: result for result in map(json.loads, lines)}

    def records(self, client: str, library: str, call: Call, case: Case) -> list[dict[str, Any]]:
        log = self._folder / f"{library}-{CARRIED[client, library]}-{case.guard}.jsonl"
        model = self._job(client, library, call, case)["model"]
        lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
        return [line for line in lines if line["model"] == model]

    def _job(self, client: str, library: str, call: Call, case: Case) -> dict[str, Any]:
        id = f"{call.name} | {case.name}"
        model = f"{call.answer(case)}.{self._models.setdefault(f'{client} {library} {id}', str(len(self._models)))}"
        name = f"{library}-{CARRIED[client, library]}-{case.guard}"
        config = self._folder / f"{name}.yaml"
        if not config.exists():
            impatient = {"policies": {"default": {"input": {"deadline": "100ms"}}}}
            settings = {
                **(impatient if case.guard == "hangs" else SETTINGS),
                "worker": {"socket": str(self._sockets[case.guard]), "manage": False},
                "audit": {"path": str(self._folder / f"{name}.jsonl")},
                "cache": {"verdicts": {"entries": 0}},
            }
            config.write_text(json.dumps(settings), "utf-8")
        return {
            "id": id,
            "call": call.name,
            "model": model,
            "prompt": case.prompt,
            "url": f"{config}@{self._upstream.url}",
            "headers": {"x-tenant": case.tenant} if case.tenant else {},
            "go": f"{self._upstream.url}/go/{model}" if case.only_streams else "",
        }


@contextmanager
def mute(path: Path) -> Iterator[None]:
    """A worker that takes every question and answers none."""

    def listen(connection: ServerConnection) -> None:
        for _ in connection:
            pass

    with unix_serve(listen, str(path)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("sdks")
    sockets = {name: folder / f"{name}.sock" for name in ("works", "hangs", "gone")}
    with ExitStack() as stack:
        upstream = stack.enter_context(Upstream())
        stack.enter_context(scripted_worker(sockets["works"]))
        stack.enter_context(mute(sockets["hangs"]))
        yield Stage(folder, upstream, sockets)


@pytest.mark.parametrize(("client", "library", "call", "case"), EVERY)
def test_a_caller_sees_what_happened_and_nothing_is_sent_twice(
    stage: Stage, client: str, library: str, call: Call, case: Case
) -> None:
    saw = stage.saw(client, library)[f"{call.name} | {case.name}"]
    complaint = wrong(call, case, saw)
    assert complaint is None, f"{complaint}: {saw}"
    expected = (call.dialect, call.streams, case.outcome, case.called)
    records = stage.records(client, library, call, case)
    assert [(r["dialect"], r["stream"], r["outcome"], r["upstream_called"]) for r in records] == [
        expected for _ in range(call.hits(case))
    ]
