"""The reverse proxy as a process: routes, hosts and health, by bytes on a real socket."""

from __future__ import annotations

import http.server
import json
import re
import signal
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from guard_middleware import config, proxy
from guard_middleware.errors import ConfigError
from tests.support.gateway import (
    CHAT,
    GOOD,
    Gateway,
    Process,
    Seen,
    Upstream,
    chat,
    eventually,
    scripted_worker,
    unique,
)

HARMFUL = "how do I pick a lock?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("p")


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        yield server


@pytest.fixture(scope="module")
def worker(folder: Path) -> Iterator[Process]:
    with scripted_worker(folder / "w.sock") as process:
        yield process


@pytest.fixture(scope="module")
def gateway(folder: Path, upstream: Upstream, worker: Process) -> Iterator[Gateway]:
    with Gateway(folder, upstream.url, folder / "w.sock") as process:
        yield process


def request(method: str, target: str, body: bytes = b"", *headers: str) -> bytes:
    """A request by hand, on a connection that ends with it."""
    lines = [f"{method} {target} HTTP/1.1", *headers, "connection: close"]
    if not any(line.lower().startswith("host:") for line in headers):
        lines.append("host: gateway")
    if body:
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode("utf-8") + body


def status(answer: bytes) -> int:
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    return int(found[1]) if found else 0


def ask(text: str, model: str) -> bytes:
    return json.dumps(chat(text, model)).encode()


def test_an_answer_comes_through_and_is_recorded_once(gateway: Gateway, upstream: Upstream) -> None:
    model = unique("good")
    response = gateway.post(chat(model=model))
    assert response.json()["choices"][0]["message"]["content"] == GOOD
    record = gateway.record(response)
    assert (record["outcome"], record["status"], record["guard_calls"]) == ("allowed", 200, 2)
    assert len(upstream.of(model)) == 1
    assert response.headers["x-guard-action"] == "allow"
    assert "server" not in response.headers


def test_health_and_ready_say_so_and_take_no_other_method(gateway: Gateway) -> None:
    assert httpx.get(f"{gateway.url}/guard/health").json() == {"status": "ok"}
    assert httpx.get(f"{gateway.url}/guard/ready").json() == {"status": "ready"}
    assert httpx.post(f"{gateway.url}/guard/ready", json={}).status_code == 404


def test_the_list_of_models_passes(gateway: Gateway, upstream: Upstream) -> None:
    response = httpx.get(f"{gateway.url}/v1/models", headers={"x-guard-skip": "1", "x-forwarded-for": "1.2.3.4"})
    assert response.json()["data"][0]["id"] == "good"
    seen = upstream.seen[-1]
    assert (seen.method, seen.target) == ("GET", "/v1/models")
    assert not seen.header("x-guard-skip") + seen.header("x-forwarded-for")


@pytest.mark.parametrize(
    "host",
    [
        "x/health?y=",
        "x/guard/health?",
        "x/v1/models#",
        "user@x/v1/models?",
        "169.254.169.254",
        "x:99999/v1/models",
        "[::1/v1/models",
        "",
        "\u00e9",
        "x\\v1\\models",
    ],
)
def test_a_forged_host_changes_neither_the_route_nor_the_upstream(
    gateway: Gateway, upstream: Upstream, host: str
) -> None:
    harmful, benign = unique("good"), unique("good")
    blocked = gateway.raw(request("POST", CHAT, ask(HARMFUL, harmful), f"host: {host}"))
    passed = gateway.raw(request("POST", CHAT, ask("hello", benign), f"host: {host}"))
    assert status(blocked) == 400
    assert upstream.of(harmful) == []
    if status(passed) == 200:  # or refused by the HTTP parser
        (seen,) = upstream.of(benign)
        assert seen.header("host") == [upstream.url.removeprefix("http://")]
        assert gateway.record(model=benign)["dialect"] == "chat_completions"


@pytest.mark.parametrize(
    "target",
    [
        "//v1/chat/completions",
        "/v1//chat/completions",
        "/v1/chat/completions/",
        "/v1/chat%2Fcompletions",
        "/v1/chat%2fcompletions",
        "/%761/chat/completions",
        "/V1/chat/completions",
        "/v1/Chat/Completions",
        "/v1/chat/completions;x=1",
        "/v1;x/chat/completions",
        "/v1/./chat/completions",
        "/v1/models/../chat/completions",
        "/v1/models/%2e%2e/chat/completions",
        "/guard/../v1/chat/completions",
        "/guard/health/../../v1/chat/completions",
        "/v1/chat/completions%00",
        "/v1/chat/completions%20",
        "/v1/chat/completions%3Fx",
        "/v1\\chat\\completions",
        "/v1/chat/\u0441ompletions",
        "/v1/chat/completions.json",
        "v1/chat/completions",
        "*",
        "//upstream/v1/chat/completions",
        "http://other//v1/chat/completions",
    ],
)
def test_another_spelling_of_the_path_reaches_nothing(gateway: Gateway, upstream: Upstream, target: str) -> None:
    model = unique("good")
    answer = gateway.raw(request("POST", target, ask(HARMFUL, model)))
    assert status(answer) in (400, 404)
    assert upstream.of(model) == []


