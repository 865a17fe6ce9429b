"""A guard client whose questions go through a load balancer, as requests of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.guard.balanced import BalancedGuardClient
from guard_middleware.guard.client import MAX_ANSWER
from guard_middleware.types import Blob, Conversation, Message, Text, Usage, Verdict
from guard_middleware.wire import ModerationRequest, decode_request, encode_answer

VERDICT = Verdict("unharmful", None, 0.0, None, "fine", Usage(), "stub", "r1")
Answer = Callable[[ModerationRequest], Awaitable[bytes | None]]


def question(text: str = "how do I bake bread", deadline: float = 5.0, **more: Any) -> ModerationRequest:
    return ModerationRequest("q", Conversation((Message("user", (Text(text),)),)), "input", deadline, **more)


def http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def says(outcome: Verdict | GuardError) -> Answer:
    async def answer(asked: ModerationRequest) -> bytes:
        return http(encode_answer(asked.id, outcome))

    return answer


def raw(data: bytes | None) -> Answer:
    async def answer(asked: ModerationRequest) -> bytes | None:
        return data

    return answer


class Balancer:
    """Answers the first question by the first of ``answers``, and so on; the last stays. None hangs up."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.asked: list[ModerationRequest] = []
        self.gone = 0

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
                size = next(int(line.split(":")[1]) for line in head if line.startswith("content-length"))
                self.asked.append(decode_request(await reader.readexactly(size)))
                answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
                said = asyncio.ensure_future(answer(self.asked[-1]))
                gone = asyncio.ensure_future(reader.read(1))
                await asyncio.wait({said, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not said.done():
                    self.gone += 1
                    said.cancel()
                    return writer.close()
                gone.cancel()
                await asyncio.gather(gone, return_exceptions=True)
                data = said.result()
                if data is None:
                    return writer.transport.abort()
                writer.write(data)
                await writer.drain()
                if b"connection: close" in data:
                    break
        writer.close()


@contextlib.asynccontextmanager
async def balanced(*answers: Answer, **options: Any) -> AsyncIterator[tuple[BalancedGuardClient, Balancer]]:
    balancer = Balancer(*answers)
    server = await asyncio.start_server(balancer.connected, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    client = BalancedGuardClient(f"http://{host}:{port}/", **options)
    try:
        yield client, balancer
    finally:
        await client.aclose()
        server.close()


def run(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work

    asyncio.run(bounded())


def test_questions_at_the_same_time_are_requests_of_their_own() -> None:
    async def slow(asked: ModerationRequest) -> bytes:
        await asyncio.sleep(0.2)
        return http(encode_answer(asked.id, VERDICT))

    async def work() -> None:
        async with balanced(slow) as (client, balancer):
            loop = asyncio.get_running_loop()
            began = loop.time()
            outcomes = await asyncio.gather(*(client.moderate(question(str(n))) for n in range(10)))
            assert outcomes == [VERDICT] * 10
            assert loop.time() - began < 1.0
            assert len({asked.id for asked in balancer.asked}) == 10

    run(work())


def test_an_image_of_megabytes_arrives_whole() -> None:
    async def work() -> None:
        image = Blob("image/png", bytes(range(256)) * 12_000)
        asked = replace(question(), conversation=Conversation((Message("user", (image,)),)))
        async with balanced(says(VERDICT)) as (client, balancer):
            assert await client.moderate(asked) == VERDICT
            assert balancer.asked[0].conversation == asked.conversation

    run(work())


LOST = [
    ("hangs up", raw(None)),
    ("a balancer's own error", raw(http(b"Internal Server Error", "500 Internal Server Error"))),
    ("a balancer without workers", raw(http(b"no backend", "502 Bad Gateway"))),
    ("an answer cut off", raw(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\nconnection: close\r\n\r\n{")),
    ("no HTTP", raw(b"hello\r\n\r\n")),
    ("a redirect", raw(http(b"", "307 Temporary Redirect", "location: http://127.0.0.1:1/"))),
    ("a worker that is loading", says(GuardError("unavailable", "the guard is being loaded"))),
]


@pytest.mark.parametrize("answer", [answer for _, answer in LOST], ids=[name for name, _ in LOST])
def test_a_question_whose_worker_went_away_is_asked_once_more(answer: Answer) -> None:
    async def work() -> None:
        async with balanced(answer, says(VERDICT)) as (client, balancer):
            assert await client.moderate(question()) == VERDICT
            first, second = balancer.asked
            assert second.deadline < first.deadline

    run(work())


@pytest.mark.parametrize("answer", [answer for _, answer in LOST], ids=[name for name, _ in LOST])
def test_content_that_ends_two_workers_does_not_reach_a_third(answer: Answer) -> None:
    async def work() -> None:
        async with balanced(answer) as (client, balancer):
            outcome = await client.moderate(question())
            assert isinstance(outcome, GuardError)
            assert outcome.kind is GuardErrorKind.UNAVAILABLE
            assert len(balancer.asked) == 2

    run(work())


@pytest.mark.parametrize(
    ("status", "headers", "wait"),
    [
        ("503 Service Unavailable", (), 1.0),
        ("503 Service Unavailable", ("retry-after: 7",), 7.0),
        ("429 Too Many Requests", ("retry-after: 7000",), 60.0),
        ("429 Too Many Requests", ("retry-after: Wed, 21 Oct 2026 07:28:00 GMT",), 1.0),
    ],
)
def test_a_balancer_that_sheds_load_is_not_asked_more(status: str, headers: tuple[str, ...], wait: float) -> None:
    async def work() -> None:
        async with balanced(raw(http(b"Request dropped due to backpressure", status, *headers))) as (client, balancer):
            outcome = await client.moderate(question())
            assert isinstance(outcome, GuardError)
            assert (outcome.kind, outcome.retry_after) == (GuardErrorKind.OVERLOADED, wait)
            assert len(balancer.asked) == 1

    run(work())


@pytest.mark.parametrize(("kind", "status"), [("too_long", "413 Content Too Large"), ("internal", "400 Bad Request")])
def test_a_worker_that_could_not_read_the_question_is_heard(kind: str, status: str) -> None:
    async def work() -> None:
        said = GuardError(kind, "the worker's own words")
        async with balanced(raw(http(encode_answer("", said), status))) as (client, _):
            outcome = await client.moderate(question())
            assert isinstance(outcome, GuardError)
            assert (outcome.kind, outcome.message) == (GuardErrorKind(kind), said.message)

    run(work())


@pytest.mark.parametrize("kind", [kind for kind in GuardErrorKind if kind is not GuardErrorKind.UNAVAILABLE])
def test_an_error_that_a_worker_found_stands(kind: GuardErrorKind) -> None:
    async def work() -> None:
        async with balanced(says(GuardError(kind))) as (client, balancer):
            outcome = await client.moderate(question())
            assert isinstance(outcome, GuardError)
            assert (outcome.kind, len(balancer.asked)) == (kind, 1)

    run(work())


WRONG = [
    ("the answer to another question", http(encode_answer("other", VERDICT))),
    ("the answer to no question", http(encode_answer("", VERDICT))),
    ("an error of another question", http(encode_answer("other", GuardError("timeout")))),
    ("too long", http(b" " * (MAX_ANSWER + 1))),
    ("a label for an answer that was not given", None),
]


@pytest.mark.parametrize("data", [data for _, data in WRONG], ids=[name for name, _ in WRONG])
def test_an_answer_that_is_not_to_this_question_is_no_verdict(data: bytes | None) -> None:
    async def work() -> None:
        both = says(replace(VERDICT, response="unharmful", response_score=0.0))
        async with balanced(both if data is None else raw(data)) as (client, _):
            outcome = await client.moderate(question())
            assert isinstance(outcome, GuardError)
            assert outcome.kind is GuardErrorKind.INTERNAL

    run(work())


def test_a_verdict_that_does_not_come_is_a_timeout_and_the_worker_hears_of_it() -> None:
    async def never(asked: ModerationRequest) -> bytes:
        await asyncio.sleep(30)
        raise AssertionError

    async def work() -> None:
        async with balanced(never) as (client, balancer):
            loop = asyncio.get_running_loop()
            began = loop.time()
            outcome = await client.moderate(question(deadline=0.2))
            assert isinstance(outcome, GuardError)
            assert outcome.kind is GuardErrorKind.TIMEOUT
            assert loop.time() - began < 1.0
            await asyncio.sleep(0.1)
            assert balancer.gone == 1

    run(work())


def test_a_caller_that_goes_away_ends_the_request() -> None:
    async def never(asked: ModerationRequest) -> bytes:
        await asyncio.sleep(30)
        raise AssertionError

    async def work() -> None:
        async with balanced(never) as (client, balancer):
            task = asyncio.create_task(client.moderate(question()))
            while not balancer.asked:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.sleep(0.1)
            assert balancer.gone == 1

    run(work())


def test_a_question_beyond_the_frame_is_not_sent() -> None:
    async def work() -> None:
        async with balanced(says(VERDICT), max_frame=1000) as (client, balancer):
            outcome = await client.moderate(question("x" * 2000))
            assert isinstance(outcome, GuardError)
            assert (outcome.kind, balancer.asked) == (GuardErrorKind.TOO_LONG, [])

    run(work())


def test_nobody_there_and_a_closed_client_are_unavailable() -> None:
    async def work() -> None:
        client = BalancedGuardClient("http://127.0.0.1:1")
        for _ in range(2):
            outcome = await client.moderate(question())
            assert isinstance(outcome, GuardError)
            assert outcome.kind is GuardErrorKind.UNAVAILABLE
            await client.aclose()

    run(work())


def test_the_answer_may_say_anything_but_pass() -> None:
    async def work() -> None:
        for body in ("{}", "[]", "null", json.dumps({"id": "q#1", "verdict": {}}), '{"id": "q#1"}', ""):
            async with balanced(raw(http(body.encode()))) as (client, _):
                assert isinstance(await client.moderate(question()), GuardError)

    run(work())
