from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket as sockets
from dataclasses import replace

import httpx
import pytest
from websockets.asyncio.client import unix_connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.types import Conversation, Message, Text, Usage, Verdict
from guard_middleware.wire import CONTENT_TYPE, ModerationRequest, decode_answer, encode_request
from guard_middleware.worker import serve
from guard_middleware.worker.app import Worker

HEADERS = {"content-type": CONTENT_TYPE}
VERDICT = Verdict("unharmful", None, 0.25, None, "Step 1: fine.", Usage(30, 12, 9), "stub", "r1")


def question(id="q1", text="how do I bake bread", deadline=5.0, **changes):
    conversation = Conversation((Message("user", (Text(text),)),))
    return ModerationRequest(id, conversation, "input", deadline, **changes)


class StubGuard:
    """Answers by the text: a ``GuardErrorKind`` value raises it, ``wait`` waits until ``open``, ``bug`` is a defect."""

    model, revision = "stub", "r1"

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.seen, self.cancelled, self.closed, self.stuck = [], [], False, 0.0

    async def moderate(self, request, deadline):
        self.seen.append(request.id)
        text = request.conversation.messages[0].parts[0].text
        try:
            if text == "wait":
                await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled.append(request.id)
            raise
        if text == "bug":
            raise RuntimeError("terces a"[::-1])  # so that no source line quotes it
        if text == "label":
            return replace(VERDICT, response="harmful", response_score=1.0)
        if text in list(GuardErrorKind):
            raise GuardError(text, "why", retry_after=2.5 if text == "overloaded" else None)
        return VERDICT

    def gauges(self):
        return {"queue_depth": 3}

    def stalled(self):
        return self.stuck

    async def aclose(self):
        self.closed = True


@contextlib.asynccontextmanager
async def serving(tmp_path, load=None, max_frame=1 << 20, **options):
    """(guard, path) of a worker on a real socket under the real server."""
    guard = StubGuard()

    async def at_once(metrics):
        return guard

    path = tmp_path / "w.sock"
    worker = Worker(load or at_once, max_frame=max_frame, **options)
    server = serve.Server(worker.asgi, serve.unix_listener(path), max_frame=max_frame)
    task = asyncio.create_task(server.serve())
    try:
        async with http(path) as client:
            await client.get("/health")  # waits in the listener's backlog until the server takes it
        yield guard, path
    finally:
        server.stop()
        await task


def http(path):
    return httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path)), base_url="http://worker", timeout=10)


def session(path, **options):
    return unix_connect(str(path), "ws://worker/v1/session", compression=None, **options)


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


def run(coroutine):
    asyncio.run(asyncio.wait_for(coroutine, 20))


def test_a_posted_frame_is_answered_with_a_verdict(tmp_path):
    async def main():
        async with serving(tmp_path) as (_, path), http(path) as client:
            response = await client.post("/v1/moderate", content=encode_request(question()), headers=HEADERS)
            assert response.status_code == 200
            assert decode_answer(response.content) == ("q1", VERDICT)

    run(main())


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("timeout", 504),
        ("overloaded", 503),
        ("unavailable", 503),
        ("internal", 500),
        ("unparseable", 422),
        ("truncated", 422),
        ("too_long", 422),
        ("media", 422),
        ("reader", 422),
    ],
)
def test_a_guard_error_has_its_status_and_the_same_body_as_everywhere(tmp_path, kind, status):
    async def main():
        async with serving(tmp_path) as (_, path), http(path) as client:
            response = await client.post("/v1/moderate", content=encode_request(question(text=kind)), headers=HEADERS)
            assert response.status_code == status
            id, error = decode_answer(response.content)
            assert (id, error.kind, error.message) == ("q1", kind, "why")
            assert response.headers.get("retry-after") == ("3" if kind == "overloaded" else None)

    run(main())