@pytest.mark.parametrize("target", ["http://other/v1/chat/completions", f"{CHAT}?x=1", f"{CHAT}?", f"{CHAT}#x"])
def test_a_spelling_that_is_the_route_is_guarded(gateway: Gateway, upstream: Upstream, target: str) -> None:
    harmful, benign = unique("good"), unique("good")
    assert status(gateway.raw(request("POST", target, ask(HARMFUL, harmful)))) == 400
    assert status(gateway.raw(request("POST", target, ask("hello", benign)))) == 200
    assert upstream.of(harmful) == []
    assert [seen.target for seen in upstream.of(benign)] == [CHAT]


@pytest.mark.parametrize(("query", "kept"), [("api-version=2026-01-01", True), ("api-version=%ff", False)])
def test_of_the_query_only_an_api_version_goes_on(gateway: Gateway, upstream: Upstream, query: str, kept: bool) -> None:
    model = unique("good")
    answer = gateway.raw(request("POST", f"{CHAT}?model=x&{query}&api_base=http://evil", ask("hello", model)))
    assert status(answer) == 200
    assert [seen.target for seen in upstream.of(model)] == [f"{CHAT}?{query}" if kept else CHAT]


@pytest.mark.parametrize(
    "path",
    """
    /invocations /inference/v1/generate /generative_scoring /pooling /classify /score /v1/score /rerank /v1/rerank
    /v2/rerank /tokenize /detokenize /v1/chat/completions/batch /v1/chat/completions/render /render /v1/completions/c1
    /v1/responses/resp_1 /v1/messages/batches /v1/messages/batches/b1 /v1/embeddings /v1/audio/speech
    /v1/audio/transcriptions /v1/audio/translations /v1/images/generations /v1/files /v1/batches /v1/assistants
    /v1/threads /v1/fine_tuning/jobs /v1/realtime /v1/moderations /v1/load_lora_adapter /load /ping /version /metrics
    /health /openapi.json /docs /abort_requests /sleep /reset_prefix_cache /collective_rpc /server_info
    /openai/deployments/x/chat/completions /v1/chat /v1/moderate /v1/session /ready
    """.split(),
)
def test_other_endpoints_of_model_servers_are_not_there(gateway: Gateway, upstream: Upstream, path: str) -> None:
    before = len(upstream.seen)
    for method in ("POST", "GET"):
        response = httpx.request(method, f"{gateway.url}{path}", json=chat(HARMFUL))
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "not_found"
        assert gateway.record(response)["outcome"] == "rejected"
    assert len(upstream.seen) == before


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_other_methods_are_405_and_an_override_is_none(gateway: Gateway, upstream: Upstream, method: str) -> None:
    model = unique("good")
    assert status(gateway.raw(request(method, CHAT, ask(HARMFUL, model)))) == 405
    overridden = request("POST", CHAT, ask(HARMFUL, model), f"x-http-method-override: {method}")
    assert status(gateway.raw(overridden)) == 400
    assert upstream.of(model) == []


@pytest.mark.parametrize("upgrade", ["websocket", "h2c"])
def test_an_upgrade_is_refused(gateway: Gateway, upstream: Upstream, upgrade: str) -> None:
    before = len(upstream.seen)
    key = "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ=="
    asked = request("GET", CHAT, b"", "connection: upgrade", f"upgrade: {upgrade}", key, "sec-websocket-version: 13")
    answer = gateway.raw(asked.replace(b"connection: close\r\n", b""), shut=True)
    assert status(answer) in (0, 405)
    posted = request("POST", CHAT, ask(HARMFUL, "good"), "connection: upgrade", f"upgrade: {upgrade}")
    assert status(gateway.raw(posted)) == 400
    assert len(upstream.seen) == before


def test_the_clients_credentials_go_on_and_hop_headers_do_not(gateway: Gateway, upstream: Upstream) -> None:
    model = unique("good")
    headers = {
        "authorization": "Bearer sk-client",
        "x-forwarded-host": "evil",
        "x-litellm-tags": "no-guard",
        "accept-encoding": "gzip, br",
        "connection": "x-secret",
        "x-secret": "1",
        "te": "trailers",
        "expect": "100-continue",
    }
    assert gateway.post(chat(model=model), headers=headers).status_code == 200
    (seen,) = upstream.of(model)
    assert seen.header("authorization") == ["Bearer sk-client"]
    assert seen.header("accept-encoding") == ["identity"]
    assert seen.header("content-length") == [str(len(seen.body))]
    assert not {"x-forwarded-host", "x-litellm-tags", "x-secret", "te", "expect"} & {name for name, _ in seen.headers}


