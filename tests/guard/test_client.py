from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from websockets.asyncio.server import serve, unix_serve

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.guard.client import GuardClient
from guard_middleware.types import Blob, Conversation, Judging, Message, Text, Uri, Usage, Verdict
from guard_middleware.wire import ModerationRequest, decode_request, encode_answer

ROOT = Path(__file__).resolve().parents[2]
SCRIPTED = ROOT / "tests" / "support" / "scripted_worker.py"
VERDICT = Verdict("unharmful", None, 0.0, None, "fine", Usage(), "stub", "r1")
BREAD = "how do I bake bread"


def question(text=BREAD, deadline=5.0, answer=None, id="q", parts=()):
    answer = None if answer is None else Message("assistant", (Text(answer),))
    return ModerationRequest(id, Conversation((Message("user", (Text(text), *parts)),), (), answer), "input", deadline)


@contextlib.asynccontextmanager
async def scripted(path):
    """The scripted worker as a process; yields it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(SCRIPTED), "--socket", str(path), env=env, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert (await process.stdout.readline()).startswith(b"worker ready")
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def stub(path, handler):
    """A WebSocket server whose ``handler(socket, message)`` answers each message; yields the list of messages."""
    messages = []

    async def connection(socket):
        async for message in socket:
            messages.append(message)
            await handler(socket, message)

    async with unix_serve(connection, str(path), compression=None, max_size=None):
        yield messages


@contextlib.asynccontextmanager
async def client_of(path, **options):
    client = GuardClient(path, **options)
    try:
        yield client
    finally:
        await client.aclose()


@contextlib.asynccontextmanager
async def speechless(path):
    """A server that accepts a connection and says nothing until it is closed; yields the event of the first one."""
    accepted, ended = asyncio.Event(), asyncio.Event()

    async def hold(reader, writer):
        accepted.set()
        await reader.read()
        writer.close()
        await writer.wait_closed()
        ended.set()

    async with await asyncio.start_unix_server(hold, path):
        yield accepted
        await ended.wait()


def run(coroutine):
    asyncio.run(asyncio.wait_for(coroutine, 30))


async def silence(socket, message):
    pass


def test_verdicts_come_back_for_texts_answers_and_images(tmp_path):
    async def main():
        path = tmp_path / "w.sock"
        async with scripted(path), client_of(path) as client:
            assert await client.ready()
            assert (await client.moderate(question("How do I pick a lock?"))).request == "harmful"
            verdict = await client.moderate(question(answer="First, pick a lock."))
            assert (verdict.request, verdict.response) == ("unharmful", "harmful")
            image = Blob("image/png", bytes(range(256)) * 4000)
            assert (await client.moderate(question(parts=(image,)))).request == "unharmful"

    run(main())


def test_questions_share_one_connection_and_are_answered_out_of_order(tmp_path):
    async def main():
        path = tmp_path / "w.sock"
        async with scripted(path), client_of(path) as client:
            started = time.perf_counter()
            slow = [asyncio.create_task(client.moderate(question("[wait 0.5] hi"))) for _ in range(20)]
            fast = await asyncio.gather(*(client.moderate(question("how do I pick a lock")) for _ in range(20)))
            assert time.perf_counter() - started < 0.4
            assert {verdict.request for verdict in fast} == {"harmful"}
            assert {verdict.request for verdict in await asyncio.gather(*slow)} == {"unharmful"}
            assert time.perf_counter() - started < 1.5

    run(main())


def test_without_a_worker_a_question_fails_at_once_and_costs_microseconds_until_the_back_off_is_over(tmp_path):
    async def main():
        path = tmp_path / "none.sock"
        async with client_of(path) as client:
            assert not await client.ready()
            for _ in range(4):  # the back-off doubles
                error = await client.moderate(question())
                assert error.kind is GuardErrorKind.UNAVAILABLE
                assert error.retry_after is not None
                await asyncio.sleep(0.2)
            await client.moderate(question())
            started = time.perf_counter()
            for _ in range(100):
                assert (await client.moderate(question())).kind is GuardErrorKind.UNAVAILABLE
            assert time.perf_counter() - started < 0.1

    run(main())


def test_it_connects_again_when_the_worker_is_back(tmp_path):
    async def main():
        path = tmp_path / "w.sock"
        async with client_of(path) as client:
            assert (await client.moderate(question())).kind is GuardErrorKind.UNAVAILABLE
            for _ in range(2):
                async with scripted(path) as process:
                    await asyncio.sleep(0.1)
                    assert isinstance(await client.moderate(question()), Verdict)
                    process.kill()
                    await process.wait()
                    assert (await client.moderate(question())).kind is GuardErrorKind.UNAVAILABLE

    run(main())


def test_a_worker_killed_in_mid_request_is_unavailable_at_once_for_all_in_flight(tmp_path):
    async def main():
        path = tmp_path / "w.sock"
        async with scripted(path) as process, client_of(path) as client:
            waiting = [asyncio.create_task(client.moderate(question("[wait 20] hi", 25.0))) for _ in range(5)]
            await asyncio.sleep(0.3)
            started = time.perf_counter()
            process.send_signal(signal.SIGKILL)
            outcomes = await asyncio.gather(*waiting)
            assert time.perf_counter() - started < 0.5
            assert {outcome.kind for outcome in outcomes} == {GuardErrorKind.UNAVAILABLE}

    run(main())


def test_a_worker_that_hangs_is_a_timeout_at_the_deadline_also_for_a_large_frame(tmp_path):
    async def main():
        path = tmp_path / "w.sock"
        async with scripted(path) as process, client_of(path) as client:
            assert isinstance(await client.moderate(question()), Verdict)
            process.send_signal(signal.SIGSTOP)
            started = time.perf_counter()
            large = question(deadline=0.3, parts=(Blob("image/png", b"x" * 4_000_000),))
            outcomes = await asyncio.gather(client.moderate(question(deadline=0.3)), client.moderate(large))
            assert {outcome.kind for outcome in outcomes} == {GuardErrorKind.TIMEOUT}
            assert 0.28 < time.perf_counter() - started < 0.6
            process.send_signal(signal.SIGCONT)
            assert isinstance(await client.moderate(question()), Verdict)

    run(main())


def test_a_listener_that_never_shakes_hands_is_a_timeout_at_the_deadline(tmp_path):
    async def main():
        path = tmp_path / "w.sock"
        writers = []
        server = await asyncio.start_unix_server(lambda reader, writer: writers.append(writer), path)
        async with client_of(path) as client:
            started = time.perf_counter()
            assert (await client.moderate(question(deadline=0.2))).kind is GuardErrorKind.TIMEOUT
            assert time.perf_counter() - started < 0.5
        for writer in writers:
            writer.close()
        server.close()

    run(main())


def test_the_worker_is_told_the_time_that_is_left_not_the_time_there_was(tmp_path):
    async def main():
        path = tmp_path / "w.sock"

        async def answer(socket, message):
            await socket.send(encode_answer(decode_request(message).id, VERDICT))

        async with stub(path, answer) as messages, client_of(path) as client:
            await client.moderate(question(deadline=2.0))
            assert 1.0 < decode_request(messages[0]).deadline < 2.0

    run(main())


@pytest.mark.parametrize("deadline", [0.0, -1.0, float("nan"), float("inf")])
def test_no_time_left_is_a_timeout_without_a_question(tmp_path, deadline):
    async def main():
        async with stub(tmp_path / "w.sock", silence) as messages, client_of(tmp_path / "w.sock") as client:
            assert (await client.moderate(question(deadline=deadline))).kind is GuardErrorKind.TIMEOUT
            assert messages == []

    run(main())


def test_equal_ids_of_two_callers_do_not_meet(tmp_path):
    async def main():
        path = tmp_path / "w.sock"
        async with scripted(path), client_of(path) as client:
            one = asyncio.create_task(client.moderate(question("[wait 0.2] hi", id="same")))
            two = asyncio.create_task(client.moderate(question("[wait 0.1] how do I pick a lock", id="same")))
            assert [(await one).request, (await two).request] == ["unharmful", "harmful"]

    run(main())


def test_a_cancelled_caller_and_a_missed_deadline_cancel_the_question_in_the_worker(tmp_path):
    async def main():
        path = tmp_path / "w.sock"
        async with stub(path, silence) as messages, client_of(path) as client:
            task = asyncio.create_task(client.moderate(question()))
            while not messages:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await client.moderate(question(deadline=0.1))).kind is GuardErrorKind.TIMEOUT
            await asyncio.sleep(0.1)
            first, cancel_first, second, cancel_second = messages
            assert json.loads(cancel_first) == {"cancel": decode_request(first).id}
            assert json.loads(cancel_second) == {"cancel": decode_request(second).id}

    run(main())


def test_an_answer_to_an_unknown_question_is_counted_and_passed_over(tmp_path):
    async def main():
        async def answer(socket, message):
            await socket.send(encode_answer("nobody", VERDICT))
            await socket.send(encode_answer(decode_request(message).id, VERDICT))
            await socket.send(encode_answer(decode_request(message).id, VERDICT))

        path = tmp_path / "w.sock"
        async with stub(path, answer), client_of(path) as client:
            assert await client.moderate(question()) == VERDICT
            assert await client.moderate(question()) == VERDICT
            await asyncio.sleep(0.05)
            assert client.unknown_answers == 4

    run(main())


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xfe",
        b"{}",
        b"[" * 50_000,
        '{"id": "text"}',
        b'{"id":"q#1","verdict":{"request":"maybe"}}',
        b'{"id":"q#1","error":{"kind":"timeout","message":"m","retry_after":"soon"}}',
        b'{"id":"q#1","error":{"kind":"timeout","message":"m","retry_after":Infinity}}',
        b'{"id":"q#1","error":{"kind":"timeout","message":"m","retry_after":-1}}',
        b'{"id":"q#1","error":{"kind":"new","message":"m","retry_after":null}}',
        encode_answer("q#1", replace(VERDICT, request_score=1.5)),
        encode_answer("q#1", replace(VERDICT, usage=Usage(float("inf")))),
        b"x" * (9 * 1024 * 1024),
    ],
)
def test_garbage_drops_the_connection_and_never_becomes_a_verdict(tmp_path, garbage):
    async def main():
        answers = [garbage]

        async def answer(socket, message):
            await socket.send(answers.pop() if answers else encode_answer(decode_request(message).id, VERDICT))

        path = tmp_path / "w.sock"
        async with stub(path, answer), client_of(path) as client:
            started = time.perf_counter()
            outcome = await client.moderate(question())
            assert isinstance(outcome, GuardError)
            assert outcome.kind is GuardErrorKind.UNAVAILABLE
            assert time.perf_counter() - started < 1.0
            assert await client.moderate(question()) == VERDICT  # on a new connection

    run(main())


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (None, replace(VERDICT, response="unharmful", response_score=0.0)),
        ("Mix the flour.", VERDICT),
        (None, replace(VERDICT, judging=Judging("label"), thought=False)),
    ],
    ids=["an answer's label without an answer", "no label for an answer", "another mode"],
)
def test_a_verdict_on_something_else_than_was_asked_is_refused(tmp_path, answer, verdict):
    async def main():
        async def reply(socket, message):
            await socket.send(encode_answer(decode_request(message).id, verdict))

        path = tmp_path / "w.sock"
        async with stub(path, reply), client_of(path) as client:
            outcome = await client.moderate(question(answer=answer))
            assert isinstance(outcome, GuardError)
            assert outcome.kind is GuardErrorKind.INTERNAL

    run(main())


def test_the_workers_own_errors_arrive_as_they_are(tmp_path):
    async def main():
        async def answer(socket, message):
            error = GuardError("overloaded", "full", retry_after=1.5)
            await socket.send(encode_answer(decode_request(message).id, error))

        path = tmp_path / "w.sock"
        async with stub(path, answer), client_of(path) as client:
            error = await client.moderate(question())
            assert (error.kind, error.message, error.retry_after) == ("overloaded", "full", 1.5)

    run(main())


@pytest.mark.parametrize(
    ("request_", "kind"),
    [(question("x" * 3000), "too_long"), (question(parts=(Uri("https://example.com/a.png"),)), "internal")],
)
def test_a_question_that_cannot_be_sent_fails_alone(tmp_path, request_, kind):
    async def main():
        path = tmp_path / "w.sock"
        async with scripted(path), client_of(path, max_frame=2000) as client:
            assert (await client.moderate(request_)).kind == kind
            assert isinstance(await client.moderate(question()), Verdict)

    run(main())


def test_it_speaks_tcp_too():
    async def main():
        async def connection(socket):
            async for message in socket:
                await socket.send(encode_answer(decode_request(message).id, VERDICT))

        async with serve(connection, "127.0.0.1", 0, compression=None) as server:
            port = server.sockets[0].getsockname()[1]
            async with client_of(f"http://127.0.0.1:{port}") as client:
                assert await client.moderate(question()) == VERDICT

    run(main())


def test_a_client_closed_while_it_connects_answers_unavailable(tmp_path):
    async def main():
        async with speechless(tmp_path / "w.sock") as accepted:
            client = GuardClient(tmp_path / "w.sock")
            waiting = [asyncio.create_task(client.moderate(question())) for _ in range(2)]
            await accepted.wait()
            await client.aclose()
            assert [(await one).kind for one in waiting] == [GuardErrorKind.UNAVAILABLE] * 2

    run(main())


def test_a_caller_that_goes_away_while_it_connects_is_cancelled(tmp_path):
    async def main():
        async with speechless(tmp_path / "w.sock") as accepted, client_of(tmp_path / "w.sock") as client:
            waiting = asyncio.create_task(client.moderate(question()))
            await accepted.wait()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    run(main())


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 302 Found\r\nlocation: https://[x/\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nlocation: ws://other:99999/\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 200000\r\n\r\n" + b"[" * 200_000,
    ],
    ids=["no URL", "no port", "deep JSON"],
)
def test_what_is_no_worker_is_unavailable_whatever_it_answers(answer):
    async def serve_answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        with contextlib.suppress(OSError):
            await writer.drain()
        writer.close()

    async def main():
        server = await asyncio.start_server(serve_answer, "127.0.0.1", 0)
        async with server, client_of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
            assert (await client.moderate(question())).kind is GuardErrorKind.UNAVAILABLE
            assert await client.identity() is None

    run(main())


def test_a_closed_client_answers_unavailable(tmp_path):
    async def main():
        path = tmp_path / "w.sock"
        async with scripted(path):
            client = GuardClient(path)
            waiting = asyncio.create_task(client.moderate(question("[wait 5] hi")))
            await asyncio.sleep(0.2)
            await client.aclose()
            assert (await waiting).kind is GuardErrorKind.UNAVAILABLE
            assert (await client.moderate(question())).kind is GuardErrorKind.UNAVAILABLE

    run(main())
