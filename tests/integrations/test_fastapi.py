"""The middleware over applications that serve the chat API themselves: the FastAPI example, and what else they do.

The example runs as its README says, in an environment of its own; the rest are Starlette's applications on a real
server here.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute

from guard_middleware import config
from guard_middleware.errors import ConfigError
from guard_middleware.middleware import GuardMiddleware
from guard_middleware.runtime import Runtime
from guard_middleware.scripted import ScriptedUpstream
from tests.clients import environments
from tests.support.gateway import CHAT, chat, eventually, scripted_worker
from tests.support.guards import RuleGuard
from tests.support.served import Served
from tests.support.virtualenv import Missing, made

EXAMPLE = Path(__file__).parents[2] / "integrations" / "examples" / "fastapi_app"
ROOT = Path(__file__).parents[2]
ANSWERS = {"good": "Bread needs an hour.", "bad": "First, pick a lock with two bits of wire."}
GOOD, BAD = chat("how do I bake bread?"), chat("how do I pick a lock?")


# -- the example --


class Example:
    """``uvicorn app:app`` beside the example's files, with a guard that a test chose."""

    def __init__(self, folder: Path, python: Path, settings: dict[str, Any], *options: str) -> None:
        self.log, self._folder = folder / "decisions.jsonl", folder
        shutil.copy(EXAMPLE / "app.py", folder)
        (folder / "guard.yaml").write_text(json.dumps({"audit": {"path": str(self.log)}, **settings}))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._argv = [str(python), "-m", "uvicorn", "app:app", "--port", str(port), *options]
        self._env = {**environments.variables(), "PYTHONPATH": f"{ROOT}:{ROOT / 'integrations'}"}

    def __enter__(self) -> Example:
        with (self._folder / "stderr").open("wb") as errors:
            self.popen = subprocess.Popen(self._argv, cwd=self._folder, env=self._env, stderr=errors, stdout=errors)
        eventually(lambda: self.popen.poll() is not None or self._answers(), seconds=60)
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.terminate()
        self.popen.wait(20)

    @property
    def stderr(self) -> str:
        return (self._folder / "stderr").read_text()

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture(scope="module")
def python() -> Path:
    try:
        return made("fastapi", Path(__file__).with_name("fastapi-requirements.txt"))
    except Missing as missing:
        pytest.skip(f"no environment with FastAPI: {missing}")


@pytest.fixture(scope="module")
def example(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    folder = tmp_path_factory.mktemp("fastapi")
    settings = {
        "worker": {"socket": str(folder / "w.sock"), "manage": False},
        "policies": {"outputs": {"input": {"on_harmful": "shadow"}}},
        "tenants": {"header": "x-tenant", "match": [{"tenant": "outputs", "policy": "outputs"}]},
    }
    with scripted_worker(folder / "w.sock"), Example(folder, python, settings) as served:
        assert served.popen.poll() is None, served.stderr
        yield served


@pytest.fixture(scope="module")
def client(example: Example) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="k", base_url=f"{example.url}/v1", max_retries=0) as sdk:
        yield sdk


def asked(text: str) -> Any:
    return {"model": "mine", "messages": [{"role": "user", "content": text}]}


def test_the_example_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**asked("hello"))
    assert answer.choices[0].message.content == "You said: hello "
    pieces = [
        part.choices[0].delta.content or "" for part in client.chat.completions.create(**asked("hi"), stream=True)
    ]
    assert "".join(pieces) == "You said: hi "


@pytest.mark.parametrize("stream", [False, True])
def test_the_example_refuses_a_harmful_prompt_before_the_application_hears_it(
    client: openai.OpenAI, example: Example, stream: bool
) -> None:
    before = httpx.get(f"{example.url}/health").json()
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked("how do I pick a lock?"), stream=stream)
    assert refused.value.code == "content_filter"
    assert httpx.get(f"{example.url}/health").json() == before


@pytest.mark.parametrize("stream", [False, True])
def test_the_example_withholds_a_harmful_answer(client: openai.OpenAI, stream: bool) -> None:
    answer = client.chat.completions.create(
        **asked("how do I pick a lock?"), stream=stream, extra_headers={"x-tenant": "outputs"}
    )
    parts = list(answer) if stream else [answer]
    text = "".join((part.choices[0].delta if stream else part.choices[0].message).content or "" for part in parts)
    assert "lock" not in text
    assert parts[-1].choices[0].finish_reason == "content_filter"