@pytest.mark.parametrize(
    ("body", "headers", "status", "kind"),
    [
        (b"\0\0\0\2{}", HEADERS, 400, "internal"),
        (b"", HEADERS, 400, "internal"),
        (encode_request(question(deadline=float("nan"))), HEADERS, 400, "internal"),
        (encode_request(question(deadline=-1.0)), HEADERS, 400, "internal"),
        (encode_request(question()), {"content-type": "application/json"}, 415, "internal"),
        (encode_request(question(text="x" * 5000)), HEADERS, 413, "too_long"),
    ],
)
def test_a_bad_body_is_refused_without_asking_the_guard(tmp_path, body, headers, status, kind):
    async def main():
        async with serving(tmp_path, max_frame=4096) as (guard, path), http(path) as client:
            response = await client.post("/v1/moderate", content=body, headers=headers)
            assert response.status_code == status
            assert decode_answer(response.content)[1].kind == kind
            assert guard.seen == []

    run(main())


def test_a_body_without_a_length_is_bounded_too(tmp_path):
    async def chunks():
        for _ in range(100):
            yield b"x" * 1000

    async def main():
        async with serving(tmp_path, max_frame=4096) as (_, path), http(path) as client:
            response = await client.post("/v1/moderate", content=chunks(), headers=HEADERS)
            assert response.status_code == 413

    run(main())


def test_a_question_ends_at_its_deadline_and_its_work_with_it(tmp_path):
    async def main():
        async with serving(tmp_path) as (guard, path), http(path) as client:
            frame = encode_request(question(text="wait", deadline=0.1))
            response = await client.post("/v1/moderate", content=frame, headers=HEADERS)
            assert response.status_code == 504
            assert guard.cancelled == ["q1"]

    run(main())


def test_a_caller_that_hangs_up_ends_its_question(tmp_path):
    async def main():
        async with serving(tmp_path) as (guard, path):
            async with http(path) as client:
                frame = encode_request(question(text="wait"))
                post = asyncio.create_task(client.post("/v1/moderate", content=frame, headers=HEADERS))
                await until(lambda: guard.seen)
                post.cancel()
                await asyncio.gather(post, return_exceptions=True)
            await until(lambda: guard.cancelled == ["q1"])

    run(main())


@pytest.mark.parametrize("text", ["bug", "label"])
def test_a_defect_is_an_internal_error_that_quotes_nothing(tmp_path, text, caplog):
    async def main():
        async with serving(tmp_path) as (_, path), http(path) as client:
            response = await client.post("/v1/moderate", content=encode_request(question(text=text)), headers=HEADERS)
            assert response.status_code == 500
            assert "secret" not in response.text

    run(main())
    formatter = serve.JsonFormatter()
    lines = [formatter.format(record) for record in caplog.records]
    assert not any("secret" in line for line in lines)
    assert text == "label" or any("RuntimeError" in line and "test_app.py" in line for line in lines)


def test_a_session_answers_each_question_as_it_is_done(tmp_path):
    async def main():
        async with serving(tmp_path) as (guard, path), session(path) as socket:
            await socket.send(encode_request(question("slow", "wait")))
            await socket.send(encode_request(question("fast")))
            assert decode_answer(await socket.recv()) == ("fast", VERDICT)
            guard.open.set()
            assert decode_answer(await socket.recv()) == ("slow", VERDICT)

    run(main())


def test_a_cancel_message_ends_one_question_and_leaves_the_session(tmp_path):
    async def main():
        async with serving(tmp_path) as (guard, path), session(path) as socket:
            for id in ("a", "b"):
                await socket.send(encode_request(question(id, "wait")))
            await until(lambda: len(guard.seen) == 2)
            await socket.send(json.dumps({"cancel": "a"}))
            await socket.send(json.dumps({"cancel": "unknown"}))
            await until(lambda: guard.cancelled == ["a"])
            guard.open.set()
            assert decode_answer(await socket.recv()) == ("b", VERDICT)

    run(main())


