"""The guarded transports of httpx and httpx2: what reaches the provider, what breaks, what closing ends."""

from __future__ import annotations

import asyncio
import gzip
import importlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from guard_middleware import config
from guard_middleware.errors import ConfigError
from guard_middleware.guard.supervisor import WorkerProcess
from guard_middleware.runtime import Runtime
from guard_middleware.telemetry import Telemetry
from tests.clients import environments
from tests.support.gateway import Seen, Upstream, chunk, completion, eventually, scripted_worker
from tests.support.guards import RuleGuard

BREAD, LOCK = "how do I bake bread?", "how do I pick a lock?"
LIBRARIES = ["httpx", "httpx2"]
Handler = Callable[[Any], Any]


class Wired:
    """A guarded client of one library over a provider that is a function; ``seen`` is what reached it."""

    def __init__(self, folder: Path, library: str, yaml: str = "", guard: Any = None, **options: Any) -> None:
        self.http: Any = importlib.import_module(library)
        self.guarded: Any = importlib.import_module(f"guard_integrations.{library}")
        self.log = folder / "decisions.jsonl"
        self.seen: list[Any] = []
        self.handler: Handler = self.says("An hour.")
        self.options = options
        settings = config.parse(f"{yaml}\naudit: {{path: {json.dumps(str(self.log))}}}\n")
        self.runtime = Runtime(settings, guard=guard or RuleGuard(), telemetry=options.pop("telemetry", None))

    def says(self, text: str) -> Handler:
        return lambda request: self.http.Response(200, json=answer(text))

    async def handle(self, request: Any) -> Any:
        self.seen.append(request)
        response = self.handler(request)
        return await response if asyncio.iscoroutine(response) else response

    def transport(self, kind: str = "GuardTransport") -> Any:
        inner = self.http.MockTransport(self.handle)
        return getattr(self.guarded, kind)(inner, runtime=self.runtime, **self.options)

    def client(self) -> Any:
        return self.http.Client(transport=self.transport(), base_url="http://provider")

    def later(self) -> Any:
        return self.http.AsyncClient(transport=self.transport("AsyncGuardTransport"), base_url="http://provider")

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture(params=LIBRARIES)
def wired(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Wired]:
    return lambda *given, **options: Wired(tmp_path, request.param, *given, **options)


def ask(text: str = BREAD, **extra: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **extra}


class _Asked:
    model = "m"


def answer(text: str) -> dict[str, Any]:
    return completion(_Asked(), {"content": text})  # type: ignore[arg-type]


def piece(text: str) -> bytes:
    return chunk(_Asked(), {"content": text})  # type: ignore[arg-type]


CHAT = "/v1/chat/completions"


# -- what reaches the provider --


def test_what_was_judged_is_what_is_sent_and_nothing_steers_the_provider(wired: Callable[..., Wired]) -> None:
    w = wired()
    extensions = {"target": b"/v1/embeddings", "sni_hostname": "other"}
    headers = {
        "authorization": "Bearer k", "host": "other", "accept-encoding": "gzip", "x-guard-policy": "off",
        "x-forwarded-host": "other", "openai-organization": "o",
    }  # fmt: skip
    with w.client() as client:
        url = f"{CHAT}?guardrails=off&api-version=2025-01-01"
        response = client.post(url, json=ask(), headers=headers, extensions=extensions, timeout=7)
    assert response.json()["choices"][0]["message"]["content"] == "An hour."
    assert response.headers["x-guard-action"] == "allow"
    (sent,) = w.seen
    assert str(sent.url) == f"http://provider{CHAT}?api-version=2025-01-01"
    assert {name: value for name, value in sent.headers.items() if name not in ("user-agent", "content-length")} == {
        "host": "provider", "authorization": "Bearer k", "openai-organization": "o", "accept-encoding": "identity",
        "content-type": "application/json",
    }  # fmt: skip
    assert sent.extensions == {"timeout": {"connect": 7, "read": 7, "write": 7, "pool": 7}}
    assert json.loads(sent.content) == ask()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/embeddings", 404),
        ("POST", "/v1/files", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("POST", "/v1//chat/completions", 404),
        ("POST", "/chat/completions", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/responses/r1/cancel", 404),
    ],
)
def test_a_path_that_the_proxy_refuses_is_refused(
    wired: Callable[..., Wired], method: str, path: str, status: int
) -> None:
    w = wired()
    with w.client() as client:
        assert client.request(method, path, json=ask()).status_code == status
    assert w.seen == []