def test_the_examples_background_tasks_run(client: openai.OpenAI, example: Example) -> None:
    client.chat.completions.create(**{**asked("hello"), "model": "counted"})
    assert eventually(lambda: httpx.get(f"{example.url}/health").json()["answered"].get("counted") == 1)


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/redoc", "/", "/health/", "/v1/embeddings"])
def test_the_examples_other_routes_are_refused(example: Example, path: str) -> None:
    assert httpx.get(f"{example.url}{path}").status_code == 404


def test_a_request_that_fastapi_does_not_take_keeps_its_status(example: Example) -> None:
    response = httpx.post(f"{example.url}{CHAT}", json={"messages": [{"role": "user", "content": "hi"}]})
    assert response.status_code in (400, 422)
    assert response.headers["x-guard-action"] in ("reject", "error")


def test_the_example_does_not_start_on_a_broken_configuration(python: Path, tmp_path: Path) -> None:
    with Example(tmp_path, python, {"policies": {"default": {"input": {"on_harmful": "blok"}}}}) as served:
        assert served.popen.wait(20) != 0
    assert "blok" in served.stderr


def test_the_examples_own_configuration_is_valid() -> None:
    assert config.load(str(EXAMPLE / "guard.yaml")).worker.managed


# -- what else applications do --


def guarded(*routes: Any, folder: Path | None = None, **options: Any) -> Starlette:
    """The scripted API and these routes, guarded as one application."""
    unguarded = options.pop("unguarded", ())
    app = Starlette(routes=[*routes, *ScriptedUpstream(ANSWERS).app.routes], **options)
    settings = config.Config() if folder is None else config.parse(f"audit: {{path: {folder / 'log.jsonl'}}}")
    app.add_middleware(GuardMiddleware, runtime=Runtime(settings, guard=RuleGuard()), unguarded=unguarded)
    return app


def post(url: str, body: Any = GOOD, path: str = CHAT) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, trust_env=False)


def test_the_applications_lifespan_runs_between_the_guards() -> None:
    order: list[str] = []

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[dict[str, str]]:
        order.append("began")
        yield {"name": "state"}
        order.append("ended")

    async def state(request: Request) -> Response:
        return JSONResponse({"name": request.state.name})

    with Served(guarded(Route("/state", state), lifespan=lifespan, unguarded=["/state"])) as server:
        assert httpx.get(f"{server.url}/state").json() == {"name": "state"}
        assert post(server.url).status_code == 200
    assert order == ["began", "ended"]


