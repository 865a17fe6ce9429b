"""Gateways for the SDK tests: one with a policy per tenant, one whose guard hangs, one whose guard is gone."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.gateway import (
    BAD,
    FORGETFUL,
    Behaviour,
    Gateway,
    Seen,
    Upstream,
    chat,
    chunk,
    chunked,
    completion,
    event,
    says,
    scripted_worker,
    stream_head,
    whole,
)


def both(**rules: Any) -> dict[str, Any]:
    return {"input": rules, "output": rules}


SETTINGS = {
    "policies": {
        "annotate": both(on_harmful="annotate"),
        "open": both(on_harmful="annotate", show_reasoning=True),
        "shadow": both(on_harmful="shadow"),
        "soft": {"block_style": "soft"},
    },
    "tenants": {
        "header": "x-tenant",
        "match": [{"tenant": name, "policy": name} for name in ("annotate", "open", "shadow", "soft")],
    },
}


def calls(arguments: str) -> Behaviour:
    """Asks for the tool ``look_up``; after the tool's result it answers in words."""

    async def behaviour(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if seen.json["messages"][-1]["role"] == "tool":
            await says("It says one hour.")(seen, reader, writer)
            return
        function = {"name": "look_up", "arguments": arguments}
        if seen.json.get("stream"):
            half = len(arguments) // 2
            first = {
                "index": 0,
                "id": "c1",
                "type": "function",
                "function": {**function, "arguments": arguments[:half]},
            }
            rest = {"index": 0, "function": {"arguments": arguments[half:]}}
            deltas = [{"role": "assistant", "content": None}, {"tool_calls": [first]}, {"tool_calls": [rest]}]
            pieces = [*(chunk(seen, delta) for delta in deltas), chunk(seen, {}, "tool_calls"), event("[DONE]")]
            writer.write(stream_head() + chunked(*pieces))
        else:
            call = {"id": "c1", "type": "function", "function": function}
            writer.write(whole(completion(seen, {"content": None, "tool_calls": [call]}, finish="tool_calls")))
        await writer.drain()

    return behaviour


async def thinks(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Harm only in its visible reasoning."""
    if seen.json.get("stream"):
        deltas = [{"role": "assistant", "reasoning_content": BAD}, {"content": "hello"}]
        pieces = [*(chunk(seen, delta) for delta in deltas), chunk(seen, {}, "stop"), event("[DONE]")]
        writer.write(stream_head() + chunked(*pieces))
    else:
        writer.write(whole(completion(seen, {"content": "hello", "reasoning_content": BAD})))
    await writer.drain()


@pytest.fixture(scope="session")
def upstream() -> Iterator[Upstream]:
    more = {
        "json": says('{"city": "Paris"}'),
        "bad_json": says('{"city": "pick a lock"}'),
        "tools": calls('{"query": "bread"}'),
        "bad_tools": calls('{"query": "how to pick a lock"}'),
        "thinks": thinks,
    }
    with Upstream(more) as server:
        yield server


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("sdk")
    with scripted_worker(folder / "w.sock"), Gateway(folder, upstream.url, folder / "w.sock", SETTINGS) as process:
        yield process


@pytest.fixture(scope="session")
def hanging(tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> Iterator[Gateway]:
    """A gateway whose worker hangs."""
    folder = tmp_path_factory.mktemp("hang")
    settings = {**FORGETFUL, "policies": {"default": both(deadline="200ms")}}
    with (
        scripted_worker(folder / "w.sock") as worker,
        Gateway(folder, upstream.url, folder / "w.sock", settings) as process,
    ):
        assert process.post(chat()).status_code == 200  # so that it is the question that hangs, not the connection
        worker.popen.send_signal(signal.SIGSTOP)
        yield process


@pytest.fixture
def gone(tmp_path: Path, upstream: Upstream) -> Iterator[tuple[Gateway, Path]]:
    """A gateway whose worker has died, and the socket at which another may be started."""
    path = tmp_path / "w.sock"
    with scripted_worker(path) as worker, Gateway(tmp_path, upstream.url, path) as process:
        worker.popen.kill()
        worker.popen.wait()
        yield process, path