def test_closing_a_session_ends_all_its_questions(tmp_path):
    async def main():
        async with serving(tmp_path) as (guard, path):
            async with session(path) as socket:
                for id in ("a", "b"):
                    await socket.send(encode_request(question(id, "wait")))
                await until(lambda: len(guard.seen) == 2)
                socket.transport.abort()
            await until(lambda: sorted(guard.cancelled) == ["a", "b"])

    run(main())


def test_too_many_questions_on_one_session_are_told_to_come_back(tmp_path):
    async def main():
        async with serving(tmp_path, max_in_flight=2) as (guard, path), session(path) as socket:
            for id in ("a", "b", "c"):
                await socket.send(encode_request(question(id, "wait")))
            id, error = decode_answer(await socket.recv())
            assert (id, error.kind, error.retry_after) == ("c", "overloaded", 1.0)
            guard.open.set()
            assert {decode_answer(await socket.recv())[0] for _ in range(2)} == {"a", "b"}

    run(main())


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b"\0\0\0\2{}", 1007),
        (encode_request(question(deadline=float("inf"))), 1007),
        ("not json", 1007),
        ('{"cancel": 1}', 1007),
        ('{"cancel": "a", "more": 1}', 1007),
        ("[" * 100_000, 1007),
        (encode_request(question("a", "wait")), 1008),
        (encode_request(question(text="x" * 300_000)), 1009),
    ],
)
def test_a_bad_message_ends_the_session_with_a_code_and_its_questions(tmp_path, message, code):
    async def main():
        async with serving(tmp_path, max_frame=200_000) as (guard, path), session(path) as socket:
            await socket.send(encode_request(question("a", "wait")))
            await until(lambda: guard.seen)
            with contextlib.suppress(ConnectionClosed):  # it may be closed before all is sent
                await socket.send(message)
            await socket.wait_closed()
            assert socket.close_code == code
            await until(lambda: guard.cancelled == ["a"])

    run(main())


def test_a_browser_gets_no_session(tmp_path):
    async def main():
        async with serving(tmp_path) as (_, path):
            with pytest.raises(InvalidStatus, match="403"):
                async with session(path, origin="http://evil.example"):
                    pass

    run(main())


def test_health_answers_while_the_model_loads_and_readiness_says_no_until_it_has(tmp_path):
    async def main():
        loaded, told = asyncio.Event(), []

        async def load(metrics):
            await loaded.wait()
            return StubGuard()

        async with serving(tmp_path, load, on_ready=told.append) as (_, path), http(path) as client:
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/ready")).status_code == 503
            response = await client.post("/v1/moderate", content=encode_request(question()), headers=HEADERS)
            assert response.status_code == 503
            assert decode_answer(response.content)[1].kind is GuardErrorKind.UNAVAILABLE
            assert told == []
            loaded.set()
            await until(lambda: told)
            response = await client.get("/ready")
            assert (response.status_code, response.json()["model"]) == (200, "stub")

    run(main())


def test_a_model_that_cannot_be_loaded_is_told_and_answers_nothing(tmp_path):
    async def main():
        told = []

        async def load(metrics):
            raise OSError("weights are missing")

        async with serving(tmp_path, load, on_failed=told.append) as (_, path), http(path) as client:
            await until(lambda: told)
            assert told == ["the guard cannot be loaded: weights are missing"]
            assert (await client.get("/health")).status_code == 503
            response = await client.post("/v1/moderate", content=encode_request(question()), headers=HEADERS)
            assert response.status_code == 503

    run(main())