def test_the_list_of_models_passes(wired: Callable[..., Wired]) -> None:
    w = wired()
    w.handler = lambda request: w.http.Response(200, json={"object": "list", "data": []})
    with w.client() as client:
        assert client.get("/v1/models").json() == {"object": "list", "data": []}
    assert [sent.method for sent in w.seen] == ["GET"]


@pytest.mark.parametrize(
    ("base", "path", "reached"),
    [
        ("/openai/v1", "/openai/v1/chat/completions", True),
        ("/openai/deployments/gpt", "/openai/deployments/gpt/chat/completions", True),
        ("/openai/v1", "/other/v1/chat/completions", False),
        ("/openai/v1", "/openai/v1x/chat/completions", False),
        ("/openai", "/openai/chat/../../v1/files", False),
    ],
)
def test_a_providers_base_path_stands_for_v1(wired: Callable[..., Wired], base: str, path: str, reached: bool) -> None:
    w = wired(base_path=base)
    with w.client() as client:
        allowed, blocked = client.post(path, json=ask()), client.post(path, json=ask(LOCK))
    assert (allowed.status_code, blocked.status_code) == ((200, 400) if reached else (404, 404))
    assert [sent.url.path for sent in w.seen] == ([path] if reached else [])


def test_azures_client_keeps_its_query_and_its_key(wired: Callable[..., Wired]) -> None:
    w = wired(base_path="/openai/deployments/gpt")
    client = openai.AzureOpenAI(
        azure_endpoint="http://provider", azure_deployment="gpt", api_version="2025-01-01", api_key="k",
        http_client=w.client(),
    )  # fmt: skip
    with client:
        client.chat.completions.create(**ask())
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**ask(LOCK))
    assert refused.value.code == "content_filter"
    (sent,) = w.seen
    assert sent.url.raw_path == b"/openai/deployments/gpt/chat/completions?api-version=2025-01-01"
    assert sent.headers["api-key"] == "k"


@pytest.mark.parametrize("base", ["", "v1", "/v1/", "/"])
def test_a_base_path_that_cannot_be_one_is_an_error(wired: Callable[..., Wired], base: str) -> None:
    with pytest.raises(ConfigError, match="base_path"):
        wired(base_path=base).client()


def test_a_broken_configuration_makes_no_transport(wired: Callable[..., Wired], tmp_path: Path) -> None:
    (tmp_path / "guard.yaml").write_text("policies: {default: {input: {on_harmful: blok}}}")
    for kind in ("GuardTransport", "AsyncGuardTransport"):
        with pytest.raises(ConfigError, match="blok"):
            getattr(wired().guarded, kind)(config=tmp_path / "guard.yaml")


def test_an_inner_transport_that_is_not_asynchronous_is_refused_with_the_remedy(wired: Callable[..., Wired]) -> None:
    w = wired()
    with pytest.raises(TypeError, match="AsyncHTTPTransport"):
        w.guarded.GuardTransport(w.http.HTTPTransport(), runtime=w.runtime)


def test_the_tenant_of_a_transport_selects_its_policy(wired: Callable[..., Wired]) -> None:
    yaml = """
policies: {watch: {input: {on_harmful: annotate}}}
tenants: {header: x-tenant, match: [{tenant: research, policy: watch}]}
"""
    w = wired(yaml, tenant="research")
    with w.client() as client:
        response = client.post(CHAT, json=ask(LOCK), headers={"x-tenant": "other"})
    assert response.headers.get("x-guard-action") in (None, "reject")  # one header, two tenants
    w = wired(yaml, tenant="research")
    with w.client() as client:
        assert client.post(CHAT, json=ask(LOCK)).headers["x-guard-action"] == "annotate"
    w = wired(yaml)
    with w.client() as client:
        assert client.post(CHAT, json=ask(LOCK), headers={"x-tenant": "research"}).status_code == 400