@pytest.mark.parametrize(
    ("raised", "status", "words"),
    [(HTTPException(418, "pick a lock"), 418, False), (KeyError("pick a lock"), 409, False),
     (ValueError("pick a lock"), 502, False)],
)  # fmt: skip
def test_the_applications_own_errors_keep_their_status_and_not_their_words(
    raised: Exception, status: int, words: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails(_: Request) -> Response:
        raise raised

    async def handled(_: Request, error: Exception) -> Response:
        return PlainTextResponse(str(error), 409)

    app = guarded(Route(CHAT, fails, methods=["POST"]), exception_handlers={KeyError: handled})
    with Served(app) as server:
        response = post(server.url)
    assert response.status_code == status
    assert ("lock" in response.text) is words
    assert response.json()["error"]["code"]


def test_background_tasks_delay_no_answer_and_outlive_it() -> None:
    done = asyncio.Event()
    inner = ScriptedUpstream(ANSWERS)

    async def later() -> None:
        await asyncio.sleep(1)
        done.set()

    class Application:
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await inner.app(scope, receive, send)
            if scope["type"] == "http":
                await BackgroundTask(later)()

    app = GuardMiddleware(Application(), runtime=Runtime(config.Config(), guard=RuleGuard()))
    with Served(app) as server, httpx.Client(base_url=server.url, trust_env=False) as http:
        for _ in range(2):  # the second on the same connection, which the first has freed
            response = http.post(CHAT, json=GOOD)
            assert response.elapsed.total_seconds() < 0.8
        assert eventually(done.is_set)


def test_middleware_that_is_added_later_is_outside_and_answers_preflights() -> None:
    app = guarded()
    app.add_middleware(CORSMiddleware, allow_origins=["http://page"], allow_methods=["POST"], allow_headers=["*"])
    with Served(app) as server, httpx.Client(base_url=server.url, trust_env=False) as http:
        asked = {"origin": "http://page", "access-control-request-method": "POST"}
        assert http.options(CHAT, headers=asked).status_code == 200
        for body, status in ((GOOD, 200), (BAD, 400)):
            response = http.post(CHAT, json=body, headers={"origin": "http://page"})
            assert (response.status_code, response.headers["access-control-allow-origin"]) == (status, "http://page")


def test_compression_inside_the_guard_compresses_nothing() -> None:
    inner = ScriptedUpstream(ANSWERS).app
    inner.add_middleware(GZipMiddleware, minimum_size=1)
    with Served(GuardMiddleware(inner, runtime=Runtime(config.Config(), guard=RuleGuard()))) as server:
        response = post(server.url)
    assert response.status_code == 200
    assert "content-encoding" not in response.headers


def test_a_websocket_of_the_application_is_closed() -> None:
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    async def talk(websocket: Any) -> None:
        await websocket.accept()

    with (
        Served(guarded(WebSocketRoute("/talk", talk))) as server,
        pytest.raises(InvalidStatus, match="403"),
        connect(server.url.replace("http", "ws") + "/talk", proxy=None),
    ):
        pass


# -- beside other routes: the API as an application of its own --


def mounted(folder: Path) -> Starlette:
    """Only what lies under ``/llm`` is guarded; the worker's life is the outer application's lifespan."""
    runtime = Runtime(config.parse(f"audit: {{path: {folder / 'log.jsonl'}}}"), guard=RuleGuard())

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await runtime.start(wait=True)
        try:
            yield
        finally:
            await runtime.aclose()

    async def login(request: Request) -> Response:
        return JSONResponse(await request.json())

    api = GuardMiddleware(ScriptedUpstream(ANSWERS).app, runtime=runtime)
    return Starlette(lifespan=lifespan, routes=[Route("/login", login, methods=["POST"]), Mount("/llm", app=api)])


@pytest.mark.parametrize("root", ["", "/behind/proxy"])
def test_an_api_mounted_under_a_prefix_is_guarded_and_the_rest_is_not(tmp_path: Path, root: str) -> None:
    with Served(mounted(tmp_path), root_path=root) as server:
        assert post(server.url, path=f"/llm{CHAT}").json()["choices"][0]["message"]["content"] == ANSWERS["good"]
        assert post(server.url, BAD, f"/llm{CHAT}").status_code == 400
        harmful = post(server.url, chat("how do I bake bread?", "bad"), f"/llm{CHAT}")
        assert harmful.json()["choices"][0]["finish_reason"] == "content_filter"
        assert post(server.url, {"user": "me"}, "/login").json() == {"user": "me"}
        for path in (CHAT, f"/llm/llm{CHAT}", f"/llm/{CHAT}", "/llm/v1/embeddings", f"/%6Clm{CHAT}"):
            assert post(server.url, path=path).status_code == 404, path
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["outcome"] for record in records[:3]] == ["allowed", "blocked", "blocked"]
    assert {record["path"] for record in records[:3]} == {CHAT}


def test_a_configuration_that_is_first_read_at_the_start_serves_nothing(tmp_path: Path) -> None:
    """Starlette makes its middleware with the first event; uvicorn then serves on, and every request fails."""
    (tmp_path / "guard.yaml").write_text("policies: 3")
    app = Starlette(routes=ScriptedUpstream(ANSWERS).app.routes)
    app.add_middleware(GuardMiddleware, config=str(tmp_path / "guard.yaml"))
    with pytest.raises(ConfigError), httpx.Client(transport=_AsgiOnce(app), base_url="http://app") as http:
        http.post(CHAT, json=GOOD)


class _AsgiOnce(httpx.BaseTransport):
    def __init__(self, app: Any) -> None:
        self._inner = httpx.ASGITransport(app)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return asyncio.run(self._inner.handle_async_request(request))