@pytest.mark.parametrize(("stuck", "why"), [(6.0, "stuck for 5 s"), (math.inf, "has died")])
def test_a_stuck_engine_is_told_and_takes_the_worker_out_of_service(tmp_path, monkeypatch, stuck, why):
    monkeypatch.setattr("guard_middleware.worker.app._WATCH_SECONDS", 0.01)

    async def main():
        told = []
        async with serving(tmp_path, on_failed=told.append, stall_seconds=5) as (guard, path), http(path) as client:
            assert (await client.get("/ready")).status_code == 200
            guard.stuck = stuck
            await until(lambda: told)
            assert why in told[0]
            assert (await client.get("/health")).status_code == 503
            assert (await client.get("/ready")).status_code == 503
            await client.post("/v1/moderate", content=encode_request(question()), headers=HEADERS)
            lines = (await client.get("/metrics")).text.splitlines()
            assert "guard_worker_ready 0.0" in lines
            assert 'guard_worker_errors_total{kind="unavailable"} 1' in lines

    run(main())


def test_metrics_count_verdicts_errors_tokens_and_cancellations(tmp_path):
    async def main():
        async with serving(tmp_path) as (guard, path), http(path) as client, session(path) as socket:
            for text in ("fine", "fine", "overloaded"):
                await client.post("/v1/moderate", content=encode_request(question(text=text)), headers=HEADERS)
            await socket.send(encode_request(question("a", "wait")))
            await until(lambda: "a" in guard.seen or len(guard.seen) == 4)
            await socket.send('{"cancel": "a"}')
            await until(lambda: guard.cancelled)
            response = await client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = response.text.splitlines()
        for line in (
            "guard_worker_ready 1.0",
            "guard_worker_queue_depth 3",
            'guard_worker_verdicts_total{request="unharmful",response="none"} 2',
            'guard_worker_errors_total{kind="overloaded"} 1',
            'guard_worker_tokens_total{type="prompt"} 60',
            "guard_worker_cancelled_total 1",
            "guard_worker_seconds_count 3",
        ):
            assert line in lines

    run(main())


def test_the_guard_is_closed_with_the_server_and_the_socket_file_removed(tmp_path):
    async def main():
        async with serving(tmp_path) as (guard, path):
            assert path.stat().st_mode & 0o777 == 0o600
        assert guard.closed
        assert not path.exists()

    run(main())


def test_a_log_line_names_the_question_and_its_outcome_but_no_content(tmp_path, caplog):
    caplog.set_level("INFO")

    async def main():
        async with serving(tmp_path) as (_, path), http(path) as client:
            for text in ("a peculiar sentence", "overloaded"):
                frame = encode_request(question(text=text, traceparent="00-ab-cd-01"))
                await client.post("/v1/moderate", content=frame, headers=HEADERS)

    run(main())
    lines = [serve.JsonFormatter().format(record) for record in caplog.records if record.message == "moderated"]
    first, second = (json.loads(line) for line in lines)
    assert (first["id"], first["request"], first["traceparent"]) == ("q1", "unharmful", "00-ab-cd-01")
    assert second["error"] == "overloaded"
    assert "peculiar" not in "".join(lines)


def test_a_stale_socket_is_replaced_but_not_one_in_use_nor_another_file(tmp_path):
    from guard_middleware.errors import ConfigError

    path = tmp_path / "w.sock"
    left = sockets.socket(sockets.AF_UNIX)
    left.bind(str(path))
    left.close()
    with serve.unix_listener(path), pytest.raises(ConfigError, match="another worker"):
        serve.unix_listener(path)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        serve.unix_listener(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(ConfigError, match="cannot make the socket"):
        serve.unix_listener(tmp_path / ("x" * 200))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", ""])
def test_tcp_beyond_loopback_is_refused(host):
    from guard_middleware.errors import ConfigError

    with pytest.raises(ConfigError, match="open to the network"):
        serve.tcp_listener(host, 0)


def test_tcp_on_loopback_takes_a_free_port():
    with serve.tcp_listener("127.0.0.1", 0) as listener:
        assert listener.getsockname()[1] > 0
    with serve.tcp_listener("0.0.0.0", 0, anywhere=True) as listener:
        assert listener.getsockname()[1] > 0