def test_a_proxy_of_the_client_goes_past_its_transport_as_the_documentation_says(wired: Callable[..., Wired]) -> None:
    w = wired()
    transport = w.transport()
    with w.http.Client(transport=transport, proxy="http://127.0.0.1:9") as client, pytest.raises(w.http.ConnectError):
        client.post(f"http://provider{CHAT}", json=ask())
    assert not w.log.exists() or not w.records()


# -- what breaks --

BREAKS = ["ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "RemoteProtocolError", "PoolTimeout"]


@pytest.mark.parametrize("name", BREAKS)
def test_what_breaks_the_call_is_raised_as_it_was_and_recorded(wired: Callable[..., Wired], name: str) -> None:
    w = wired()

    def broken(request: Any) -> Any:
        raise getattr(w.http, name)("broken", request=request)

    w.handler = broken
    with w.client() as client, pytest.raises(getattr(w.http, name), match="broken"):
        client.post(CHAT, json=ask())
    (record,) = w.records()
    kind = "timeout" if "Timeout" in name else "unreachable" if name == "ConnectError" else "reset"
    assert (record["outcome"], record["error"]) == ("upstream_error", f"upstream_{kind}")


def test_in_a_race_a_block_comes_before_what_broke(wired: Callable[..., Wired]) -> None:
    w = wired("policies: {default: {race: true}}", RuleGuard({"input": 0.05}))

    def broken(request: Any) -> Any:
        raise w.http.ConnectError("broken")

    w.handler = broken
    with w.client() as client:
        assert client.post(CHAT, json=ask(LOCK)).status_code == 400
        with pytest.raises(w.http.ConnectError):
            client.post(CHAT, json=ask())


def test_in_a_race_a_block_ends_the_call_to_the_provider(wired: Callable[..., Wired]) -> None:
    w = wired("policies: {default: {race: true}}", RuleGuard({"input": 0.05}))
    ended: list[str] = []

    async def slow(request: Any) -> Any:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("call")

    w.handler = slow
    with w.client() as client:
        assert client.post(CHAT, json=ask(LOCK)).status_code == 400
    assert ended == ["call"]


def test_a_stream_that_breaks_after_its_first_window_ends_in_an_error_event(wired: Callable[..., Wired]) -> None:
    w = wired(WINDOW)

    async def broken() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield piece("bread needs an hour. ")
        await asyncio.sleep(0.05)
        raise w.http.ReadError("broken")

    w.handler = streaming(w, broken)
    with w.client() as client, client.stream("POST", CHAT, json=ask(stream=True)) as response:
        body = response.read()
    assert b"bread" in body
    assert b'"error"' in body
    assert w.records()[0]["outcome"] == "upstream_error"


def test_a_compressed_answer_is_refused_unread(wired: Callable[..., Wired]) -> None:
    w = wired()
    body = gzip.compress(json.dumps(answer("hi")).encode())
    w.handler = lambda request: w.http.Response(
        200, headers={"content-type": "application/json", "content-encoding": "gzip"}, stream=w.http.ByteStream(body)
    )
    with w.client() as client:
        response = client.post(CHAT, json=ask())
    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_unsupported")


def test_the_providers_own_error_keeps_its_status_and_when_to_come_again(wired: Callable[..., Wired]) -> None:
    w = wired()
    w.handler = lambda request: w.http.Response(429, headers={"retry-after": "3"}, json={"error": {"message": LOCK}})
    with w.client() as client:
        response = client.post(CHAT, json=ask())
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert "lock" not in response.text


# -- streams, time-outs and clients that go --

WINDOW = "policies: {default: {output: {stream: {mode: window, first_window: 80, overlap: 40}}}}"


def streaming(w: Wired, pieces: Callable[[], AsyncIterator[bytes]]) -> Handler:
    class Stream(w.http.AsyncByteStream):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self._pieces = pieces()

        def __aiter__(self) -> AsyncIterator[bytes]:
            return self._pieces

        async def aclose(self) -> None:
            await self._pieces.aclose()  # type: ignore[attr-defined]

    return lambda request: w.http.Response(200, headers={"content-type": "text/event-stream"}, stream=Stream())


class Endless:
    """A stream that never ends by itself; ``given`` counts its pieces."""

    def __init__(self) -> None:
        self.given, self.ended = 0, threading.Event()

    async def __call__(self) -> AsyncIterator[bytes]:
        try:
            for number in itertools.count():
                yield piece(f"bread needs hour {number}. ")
                self.given += 1
                await asyncio.sleep(0)
        finally:
            self.ended.set()


def test_a_stream_is_lazy_waits_for_its_reader_and_ends_with_it(wired: Callable[..., Wired]) -> None:
    w, endless = wired(WINDOW + "\nlimits: {answer_bytes: 64MiB}"), Endless()
    w.handler = streaming(w, endless)
    with w.client() as client:
        with client.stream("POST", CHAT, json=ask(stream=True)) as response:
            chunks = response.iter_raw()
            assert b"data:" in next(chunks)

            def stalled() -> bool:
                before = endless.given
                time.sleep(0.3)
                return endless.given == before

            eventually(stalled)
            assert not endless.ended.is_set()
            stalled_at = endless.given
            eventually(lambda: next(chunks) and endless.given > stalled_at)  # and it goes on with its reader
        assert endless.ended.wait(5)
    (record,) = w.records()
    assert (record["outcome"], record["error"]) == ("aborted", "client_disconnected")


def test_the_same_without_a_thread(wired: Callable[..., Wired]) -> None:
    w, endless = wired(WINDOW + "\nlimits: {answer_bytes: 64MiB}"), Endless()
    w.handler = streaming(w, endless)

    async def main() -> None:
        async with w.later() as client:
            async with client.stream("POST", CHAT, json=ask(stream=True)) as response:
                chunks = response.aiter_raw()
                assert b"data:" in await anext(chunks)
                while (before := endless.given) is not None:
                    await asyncio.sleep(0.3)
                    if endless.given == before:
                        break
                assert not endless.ended.is_set()
                await chunks.aclose()
            assert endless.ended.is_set()

    asyncio.run(main())
    (record,) = w.records()
    assert (record["outcome"], record["error"]) == ("aborted", "client_disconnected")


def test_a_call_that_is_cancelled_ends_the_providers(wired: Callable[..., Wired]) -> None:
    w, ended = wired(), []

    async def slow(request: Any) -> Any:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    w.handler = slow

    async def main() -> None:
        async with w.later() as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.post(CHAT, json=ask()), 0.2)
            assert ended

    asyncio.run(main())
    assert [record["error"] for record in w.records()] == ["client_disconnected"]


