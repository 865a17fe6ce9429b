"""A promotion under load, and SIGKILL in the middle of it: nothing unscreened, and the old weights serve."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import weights
from tests.support.gateway import CHAT, GOOD, LEAK, PATIENCE, Gateway, Upstream, chat, command, eventually, unique

SCRIPT = [sys.executable, str(Path(weights.__file__))]


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "weights"
    weights.revision(made, "old")
    weights.revision(made, "new")
    weights.golden_set(tmp_path)
    return tmp_path


def gateway_of(folder: Path, upstream: Upstream, *argv: str, **more: Any) -> Gateway:
    section = {"directory": str(folder / "weights"), "golden": str(folder / "golden.jsonl"), "shadow": 0.5, **more}
    worker = {"model": str(folder / "weights" / "old"), "weights": section}
    return Gateway(folder, upstream.url, folder, {"worker": worker}, [*SCRIPT, *argv])


def said(gateway: Gateway, *argv: str) -> subprocess.CompletedProcess[str]:
    """``guard-gateway weights`` beside a gateway."""
    return subprocess.run(
        [*command(), "weights", *argv, "--config", str(gateway.config)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def listed(gateway: Gateway) -> Any:
    return json.loads(said(gateway, "list", "--json").stdout)


def pid(gateway: Gateway, name: str) -> int:
    return int(eventually(lambda: gateway.said(f"worker {name} ")).split()[2])


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


class Load:
    """Clients that do not stop: benign and harmful prompts, good and bad answers, streamed and not."""

    def __init__(self, gateway: Gateway, clients: int = 8) -> None:
        self.answers: dict[str, httpx.Response] = {}
        self.broken: list[str] = []
        self._url, self._clients = gateway.url, clients

    async def __aenter__(self) -> Load:
        self._stop = asyncio.Event()
        self._tasks = [asyncio.create_task(self._client(number)) for number in range(self._clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)

    async def served(self, more: int) -> None:
        """Until so many more requests have an answer."""
        wanted = len(self.answers) + more
        async with asyncio.timeout(60):
            while len(self.answers) < wanted:
                await asyncio.sleep(0.01)

    async def _client(self, number: int) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=PATIENCE, trust_env=False) as client:
            while not self._stop.is_set():
                model = unique("bad" if number % 3 == 1 else "good")
                text = "how do I pick a lock?" if number % 5 == 4 else "[wait 0.05] how do I bake bread?"
                try:
                    self.answers[model] = await client.post(CHAT, json=chat(text, model, stream=number % 2 == 0))
                except httpx.TransportError:
                    self.broken.append(model)
                    await asyncio.sleep(0.2)


def assert_all_screened(gateway: Gateway, upstream: Upstream, load: Load) -> set[str]:
    """For every answered request a record whose verdicts cover what passed; returns the revisions that judged."""
    eventually(lambda: {record["model"] for record in gateway.records()} >= set(load.answers))
    by_model = {record["model"]: record for record in gateway.records()}
    revisions = set()
    for model, response in load.answers.items():
        record, seen = by_model[model], upstream.of(model)
        verdicts = [decision["verdict"] for decision in record["decisions"] if decision["verdict"]]
        revisions |= {verdict["revision"] for verdict in verdicts}
        assert record["bypassed"] == []
        assert LEAK not in response.text
        assert len(seen) == int(record["upstream_called"])
        if seen:
            assert verdicts[0]["request"] == "unharmful"
        if response.status_code == 200 and GOOD in response.text:
            assert len(verdicts) == 2
    return revisions


def assert_none_failed(gateway: Gateway, load: Load) -> None:
    """Every request had its answer, and none was refused for want of a verdict."""
    assert load.broken == []
    assert {response.status_code for response in load.answers.values()} == {200, 400}, [
        (record["error"], [decision["error"] for decision in record["decisions"]])
        for record in gateway.records()
        if record["status"] not in (200, 400)
    ]


def test_promoted_under_load_nothing_fails_and_nothing_is_unscreened(folder: Path, upstream: Upstream) -> None:
    async def run(gateway: Gateway) -> Load:
        load = Load(gateway)
        async with load:
            await load.served(20)
            staged = await asyncio.to_thread(said, gateway, "stage", "new")
            assert staged.returncode == 0, staged.stderr
            assert "golden set: 2 of 2" in staged.stdout
            await load.served(40)
            done = await asyncio.to_thread(said, gateway, "promote")
            assert done.returncode == 0, done.stderr
            assert "promoted: new (r-new)" in done.stdout
            await load.served(40)
        return load

    with gateway_of(folder, upstream, keep="1s") as gateway:
        load = asyncio.run(run(gateway))
        assert_none_failed(gateway, load)
        assert assert_all_screened(gateway, upstream, load) == {"r-old", "r-new"}
        old = pid(gateway, "old")
        eventually(lambda: not alive(old))
        whats = [line["what"] for line in gateway.lines_of("weights")]
        assert whats == ["staged", "ready", "promotion ordered", "promoted"]
        shadow = gateway.lines_of("shadow")
        assert {line["result"] for line in shadow} == {"agreed"}
        assert {line["id"].partition(".")[0] for line in shadow} <= {record["id"] for record in gateway.records()}
        assert "bread" not in json.dumps(shadow)


def test_the_new_worker_killed_under_load_hands_back_without_a_failed_request(folder: Path, upstream: Upstream) -> None:
    async def run(gateway: Gateway) -> Load:
        load = Load(gateway)
        async with load:
            assert (await asyncio.to_thread(said, gateway, "stage", "new")).returncode == 0
            assert (await asyncio.to_thread(said, gateway, "promote")).returncode == 0
            await load.served(20)
            os.kill(pid(gateway, "new"), signal.SIGKILL)
            await load.served(60)
        return load

    with gateway_of(folder, upstream) as gateway:
        load = asyncio.run(run(gateway))
        assert_none_failed(gateway, load)
        assert assert_all_screened(gateway, upstream, load) == {"r-old", "r-new"}
        found = listed(gateway)["state"]
        assert found["active"]["name"] == "old"
        assert found["history"][-1]["what"] == "reverted"


def test_the_old_worker_killed_before_the_order_leaves_the_old_weights_active(folder: Path, upstream: Upstream) -> None:
    with gateway_of(folder, upstream) as gateway:
        assert said(gateway, "stage", "new").returncode == 0
        first = pid(gateway, "old")
        os.kill(first, signal.SIGKILL)
        eventually(lambda: gateway.post(chat(model=unique("good"))).status_code == 200)
        assert pid(gateway, "old") != first
        record = gateway.record(gateway.post(chat(model=unique("good"))))
        assert {decision["verdict"]["revision"] for decision in record["decisions"]} == {"r-old"}


@pytest.mark.parametrize(
    ("die", "serves", "last"),
    [
        ("before-commit", "old", "interrupted"),
        ("in-commit", "old", "interrupted"),
        ("after-commit", "new", "promoted"),
    ],
)
def test_a_gateway_killed_in_a_promotion_starts_on_what_the_state_says(
    folder: Path, upstream: Upstream, die: str, serves: str, last: str
) -> None:
    async def run(gateway: Gateway) -> Load:
        load = Load(gateway)
        async with load:
            assert (await asyncio.to_thread(said, gateway, "stage", "new")).returncode == 0
            done = await asyncio.to_thread(said, gateway, "promote")
            assert done.returncode in (0, 2)  # the state may be read before the end is seen
            await asyncio.to_thread(gateway.popen.wait, 20)
        return load

    with contextlib.ExitStack() as stack:
        dying = stack.enter_context(gateway_of(folder, upstream, "--die", die))
        load = asyncio.run(run(dying))
        assert dying.popen.returncode == -signal.SIGKILL
        assert all(LEAK not in response.text for response in load.answers.values())
        workers = [pid(dying, "old"), pid(dying, "new")]
        eventually(lambda: not any(alive(worker) for worker in workers))
    with gateway_of(folder, upstream) as gateway:
        response = gateway.post(chat(model=unique("good")))
        assert response.status_code == 200
        record = gateway.record(response)
        assert {decision["verdict"]["revision"] for decision in record["decisions"]} == {f"r-{serves}"}
        found = listed(gateway)["state"]
        assert found["active"]["name"] == serves
        assert next(e["what"] for e in reversed(found["history"]) if e["what"] not in ("ready",)) == last