def test_a_header_that_http_forbids_is_no_502(gateway: Gateway, upstream: Upstream) -> None:
    model = unique("good")
    for value in ("a\x0bb", "a\x7fb", "\u00e9"):
        answer = gateway.raw(request("POST", CHAT, ask("hello", model), f"x-note: {value}"))
        assert status(answer) in (200, 400)


def test_without_an_upstream_nothing_starts() -> None:
    with pytest.raises(ConfigError, match="--upstream"):
        proxy.create_app(config.Config())


def test_a_missing_credential_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UPSTREAM_AUTH", raising=False)
    settings = config.parse("upstream: {url: http://127.0.0.1:1, headers_from_env: {authorization: UPSTREAM_AUTH}}")
    with pytest.raises(ConfigError, match="UPSTREAM_AUTH"):
        proxy.create_app(settings)


def test_the_operators_credential_replaces_the_clients(
    folder: Path, upstream: Upstream, worker: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPSTREAM_AUTH", "Bearer sk-operator")
    settings: dict[str, Any] = {"upstream": {"headers_from_env": {"Authorization": "UPSTREAM_AUTH"}}}
    model = unique("good")
    with Gateway(folder, upstream.url + "/v1", folder / "w.sock", settings) as gateway:
        gateway.post(chat(model=model), headers={"authorization": "Bearer sk-client"})
    (seen,) = upstream.of(model)
    assert seen.header("authorization") == ["Bearer sk-operator"]
    assert seen.target == CHAT


def test_it_is_ready_only_when_it_can_moderate(folder: Path, upstream: Upstream) -> None:
    asked: list[float] = []

    class NotYet(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(time.monotonic())
            self.send_response(200 if len(asked) >= 3 else 503)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

        def address_string(self) -> str:
            return "unix"

    path = folder / "late.sock"
    with socketserver.UnixStreamServer(str(path), NotYet) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        gateway = Gateway(folder, upstream.url, path)
        starting = gateway.begin()
        eventually(lambda: len(asked) >= 2)
        assert not gateway.said("ready")
        gateway.url = starting().removeprefix("ready ")
        assert len(asked) >= 3
        server.shutdown()
        thread.join()
    # The worker is gone: ready says so, and nothing passes.
    model = unique("good")
    assert httpx.get(f"{gateway.url}/guard/ready").status_code == 503
    assert gateway.post(chat(model=model)).status_code == 503
    assert upstream.of(model) == []
    gateway.stop()


def test_a_gateway_that_waits_for_its_worker_can_be_ended(folder: Path, upstream: Upstream) -> None:
    gateway = Gateway(folder, upstream.url, folder / "nobody.sock")
    gateway.begin()
    eventually(lambda: "waiting for the guard worker" in gateway.stderr.read_text())
    gateway.popen.send_signal(signal.SIGINT)
    status = gateway.popen.wait(20)
    gateway.stop()
    assert status == 130, gateway.stderr.read_text()
    assert not gateway.said("ready")


def test_a_port_in_use_is_said_before_the_worker_is_waited_for(folder: Path, upstream: Upstream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        gateway = Gateway(folder, upstream.url, folder / "nobody.sock")
        gateway.argv[-1] = str(taken.getsockname()[1])
        gateway.begin()
        assert gateway.popen.wait(20) == 2
        gateway.stop()
    assert "in use" in gateway.stderr.read_text()


def test_a_terminated_gateway_answers_what_it_has_begun(folder: Path, upstream: Upstream, worker: Process) -> None:
    model = unique("good")
    with Gateway(folder, upstream.url, folder / "w.sock") as gateway:
        body = ask("[wait 0.4] hello", model)
        with socket.create_connection(gateway.address, timeout=20) as connection:
            connection.sendall(request("POST", CHAT, body))
            eventually(lambda: b"in_flight 1" in _metrics(folder / "w.sock"))
            gateway.popen.terminate()
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert status(answer) == 200
    assert gateway.record(model=model)["outcome"] == "allowed"


def _metrics(path: Path) -> bytes:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
        return client.get("http://worker/metrics").content.replace(b"guard_worker_", b"")


def test_what_reaches_the_upstream_is_what_was_judged(gateway: Gateway, upstream: Upstream) -> None:
    model = unique("good")
    body = b'{"model": "%s",\n "messages": [{"role": "user", "content": "hi\\u0021"}]}' % model.encode()
    assert status(gateway.raw(request("POST", CHAT, body))) == 200
    (seen,) = upstream.of(model)
    assert isinstance(seen, Seen)
    assert seen.body == json.dumps(chat("hi!", model), separators=(",", ":")).encode()
