"""The guard inside the real vLLM (its CPU build), and vLLM's own list of routes held against what passes.

The server is the example's ``serve.sh`` with a model that always answers the same (``tiny_text_model.py``).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from starlette.responses import JSONResponse

from guard_integrations.vllm import UNGUARDED, VLLMGuard
from guard_middleware import config
from guard_middleware.errors import ConfigError
from tests import vllm_environment
from tests.support.gateway import eventually, scripted_worker
from tests.support.tiny_text_model import BAD, GOOD, make_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
EXAMPLE = Path(__file__).parents[2] / "integrations" / "examples" / "vllm_server"
APP = Path(__file__).with_name("vllm_app.py")
#: the model answers GOOD after a question mark and BAD after an exclamation mark
BREAD, TELL, LOCK = "how do I bake bread?", "tell me!", "how do I pick a lock?"
#: the routes that may reach the model, and the one without content
SCREENED = {
    ("POST", path)
    for path in (
        "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    )
}  # fmt: skip
FREE = {("GET", path) for path in (*UNGUARDED, "/v1/models")}


@pytest.fixture(scope="module")
def python() -> Path:
    try:
        return vllm_environment.python()
    except vllm_environment.Missing as missing:
        pytest.skip(f"no environment with vLLM: {missing}")


class Server:
    """A process whose output is kept; ``url`` is free until it listens."""

    def __init__(self, argv: Sequence[str], folder: Path, **variables: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = str(free.getsockname()[1])
        self.url, self._log = f"http://127.0.0.1:{self.port}", folder / f"{self.port}.log"
        environment = vllm_environment.variables(**variables)
        with self._log.open("wb") as log:
            self.popen = subprocess.Popen(
                [*argv, self.port], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self._log.read_text("utf-8", "replace")

    def ended(self) -> bool:
        return self.popen.poll() is not None

    def healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def stop(self) -> None:
        self.popen.terminate()
        try:
            self.popen.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.popen.pid, 9)
            self.popen.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def server(python: Path, folder: Path) -> Iterator[Server]:
    make_folder(folder / "model")
    settings = {
        "worker": {"socket": str(folder / "w.sock"), "manage": False},
        "audit": {"path": str(folder / "decisions.jsonl")},
        "policies": {"default": {"output": {"stream": {"mode": "window", "first_window": 16, "overlap": 4}}}},
    }
    (folder / "guard.yaml").write_text(json.dumps(settings))
    options = ["--enforce-eager", "--max-model-len", "512", "--dtype", "float32", "--host", "127.0.0.1"]
    argv = [str(EXAMPLE / "serve.sh"), str(folder / "model"), "--served-model-name", "tiny", *options, "--port"]
    path = f"{python.parent}:{os.environ['PATH']}"
    with scripted_worker(folder / "w.sock"):
        process = Server(argv, folder, GUARD_CONFIG=str(folder / "guard.yaml"), PATH=path)
        try:
            eventually(lambda: process.ended() or process.healthy(), seconds=1200)
            assert not process.ended(), process.output[-4000:]
            yield process
        finally:
            process.stop()


class Asked:
    """One question over one API, streamed or not: the text and the end, or the refusal."""

    def __init__(self, url: str) -> None:
        options: Any = {"api_key": "k", "max_retries": 0, "timeout": 60}
        self.openai = openai.OpenAI(base_url=f"{url}/v1", **options)
        self.anthropic = anthropic.Anthropic(base_url=url, **options)

    def ask(self, api: str, text: str, stream: bool) -> tuple[str, str | None]:
        try:
            return getattr(self, f"_{api}")(text, stream)  # type: ignore[no-any-return]
        except (openai.BadRequestError, anthropic.BadRequestError) as error:
            return "", f"refused: {'content policy' in str(error)}"

    def _chat(self, text: str, stream: bool) -> tuple[str, str | None]:
        asked: Any = {
            "messages": [{"role": "user", "content": text}],
            "model": "tiny",
            "max_tokens": 16,
            "temperature": 0,
        }
        answer = self.openai.chat.completions.create(**asked, stream=stream)
        choices = [choice for part in (answer if stream else [answer]) for choice in part.choices]
        said = [choice.delta if stream else choice.message for choice in choices]
        return "".join(one.content or "" for one in said), choices[-1].finish_reason

    def _completions(self, text: str, stream: bool) -> tuple[str, str | None]:
        answer: Any = self.openai.completions.create(
            prompt=text, model="tiny", max_tokens=16, temperature=0, stream=stream
        )
        choices = [choice for part in (answer if stream else [answer]) for choice in part.choices]
        return "".join(choice.text for choice in choices), choices[-1].finish_reason

    def _responses(self, text: str, stream: bool) -> tuple[str, str | None]:
        answer: Any = self.openai.responses.create(
            input=text, model="tiny", max_output_tokens=16, temperature=0, stream=stream
        )
        if stream:
            events = list(answer)
            said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
            return said, events[-1].type.removeprefix("response.")
        return answer.output_text, answer.status

    def _messages(self, text: str, stream: bool) -> tuple[str, str | None]:
        asked: Any = {"messages": [{"role": "user", "content": text}], "model": "tiny", "max_tokens": 16}
        answer: Any = self.anthropic.messages.create(**asked, extra_body={"temperature": 0}, stream=stream)
        if stream:
            events = list(answer)
            said = [getattr(event.delta, "text", "") for event in events if event.type == "content_block_delta"]
            reasons = [event.delta.stop_reason for event in events if event.type == "message_delta"]
            return "".join(said), reasons[-1]
        return "".join(block.text for block in answer.content if block.type == "text"), answer.stop_reason


ENDED = {"chat": "stop", "completions": "stop", "responses": "completed", "messages": "end_turn"}
CUT = {"chat": "content_filter", "completions": "content_filter", "responses": "incomplete", "messages": "refusal"}


@pytest.fixture(scope="module")
def asked(server: Server) -> Asked:
    return Asked(server.url)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("api", ENDED)
def test_what_vllm_says_is_screened_on_every_api(asked: Asked, api: str, stream: bool) -> None:
    assert asked.ask(api, BREAD, stream) == ("".join(GOOD), ENDED[api])
    assert asked.ask(api, LOCK, stream) == ("", "refused: True")
    text, end = asked.ask(api, TELL, stream)
    assert end == CUT[api]
    assert not any(word in text for word in ("lock", *BAD)), text


def test_every_answer_is_in_the_decision_log(asked: Asked, folder: Path) -> None:
    log = folder / "decisions.jsonl"

    def blocked() -> int:
        lines = log.read_bytes().rpartition(b"\n")[0].splitlines() if log.exists() else []
        told = [(line["outcome"], line["upstream_called"], line["model"]) for line in map(json.loads, lines)]
        return told.count(("blocked", False, "tiny"))

    before = blocked()
    asked.ask("chat", LOCK, False)
    assert eventually(lambda: blocked() > before)  # it is written behind the answer


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *((method, path, status) for method, status in (("GET", 200), ("POST", 404)) for path in UNGUARDED),
        ("GET", "/v1/models", 200), ("GET", "/metrics/", 404), ("GET", "/metricsx", 404), ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404), ("POST", "/tokenize", 404), ("POST", "/detokenize", 404),
        ("POST", "/invocations", 404), ("POST", "/inference/v1/generate", 404), ("POST", "/v1/embeddings", 404),
        ("POST", "/pooling", 404), ("POST", "/score", 404), ("GET", "/v1/responses/resp_1", 404),
    ],
)  # fmt: skip
def test_probes_and_metrics_answer_and_the_rest_is_refused(server: Server, method: str, path: str, status: int) -> None:
    body = {"model": "tiny", "prompt": BREAD, "input": BREAD} if method == "POST" else None
    response = httpx.request(method, f"{server.url}{path}", json=body, timeout=30, trust_env=False)
    assert response.status_code == status
    if path == "/metrics" and method == "GET":
        assert "vllm:" in response.text
        assert "bread" not in response.text


def test_what_vllm_adds_to_its_requests_cannot_carry_content_past_the_guard(server: Server) -> None:
    more: dict[str, Any] = {
        "prompt_logprobs": 1, "echo": True, "return_token_ids": True, "chat_template": "x", "prompt_embeds": "x",
        "documents": [{"text": "x"}], "structured_outputs": {"choice": ["x"]}, "chat_template_kwargs": {"x": "x"},
        "mm_processor_kwargs": {"x": 1}, "vllm_xargs": {"x": "x"}, "kv_transfer_params": {"x": "x"},
    }  # fmt: skip
    for name, value in more.items():
        body = {"model": "tiny", "messages": [{"role": "user", "content": BREAD}], name: value}
        response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30, trust_env=False)
        assert (response.status_code, response.json()["error"]["param"]) == (400, name)


# -- without an engine --


@pytest.fixture(scope="module")
def routes(python: Path) -> set[tuple[str, str]]:
    """Every route of this vLLM, for every task that a model may have and with what only developers switch on."""
    done = subprocess.run(
        [str(python), str(APP), "routes"],
        env=vllm_environment.variables(VLLM_SERVER_DEV_MODE="1"),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {(method, path) for method, path in json.loads(done.stdout.splitlines()[-1])}


def test_every_route_of_vllm_is_screened_without_content_or_refused(
    routes: set[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert routes >= SCREENED | FREE
    assert {path for _, path in routes} >= {
        "/tokenize", "/pooling", "/v1/embeddings", "/score", "/inference/v1/generate", "/invocations", "/v1/realtime",
        "/v1/audio/transcriptions", "/generative_scoring", "/v1/chat/completions/batch", "/collective_rpc",
    }  # fmt: skip
    (tmp_path / "guard.yaml").write_text(f"worker: {{socket: {tmp_path / 'none.sock'}, manage: false}}")
    monkeypatch.setenv("GUARD_CONFIG", str(tmp_path / "guard.yaml"))
    reached: set[tuple[str, str]] = set()

    async def vllm(scope: Any, receive: Any, send: Any) -> None:
        reached.add((scope.get("method", "WEBSOCKET"), scope["path"]))
        await JSONResponse({})(scope, receive, send)

    async def main() -> dict[tuple[str, str], int]:
        guard = VLLMGuard(vllm)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://vllm") as client:
            body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "input": "hi", "prompt": "hi"}
            statuses = {}
            for method, path in routes - {("WEBSOCKET", "/v1/realtime")}:
                response = await client.request(method, path.format(response_id="r1"), json=body)
                statuses[method, path] = response.status_code
        said: list[Any] = []

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            said.append(message["type"])

        await guard({"type": "websocket", "path": "/v1/realtime", "headers": []}, receive, send)
        assert said == ["websocket.close"]
        return statuses

    statuses = asyncio.run(main())
    assert reached == FREE
    # not one of the screened is content-free by mistake: without a guard they are refused, or their body is
    assert all(statuses[route] in (400, 503) for route in SCREENED)
    assert {route for route, status in statuses.items() if status not in (404, 405)} == SCREENED | FREE


@pytest.mark.parametrize(
    ("yaml", "starts", "said"),
    [
        ("worker: {socket: w.sock, manage: false}", True, "Application startup complete"),
        (None, False, "GUARD_CONFIG"),
        ("policies: {default: {input: {on_harmful: blok}}}", False, "blok"),
    ],
    ids=["sound", "missing", "broken"],
)
def test_vllm_starts_with_a_sound_configuration_alone(
    python: Path, tmp_path: Path, yaml: str | None, starts: bool, said: str
) -> None:
    variables = {}
    if yaml is not None:
        (tmp_path / "guard.yaml").write_text(yaml)
        variables["GUARD_CONFIG"] = str(tmp_path / "guard.yaml")
    with scripted_worker(tmp_path / "w.sock"):
        process = Server([str(python), str(APP), "serve"], tmp_path, **variables)
        try:
            eventually(lambda: process.ended() or "Application startup complete" in process.output, seconds=300)
            assert process.ended() is not starts
        finally:
            process.stop()
    assert said in process.output
    assert ("Application startup complete" in process.output) is starts


def test_a_host_without_lifespan_gets_no_answer_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GUARD_CONFIG", raising=False)

    async def vllm(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("reached")

    async def main() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(VLLMGuard(vllm)), base_url="http://v") as client:
            await client.get("/health")

    with pytest.raises(ConfigError, match="GUARD_CONFIG"):
        asyncio.run(main())


def test_the_examples_own_configuration_is_valid() -> None:
    assert config.load(str(EXAMPLE / "guard.yaml")).worker.managed
