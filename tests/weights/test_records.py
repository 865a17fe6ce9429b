"""What a runtime with a weights directory says of it: lines of the decision log, counters, and which guard serves."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from guard_middleware import config
from guard_middleware.runtime import Runtime
from guard_middleware.telemetry import Telemetry
from guard_middleware.types import Conversation, Message, Text, Verdict
from guard_middleware.weights import manifest, state
from guard_middleware.weights.directory import WeightsDirectory, now
from guard_middleware.weights.state import Revision
from guard_middleware.wire import ModerationRequest
from tests.support.weights import command, golden_set, revision


def test_the_log_and_the_metrics_tell_what_was_done_and_hold_no_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    folder = tmp_path / "weights"
    old, new = revision(folder, "old"), revision(folder, "new", phrase="secret words")
    section = {"directory": str(folder), "golden": str(golden_set(tmp_path)), "shadow": 1.0}
    settings = {"worker": {"model": str(old), "weights": section}, "audit": {"path": str(tmp_path / "log.jsonl")}}
    reader = InMemoryMetricReader()
    telemetry = Telemetry(meter_provider=MeterProvider([reader]))
    directory = WeightsDirectory(folder)

    async def ask(runtime: Runtime, text: str) -> Verdict:
        question = ModerationRequest("gd_1.input", Conversation((Message("user", (Text(text),)),)), "input", 10.0)
        outcome = await runtime.caches.guards[config.DEFAULT_GUARD].moderate(question)
        assert isinstance(outcome, Verdict)
        return outcome

    async def until(condition: Any) -> None:
        async with asyncio.timeout(40):
            while not condition():
                await asyncio.sleep(0.02)

    async def main() -> None:
        runtime = Runtime(config.parse(json.dumps(settings)), telemetry=telemetry)
        follower = runtime.weights[config.DEFAULT_GUARD]
        follower.command = command
        await runtime.start(wait=True)
        try:
            assert await runtime.ready()
            found = Revision("new", str(new), manifest.check(new))
            directory.update(partial(state.stage, revision=found, by="ada", at=now()))
            await until(lambda: (s := directory.read().staged) is not None and s.phase == "ready")
            assert (await ask(runtime, "these are secret words")).revision == "r-old"
            assert (await ask(runtime, "these are secret words")).cached
            await until(lambda: follower.switch.shadow.stricter)
            directory.update(partial(state.promote, by="ada", at=now(), force=True))
            await until(lambda: directory.read().active.name == "new")
            await asyncio.sleep(0.1)
            after = await ask(runtime, "these are secret words")
            assert (after.revision, after.cached, after.request) == ("r-new", False, "harmful")
        finally:
            await runtime.aclose()

    asyncio.run(asyncio.wait_for(main(), 120))
    text = (tmp_path / "log.jsonl").read_text()
    assert "secret words" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    changes = [line for line in lines if line["schema"] == "guard_middleware.weights/1"]
    assert [(line["what"], line["by"], line["guard"]) for line in changes] == [
        ("staged", "ada", "worker"),
        ("ready", "gateway", "worker"),
        ("promotion ordered", "ada", "worker"),
        ("promoted", "ada", "worker"),
    ]
    (shadow,) = [line for line in lines if line["schema"] == "guard_middleware.shadow/1"]
    assert (shadow["id"], shadow["result"], shadow["staged"]["revision"]) == ("gd_1.input", "stricter", "r-new")
    assert counted(reader, "guard_middleware.weights.changes") == {
        "staged": 1, "ready": 1, "promotion ordered": 1, "promoted": 1
    }  # fmt: skip
    assert counted(reader, "guard_middleware.weights.shadow") == {"stricter": 1}


def counted(reader: InMemoryMetricReader, name: str) -> dict[str, float]:
    data = reader.get_metrics_data()
    assert data is not None
    points = [
        point
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == name
        for point in metric.data.data_points
    ]
    keys = ("guard_middleware.weights.change", "guard_middleware.weights.result")
    return {next(str(p.attributes[key]) for key in keys if key in p.attributes): p.value for p in points}
