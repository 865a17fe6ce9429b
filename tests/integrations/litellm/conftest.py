"""One LiteLLM proxy with the guard for the whole session, its worker and its upstream."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.clients.environments import Missing
from tests.integrations.litellm import stage
from tests.support.gateway import Process, eventually
from tests.support.otlp_collector import Collector, collector

POLICIES: dict[str, Any] = {
    "annotate": {"input": {"on_harmful": "annotate"}, "output": {"on_harmful": "annotate"}},
    "shadow": {"input": {"on_harmful": "shadow"}, "output": {"on_harmful": "shadow"}},
    "soft": {"block_style": "soft"},
    "race": {"race": True},
    "window": {"output": {"stream": {"mode": "window", "first_window": 32, "last_window": 64, "overlap": 16}}},
    "hasty": {"input": {"deadline": "200ms"}, "output": {"deadline": "200ms"}},
    "open": {"input": {"on_error": "allow_unscreened"}, "output": {"on_error": "allow_unscreened"}},
}
#: ``NAME.POLICY`` is a model under that policy, ``sk-key-POLICY`` and ``sk-team-POLICY`` are keys
MATCH = [
    {"tenant": tenant, "policy": policy}
    for policy in POLICIES
    for tenant in (
        f"key:{policy}",
        f"team:{policy}",
        *(f"model:{shape}/{name}.{policy}" for shape in ("chat", "claude", "text") for name in ("good", "bad", "long")),
    )
]


@dataclass
class Stage:
    proxy: stage.Proxy
    upstream: stage.Upstream
    worker: Process
    folder: Path
    collector: Collector

    @contextmanager
    def without_worker(self) -> Iterator[None]:
        self.worker.popen.kill()
        self.worker.stop()
        try:
            yield
        finally:
            self.worker.start()
            asked = {"model": "chat/good", "messages": [{"role": "user", "content": "Hello."}]}
            eventually(lambda: self.proxy.post("/v1/chat/completions", asked).status_code == 200)

    def decisions(self) -> list[dict[str, Any]]:
        path = self.folder / "decisions.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="session")
def python() -> Path:
    try:
        return stage.python()
    except Missing as error:
        pytest.skip(f"LiteLLM cannot be installed here: {error}")


@pytest.fixture(scope="session")
def scene(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("litellm")
    socket = folder / "worker.sock"
    guard = {
        "worker": {"socket": str(socket), "manage": False},
        "audit": {"path": str(folder / "decisions.jsonl")},
        "cache": {"verdicts": {"entries": 0}},
        "limits": {"images": 4, "answer_bytes": "1MB"},
        "policies": POLICIES,
        "tenants": {"header": "x-tenant", "match": MATCH},
    }
    config = folder / "guard.yaml"
    config.write_text(json.dumps(guard))
    worker = Process([sys.executable, str(stage.HERE / "worker.py"), "--socket", str(socket)], folder, "worker ready")
    with stage.Upstream() as upstream, collector() as spans:
        worker.start()
        (folder / "proxy").mkdir()
        for name in ("auth.py", "mcp_server.py"):
            (folder / "proxy" / name).write_text((stage.HERE / name).read_text())
        targets = [("chat/completions", ["guard"]), ("responses", ["guard"]), ("messages", ["guard"])]
        targets += [("embeddings", ["guard"]), ("unnamed/chat/completions", None)]
        passed = [
            {
                "path": f"/pass/v1/{path}",
                "target": f"{upstream.url}/v1/{path.removeprefix('unnamed/')}",
                "auth": False,
                **({} if names is None else {"guardrails": names}),
            }
            for path, names in targets
        ]
        proxy = stage.Proxy(
            folder / "proxy",
            upstream.url,
            [stage.guardrail(config, guard_unread=["aembedding"])],
            general_settings={"custom_auth": "auth.user_api_key_auth", "pass_through_endpoints": passed},
            litellm_settings={
                "callbacks": ["otel", "sink.instance"],
                "cache": True,
                "cache_params": {"type": "local", "mode": "default_off"},
            },
            mcp_servers={"tools": {"transport": "stdio", "command": str(python), "args": ["mcp_server.py"]}},
        )
        proxy.environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": spans.endpoint,
            "LITELLM_ENABLE_MCP_STDIO": "true",  # LiteLLM 1.106 and later start no such server without it
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_TRACES_EXPORTER": "otlp",
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }
        try:
            with proxy:
                yield Stage(proxy, upstream, worker, folder, spans)
        finally:
            worker.stop()