async def silent(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    raise ConnectionResetError


def test_the_clients_time_out_holds_for_the_provider_over_a_real_connection(wired: Callable[..., Wired]) -> None:
    w = wired()
    with Upstream({"silent": silent}) as upstream:
        client = openai.OpenAI(
            api_key="k", base_url=f"{upstream.url}/v1", timeout=0.3, max_retries=0,
            http_client=w.http.Client(transport=w.guarded.GuardTransport(runtime=w.runtime)),
        )  # fmt: skip
        with client, pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(**{**ask(), "model": "silent"})
        assert eventually(lambda: upstream.abandoned) == ["silent"]
    assert [record["error"] for record in w.records()] == ["upstream_timeout"]


def test_many_threads_share_one_transport(wired: Callable[..., Wired]) -> None:
    w = wired()
    texts = [BREAD if number % 2 else LOCK for number in range(24)]
    statuses: dict[int, int] = {}
    with w.client() as client:

        def work(number: int) -> None:
            statuses[number] = client.post(CHAT, json=ask(f"{texts[number]} {number}")).status_code

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(texts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert sum(thread.name == "guard-portal" for thread in threading.enumerate()) == 1
    assert [statuses[number] for number in range(len(texts))] == [200 if text == BREAD else 400 for text in texts]
    assert not any(thread.name == "guard-portal" for thread in threading.enumerate())


def test_the_guards_spans_are_below_the_callers(wired: Callable[..., Wired]) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    w = wired(telemetry=Telemetry(tracer_provider=provider))
    with w.client() as client, provider.get_tracer("app").start_as_current_span("app") as app:
        client.post(CHAT, json=ask())
    spans = exporter.get_finished_spans()
    assert len(spans) > 1
    assert {span.context.trace_id for span in spans} == {app.get_span_context().trace_id}
    (sent,) = w.seen
    assert f"{app.get_span_context().trace_id:032x}" in sent.headers["traceparent"]


# -- beginning and end --


def test_closing_ends_the_worker_that_the_transport_started(wired: Callable[..., Wired], tmp_path: Path) -> None:
    w = wired()
    settings = config.parse(json.dumps({"worker": {"socket": str(tmp_path / "w.sock")}}))

    def managed() -> Runtime:
        runtime = Runtime(settings)
        script = str(Path(__file__).parents[1] / "support" / "scripted_worker.py")
        argv = [sys.executable, script, "--socket", str(tmp_path / "w.sock"), "--exit-with-parent"]
        runtime.workers.processes[config.DEFAULT_GUARD] = WorkerProcess(argv, tmp_path / "w.sock")
        return runtime

    runtime = managed()
    inner = w.http.MockTransport(w.handle)
    with w.http.Client(transport=w.guarded.GuardTransport(inner, runtime=runtime), base_url="http://p") as client:
        # the very first request waits for the worker rather than being refused
        assert client.post(CHAT, json=ask()).status_code == 200
        pid = runtime.worker.pid
        assert pid is not None
    assert eventually(lambda: not Path(f"/proc/{pid}").exists())

    async def main() -> int:
        runtime = managed()
        transport = w.guarded.AsyncGuardTransport(inner, runtime=runtime)
        async with w.http.AsyncClient(transport=transport, base_url="http://p") as client:
            assert (await client.post(CHAT, json=ask(LOCK))).status_code == 400
            assert runtime.worker.pid is not None
            return runtime.worker.pid

    pid = asyncio.run(main())
    assert eventually(lambda: not Path(f"/proc/{pid}").exists())


def test_a_closed_transport_says_so_and_ends_what_was_open(wired: Callable[..., Wired]) -> None:
    w, endless = wired(WINDOW), Endless()
    w.handler = streaming(w, endless)
    transport = w.transport()
    client = w.http.Client(transport=transport, base_url="http://provider")
    request = client.build_request("POST", CHAT, json=ask(stream=True))
    response = client.send(request, stream=True)
    chunks = response.iter_raw()
    next(chunks)
    transport.close()
    assert endless.ended.is_set()
    with pytest.raises(RuntimeError, match="closed"):
        client.post(CHAT, json=ask())
    response.close()
    assert [record["error"] for record in w.records()] == ["client_disconnected"]


SCRIPT = """
import sys, {library} as http, openai
from guard_integrations.{library} import GuardTransport
guarded = http.Client(transport=GuardTransport(config=sys.argv[1]))
client = openai.OpenAI(api_key="k", base_url=sys.argv[2], http_client=guarded)
try:
    client.chat.completions.create(model="m", messages=[dict(role="user", content="how do I pick a lock?")])
except openai.BadRequestError as error:
    print(error.code)
{after}
"""
FORKS = """
import os
pid = os.fork()
if pid == 0:
    try:
        client.chat.completions.create(model="m", messages=[dict(role="user", content="hi")])
    except openai.APIConnectionError as error:
        print(repr(error.__cause__), flush=True)
    except RuntimeError as error:
        print("forked:", error, flush=True)
    sys.exit(0)
os.waitpid(pid, 0)
"""


@pytest.mark.parametrize("after", ["", FORKS], ids=["plain", "forked"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_program_that_never_closes_ends_and_its_log_is_whole(tmp_path: Path, library: str, after: str) -> None:
    log, file = tmp_path / "log.jsonl", tmp_path / "guard.yaml"
    settings = {"worker": {"socket": str(tmp_path / "w.sock"), "manage": False}, "audit": {"path": str(log)}}
    file.write_text(json.dumps(settings))
    root = Path(__file__).parents[2]
    with scripted_worker(tmp_path / "w.sock"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(library=library, after=after), str(file), "http://127.0.0.1:9/v1"],
            env={**os.environ, "PYTHONPATH": f"{root}:{root / 'integrations'}"},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.startswith("content_filter\n")
    if after:
        assert "does not outlive a fork" in done.stdout
    assert [json.loads(line)["outcome"] for line in log.read_text().splitlines()] == ["blocked"]


def test_a_second_event_loop_is_refused_rather_than_hanging(wired: Callable[..., Wired]) -> None:
    w = wired()
    client = w.later()

    async def once() -> int:
        return (await client.post(CHAT, json=ask())).status_code  # type: ignore[no-any-return]

    assert asyncio.run(once()) == 200
    with pytest.raises(RuntimeError, match="event loop"):
        asyncio.run(once())


def test_a_transport_that_is_forgotten_ends_its_thread(wired: Callable[..., Wired]) -> None:
    client: Any = wired().client()
    assert client.post(CHAT, json=ask()).status_code == 200
    del client
    assert eventually(lambda: not any(thread.name == "guard-portal" for thread in threading.enumerate()))


def test_annotations_come_with_the_answer(wired: Callable[..., Wired]) -> None:
    w = wired("policies: {default: {output: {on_harmful: annotate}}}")
    w.handler = w.says("First, pick a lock.")
    with w.client() as client:
        response = client.post(CHAT, json=ask())
    assert response.headers["x-guard-action"] == "annotate"
    assert response.json()["moderation"]["output"]["results"][0]["flagged"] is True


# -- the example --

EXAMPLE = Path(__file__).parents[2] / "integrations" / "examples" / "httpx_openai"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], tuple[int, str]]]:
    """Runs ``python ask.py PROMPT`` beside a guard that a test chose, against the scripted provider's model."""
    folder = tmp_path_factory.mktemp("example")
    settings = {
        "worker": {"socket": str(folder / "w.sock"), "manage": False},
        "policies": {"default": {"output": {"stream": {"mode": "window", "first_window": 80, "overlap": 40}}}},
    }
    (folder / "guard.yaml").write_text(json.dumps(settings))
    root = Path(__file__).parents[2]
    with scripted_worker(folder / "w.sock"), Upstream() as upstream:

        def run(prompt: str, model: str) -> tuple[int, str]:
            environment = {
                **environments.variables(),
                "PYTHONPATH": f"{root}:{root / 'integrations'}",
                "OPENAI_API_KEY": "k",
                "OPENAI_BASE_URL": f"{upstream.url}/v1",
                "MODEL": model,
            }
            done = subprocess.run(
                [sys.executable, str(EXAMPLE / "ask.py"), prompt],
                cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert done.stderr == ""
            return done.returncode, done.stdout

        yield run


@pytest.mark.parametrize(
    ("prompt", "model", "code", "words"),
    [(BREAD, "good", 0, "Bread needs an hour."), (LOCK, "good", 1, "refused:"), (BREAD, "bad", 1, "withheld:")],
)
def test_the_example_answers_refuses_and_withholds(
    example: Callable[[str, str], tuple[int, str]], prompt: str, model: str, code: int, words: str
) -> None:
    status, said = example(prompt, model)
    assert (status, words in said, "wire" in said) == (code, True, False), said


def test_the_examples_own_configuration_is_valid() -> None:
    assert config.load(str(EXAMPLE / "guard.yaml")).worker.managed
