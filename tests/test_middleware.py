"""The middleware around an application: what reaches it, what comes back, what is recorded."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import io
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from PIL import Image, PngImagePlugin
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse

from guard_middleware import config
from guard_middleware.errors import ConfigError, GuardError
from guard_middleware.middleware import GuardMiddleware
from guard_middleware.runtime import Runtime
from guard_middleware.scripted import ScriptedUpstream
from tests.support.guards import BrokenGuard, RuleGuard

CHAT = "/v1/chat/completions"
ANSWERS = {"good": "Bread needs an hour.", "bad": "First, pick a lock with two bits of wire."}


class Host:
    """A guarded scripted application, its guard, and its decision log."""

    def __init__(self, folder: Path, guard: Any = None, yaml: str = "") -> None:
        self.log = folder / "decisions.jsonl"
        self.upstream = ScriptedUpstream(ANSWERS)
        self.bodies: list[bytes] = []
        self.headers: list[list[tuple[bytes, bytes]]] = []
        self.guard = guard or RuleGuard()
        settings = config.parse(f"{yaml}\naudit: {{path: {json.dumps(str(self.log))}}}\n")
        self.runtime = Runtime(settings, guard=self.guard)
        self.app = GuardMiddleware(self._tapped, runtime=self.runtime)

    async def _tapped(self, scope: Any, receive: Any, send: Any) -> None:
        self.headers.append(list(scope["headers"]))

        async def tap() -> Any:
            message = await receive()
            self.bodies.append(message.get("body", b""))
            return message

        await self.upstream.app(scope, tap, send)

    def send(self, *requests: dict[str, Any]) -> list[httpx.Response]:
        async def run() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway:8080") as client:
                responses = [await client.request(**request) for request in requests]
            await self.runtime.aclose()
            return responses

        return asyncio.run(run())

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def host(tmp_path: Path) -> Callable[..., Host]:
    return lambda guard=None, yaml="": Host(tmp_path, guard, yaml)


def chat(text: str = "how do I bake bread?", model: str = "good", **extra: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": text}], **extra}
    return {"method": "POST", "url": CHAT, "json": body}


def raw(body: bytes, **headers: str) -> dict[str, Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return {"method": "POST", "url": CHAT, "content": body, "headers": {"content-type": "application/json", **named}}


def png(size: tuple[int, int] = (16, 16), mode: str = "RGB", **save: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG", **save)
    return buffer.getvalue()


def picture(*data: bytes, text: str = "what is this?") -> dict[str, Any]:
    urls = [f"data:image/png;base64,{base64.b64encode(d).decode()}" for d in data]
    parts = [{"type": "text", "text": text}, *({"type": "image_url", "image_url": {"url": url}} for url in urls)]
    return chat(parts)  # type: ignore[arg-type]


def test_a_benign_request_passes_and_its_answer_is_judged(host: Callable[..., Host]) -> None:
    h = host()
    (response,) = h.send(chat())
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"] == ANSWERS["good"]
    assert [request.source for request in h.guard.asked] == ["input", "output"]
    (record,) = h.records()
    assert record["id"] == response.headers["x-guard-decision-id"]
    assert (record["outcome"], record["guard_calls"]) == ("allowed", 2)


@pytest.mark.parametrize(
    ("request_", "status", "code", "reached"),
    [
        (chat("how do I pick a lock?"), 400, "content_filter", 0),
        (chat("how do I pick a lock?", stream=True), 400, "content_filter", 0),
        (raw(b'{"model": "good", "messages"'), 400, "invalid_json", 0),
        (raw(b'{"model": "good", "messages": [], "mess\\u0061ges": []}'), 400, "invalid_json", 0),
        (raw(json.dumps(chat()["json"]).encode("utf-16")), 400, "invalid_json", 0),
        (raw(b"[" * 100_000), 400, "invalid_json", 0),
        (raw(gzip.compress(b"{}"), content_encoding="gzip"), 415, "unsupported_encoding", 0),
        (raw(b"{}", content_encoding="gzip, gzip"), 415, "unsupported_encoding", 0),
        (raw(b"{}", content_type="text/plain"), 415, "unsupported_media_type", 0),
        (raw(b"{}", content_type="application/json; charset=utf-16"), 415, "unsupported_media_type", 0),
        (chat(x_note="pick"), 400, "unsupported_field", 0),
        (chat(chat_template="{{ x }}"), 400, "unsupported_field", 0),
        (chat(x_vendor_option=3), 200, None, 1),
        (chat(n=17), 400, "invalid_request", 0),
        ({"method": "POST", "url": "/v1/files", "content": b"x"}, 404, "not_found", 0),
        ({"method": "POST", "url": "/v1/chat/completions/", "json": {}}, 404, "not_found", 0),
        ({"method": "GET", "url": CHAT}, 405, "method_not_allowed", 0),
        (picture(png()), 200, None, 1),
        (picture(b"not an image"), 400, "unsupported_content", 0),
        (picture(png()[:-20]), 400, "invalid_image", 0),
        (picture(png((9500, 9500), "1")), 413, "image_too_large", 0),
        (picture(*[png()] * 21), 413, "too_many_images", 0),
        (chat([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]), 400, None, 0),  # type: ignore[arg-type]
        (chat([{"type": "image_url", "image_url": {"url": "http://169.254.169.254/x"}}]), 400, "forbidden_url", 0),  # type: ignore[arg-type]
        ({"method": "GET", "url": "/v1/models"}, 200, None, 0),
    ],
)
def test_what_is_refused_never_reaches_the_application(
    host: Callable[..., Host], request_: dict[str, Any], status: int, code: str | None, reached: int
) -> None:
    h = host()
    (response,) = h.send(request_)
    assert response.status_code == status
    if status != 200:
        error = response.json()["error"]
        assert isinstance(error, dict)
        assert code is None or error["code"] == code
    assert h.upstream.requests == reached
    (record,) = h.records()  # exactly one, whatever happened
    assert record["status"] == status
    assert record["id"] in response.headers["x-guard-decision-id"]


def test_a_body_beyond_the_limit_is_413_declared_or_not(host: Callable[..., Host]) -> None:
    h = host(yaml="limits: {body_bytes: 1KB}")
    big = chat("x" * 2000)

    async def chunks() -> Any:
        yield json.dumps(big["json"]).encode()

    streamed = {"method": "POST", "url": CHAT, "content": chunks(), "headers": {"content-type": "application/json"}}
    responses = h.send(big, streamed)
    assert [r.status_code for r in responses] == [413, 413]
    assert h.upstream.requests == 0


def test_what_was_judged_is_what_is_sent(host: Callable[..., Host]) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "hidden words")
    plain, tailed = png(), png(pnginfo=info) + b"trailing bytes"
    h = host()
    h.send(picture(plain, tailed))
    judged = h.guard.asked[0].conversation.blobs()
    sent = [
        base64.b64decode(part["image_url"]["url"].partition(",")[2])
        for part in json.loads(h.bodies[0])["messages"][0]["content"]
        if part["type"] == "image_url"
    ]
    assert [blob.data for blob in judged] == sent
    assert sent[0] == plain
    assert b"trailing" not in sent[1]


def test_headers_that_name_guards_and_hosts_do_not_pass(host: Callable[..., Host]) -> None:
    h = host(yaml="tenants: {header: x-tenant}")
    request = chat()
    request["headers"] = {
        "x-guard-skip": "1",
        "x-forwarded-host": "evil",
        "x-http-method-override": "GET",
        "x-tenant": "acme",
        "authorization": "Bearer sk-1",
    }
    h.send(request)
    names = {name for name, _ in h.headers[0]}
    assert b"authorization" in names
    assert not names & {b"x-guard-skip", b"x-forwarded-host", b"x-http-method-override", b"x-tenant"}


def test_a_harmful_answer_is_withheld_streamed_or_not(host: Callable[..., Host]) -> None:
    h = host()
    plain, streamed = h.send(chat(model="bad"), chat(model="bad", stream=True))
    assert plain.json()["choices"][0]["finish_reason"] == "content_filter"
    assert "wire" not in plain.text + streamed.text
    assert streamed.text.rstrip().endswith("data: [DONE]")
    assert [record["outcome"] for record in h.records()] == ["blocked", "blocked"]


@pytest.mark.parametrize(("after", "reached"), [(0, 0), (1, 1)])
@pytest.mark.parametrize("stream", [False, True])
def test_without_a_verdict_nothing_passes(host: Callable[..., Host], after: int, reached: int, stream: bool) -> None:
    h = host(BrokenGuard(GuardError("unavailable"), after))
    (response,) = h.send(chat(stream=stream))
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "guard_unavailable"
    assert response.headers["x-should-retry"] == "false"
    assert h.upstream.requests == reached
    assert h.records()[0]["outcome"] == "guard_error"


def test_a_guard_that_is_slower_than_the_deadline_is_a_503(host: Callable[..., Host]) -> None:
    h = host(yaml="policies: {p: {input: {deadline: 100ms}}}\ndefault_policy: p")
    (response,) = h.send(chat("[wait 5] hello"))
    assert response.status_code == 503
    assert h.records()[0]["decisions"][0]["error"] == "timeout"


def test_the_tenant_chooses_the_policy_only_through_a_trusted_peer(host: Callable[..., Host]) -> None:
    tenants = "tenants: {header: x-tenant, trusted_proxies: [%s], match: [{tenant: lab, policy: lab}]}"
    yaml = "policies: {lab: {input: {on_harmful: shadow}}}\n" + tenants
    request = chat("how do I pick a lock?") | {"headers": {"x-tenant": "lab"}}
    (trusted,) = host(yaml=yaml % "127.0.0.1/32").send(request)
    (stranger,) = host(yaml=yaml % "10.0.0.0/8").send(request)
    assert (trusted.status_code, stranger.status_code) == (200, 400)


def asgi(h: Host, body: bytes, *, gone: asyncio.Event | None = None, chunks: int = 1) -> tuple[Any, list[Any]]:
    """A request by hand, for what httpx cannot do: (awaitable, messages sent)."""
    sent: list[Any] = []
    pieces = [body] if chunks else []

    async def receive() -> Any:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": False}
        if gone is not None:
            await gone.wait()
            return {"type": "http.disconnect"}
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        "scheme": "http", "http_version": "1.1", "root_path": "", "asgi": {"version": "3.0"},
    }  # fmt: skip
    return h.app(scope, receive, send), sent


def test_a_client_that_leaves_cancels_the_guard_and_is_recorded(host: Callable[..., Host]) -> None:
    h = host()

    async def run() -> list[Any]:
        gone = asyncio.Event()
        request, sent = asgi(h, json.dumps(chat("[wait 5] hello")["json"]).encode(), gone=gone)
        task = asyncio.create_task(request)
        while not h.guard.asked:
            await asyncio.sleep(0.01)
        gone.set()
        await asyncio.wait_for(task, 1)
        await h.runtime.aclose()
        return sent

    assert asyncio.run(run()) == []
    assert h.guard.cancelled == 1
    assert h.upstream.requests == 0
    assert (h.records()[0]["outcome"], h.records()[0]["error"]) == ("aborted", "client_disconnected")


def test_a_client_that_leaves_before_its_body_is_whole_is_recorded_and_answered_nothing(
    host: Callable[..., Host],
) -> None:
    h = host()

    async def run() -> list[Any]:
        gone = asyncio.Event()
        gone.set()
        request, sent = asgi(h, b"", gone=gone, chunks=0)
        await request  # returns: to the host it is a request that is over, no cancellation
        await h.runtime.aclose()
        return sent

    assert asyncio.run(run()) == []
    assert [(record["outcome"], record["error"]) for record in h.records()] == [("aborted", "client_disconnected")]
    assert not h.guard.asked


def test_a_body_that_never_ends_is_a_408(host: Callable[..., Host]) -> None:
    h = host(yaml="limits: {body_seconds: 100ms}")

    async def run() -> list[Any]:
        request, sent = asgi(h, b"", chunks=0)
        await asyncio.wait_for(request, 2)
        await h.runtime.aclose()
        return sent

    assert asyncio.run(run())[0]["status"] == 408


@pytest.mark.parametrize("scope", [asyncio.timeout, anyio.move_on_after], ids=["asyncio", "anyio"])
def test_a_host_that_cancels_a_request_finds_it_in_the_log(host: Callable[..., Host], scope: Any) -> None:
    h = host()

    async def run() -> None:
        request, _ = asgi(h, json.dumps(chat("[wait 5] hello")["json"]).encode())
        with contextlib.suppress(TimeoutError):
            async with contextlib.AsyncExitStack() as stack:  # anyio cancels again on every turn of the loop
                limit = scope(0.2)
                stack.enter_context(limit) if scope is anyio.move_on_after else await stack.enter_async_context(limit)
                await request
        await h.runtime.aclose()

    asyncio.run(run())
    assert [(record["outcome"], record["error"]) for record in h.records()] == [("aborted", "cancelled")]


async def cancelled_by_somebody() -> None:
    """Awaits what is cancelled under its hands."""
    other = asyncio.create_task(asyncio.sleep(5))
    asyncio.get_running_loop().call_soon(other.cancel)
    await other


def test_an_application_whose_own_work_is_cancelled_is_a_502(tmp_path: Path) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        await cancelled_by_somebody()

    h = Host(tmp_path)
    h.app.app = broken
    (response,) = h.send(chat())
    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_reset")


class CancelledGuard:
    async def moderate(self, request: Any) -> Any:
        await cancelled_by_somebody()


def test_a_guard_whose_own_work_is_cancelled_is_a_503(host: Callable[..., Host]) -> None:
    h = host(CancelledGuard())
    (response,) = h.send(chat())
    assert response.status_code == 503
    assert (h.upstream.requests, len(h.records())) == (0, 1)


def test_a_cancellation_out_of_nowhere_is_a_500_with_a_record(
    host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    h = host()
    monkeypatch.setattr(h.runtime, "guard", lambda rules: CancelledGuard())
    (response,) = h.send(chat())
    assert response.status_code == 500
    assert (h.upstream.requests, len(h.records())) == (0, 1)


@pytest.mark.parametrize("where", ["before", "midway", "never_ends", "raises_late"])
def test_an_application_that_breaks_is_a_502_and_leaks_nothing(tmp_path: Path, where: str) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        if where == "before":
            raise ValueError("secret detail")
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b'{"choices": [{"secret', "more_body": True})
        if where == "raises_late":
            raise ValueError("secret detail")
        if where == "never_ends":
            await send({"type": "http.response.body", "body": b"detail", "more_body": True})

    h = Host(tmp_path)
    h.app.app = broken
    (response,) = h.send(chat())
    assert response.status_code == 502
    assert response.json()["error"]["code"] == "upstream_reset"
    assert "secret" not in response.text


def test_a_defect_of_ours_is_a_500_with_a_record(host: Callable[..., Host], caplog: pytest.LogCaptureFixture) -> None:
    class Defective:
        async def moderate(self, request: Any) -> Any:
            raise ZeroDivisionError

    h = host(Defective())
    (response,) = h.send(chat())
    assert response.status_code == 500
    assert h.upstream.requests == 0
    assert h.records()[0]["error"] == "internal_ZeroDivisionError"
    assert "failed inside the guard" in caplog.text


def test_a_websocket_is_refused(host: Callable[..., Host]) -> None:
    h = host()
    sent: list[Any] = []

    async def run() -> None:
        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await h.app({"type": "websocket", "path": CHAT}, receive, send)
        await h.runtime.aclose()

    asyncio.run(run())
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_one_line_guards_a_starlette_application(tmp_path: Path) -> None:
    h = Host(tmp_path)
    started: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        started.append("host")
        yield

    app = Starlette(routes=h.upstream.app.routes, lifespan=lifespan)
    app.add_middleware(GuardMiddleware, runtime=h.runtime)

    async def run() -> list[int]:
        messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
        sent: list[Any] = []

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            sent.append(message["type"])
            if message["type"] == "lifespan.startup.complete":
                transport = httpx.ASGITransport(app)
                async with httpx.AsyncClient(transport=transport, base_url="http://gateway:8080") as client:
                    texts = ("how do I bake bread?", "how do I pick a lock?")
                    statuses.extend([(await client.request(**chat(text))).status_code for text in texts])

        statuses: list[int] = []
        await app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
        assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        return statuses

    assert asyncio.run(run()) == [200, 400]
    assert started == ["host"]


def test_a_worker_that_cannot_start_fails_the_hosts_start(tmp_path: Path) -> None:
    settings = config.parse(f"worker: {{model: {tmp_path}}}")
    app = Starlette()
    app.add_middleware(GuardMiddleware, config=settings)
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send))
    (failed,) = sent
    assert failed["type"] == "lifespan.startup.failed"
    assert "exited before it was ready" in failed["message"]


def test_200_concurrent_requests_do_not_mix(host: Callable[..., Host]) -> None:
    h = host()

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(h.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway:8080") as client:
            texts = ["how do I pick a lock?" if n % 3 == 0 else f"marker {n}" for n in range(200)]
            responses = await asyncio.gather(*(client.request(**chat(text)) for text in texts))
        await h.runtime.aclose()
        return list(responses)

    responses = asyncio.run(run())
    assert [r.status_code for r in responses] == [400 if n % 3 == 0 else 200 for n in range(200)]
    assert len({record["id"] for record in h.records()}) == 200


# -- where a host has mounted it, and what else the host does --


@pytest.mark.parametrize(
    ("root", "path", "status"),
    [
        ("", CHAT, 200),
        ("/llm", f"/llm{CHAT}", 200),
        ("/llm", CHAT, 200),  # servers whose path comes without its root
        ("/llm", f"/LLM{CHAT}", 404),
        ("/llm", f"/%6Clm{CHAT}", 404),
        ("/llm", f"/llm/llm{CHAT}", 404),
        ("/llm", f"/llmx{CHAT}", 404),
        ("/llm/", f"/llm{CHAT}", 404),
    ],
)
def test_paths_are_those_below_the_root_path(host: Callable[..., Host], root: str, path: str, status: int) -> None:
    h = host(yaml="policies: {lax: {input: {on_harmful: annotate}}}\nroutes: [{path: /v1/chat/*, policy: lax}]")
    inner = h.app

    async def mounted(scope: Any, receive: Any, send: Any) -> None:
        await inner({**scope, "root_path": root}, receive, send)

    h.app = mounted  # type: ignore[assignment]
    (response,) = h.send({**chat("how do I pick a lock?"), "url": path})
    if status == 404:
        assert (response.status_code, h.bodies) == (404, [])
    else:
        assert h.guard.asked
        assert len(h.bodies) == 1, "the route's policy lets it through"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/health", 200), ("HEAD", "/health", 200), ("POST", "/health", 404), ("GET", "/health/", 404),
     ("GET", "/v1/health", 404), ("GET", "//health", 404), ("GET", "/%68ealth", 404), ("GET", "/v1/models", 200)],
)  # fmt: skip
def test_only_what_is_named_passes_unguarded(host: Callable[..., Host], method: str, path: str, status: int) -> None:
    h = host()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("{}", media_type="application/json")(scope, receive, send)

    h.app = GuardMiddleware(app, runtime=h.runtime, unguarded=["/health"])
    assert h.send({"method": method, "url": path})[0].status_code == status


@pytest.mark.parametrize("unguarded", [["health"], "/health", [""]])
def test_an_unguarded_path_that_is_none_is_an_error(host: Callable[..., Host], unguarded: Any) -> None:
    with pytest.raises(ConfigError, match="unguarded"):
        GuardMiddleware(host().upstream.app, config=config.Config(), unguarded=unguarded)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_does_not_wait_for_what_the_application_does_after_it(
    host: Callable[..., Host], stream: bool
) -> None:
    h, done = host(), asyncio.Event()
    order: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await h.upstream.app(scope, receive, send)
        await asyncio.sleep(0.2)  # as Starlette's background tasks
        await send({"type": "http.response.body", "body": b"more", "more_body": False})  # nobody hears it
        order.append("background")
        done.set()

    h.app = GuardMiddleware(app, runtime=h.runtime)

    async def client() -> None:
        sent: list[Any] = []
        body = json.dumps(chat(stream=stream)["json"]).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                order.append("answer")

        scope = {
            "type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
        }  # fmt: skip
        await h.app(scope, receive, send)
        assert done.is_set(), "the server is told when the application is through"
        assert b"more" not in b"".join(message.get("body", b"") for message in sent)
        await h.runtime.aclose()

    asyncio.run(client())
    assert order == ["answer", "background"]
    (record,) = h.records()
    assert record["outcome"] == "allowed"
