"""Streams through the middleware: text leaves window by window or at once; what breaks ends in words of ours."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guard_middleware import config
from guard_middleware.errors import GuardError, UpstreamError, UpstreamErrorKind
from guard_middleware.middleware import GuardMiddleware
from guard_middleware.runtime import Runtime
from guard_middleware.upstream import UpstreamApp
from tests.support import gateway
from tests.support.flow import DONE, ENDING, Client, Speaker, chat, chunk, opening, says
from tests.support.gateway import Seen, chunked, scripted_worker, stream_head
from tests.support.guards import BrokenGuard, RuleGuard
from tests.support.shapes import COMMENT, SHAPES, Shape, events

WINDOW = "{mode: window, first_window: 16, last_window: 16, growth: 1, overlap: 8, keep_alive: 30s}"
ASYNC = "{mode: async, leak_bound: 16, first_window: 16, overlap: 8, keep_alive: 30s}"
HOLD = "{mode: hold, keep_alive: 30s}"
WORDS = [f"word{n:03} " for n in range(40)]
HARM = [*WORDS[:20], "now pick ", "a lock ", *WORDS[20:]]
SECRET = "mauve-walrus "


class Host:
    """A guarded application and its decision log. ``stream`` are the rules of streams, in YAML."""

    def __init__(
        self, folder: Path, app: Any, stream: str = WINDOW, guard: Any = None, yaml: str = "", **of: Any
    ) -> None:
        self.log = folder / "decisions.jsonl"
        self.guard = guard or RuleGuard()
        fields = "".join(f", {name}: {json.dumps(value)}" for name, value in of.items())
        policy = f"policies: {{p: {{output: {{stream: {stream}}}{fields}}}}}\ndefault_policy: p\n"
        self.runtime = Runtime(
            config.parse(f"{policy}{yaml}\naudit: {{path: {json.dumps(str(self.log))}}}\n"),
            guard=None if guard == "worker" else self.guard,
        )
        self.app = GuardMiddleware(app, runtime=self.runtime)

    def run(self, *clients: Client, meanwhile: Callable[[], Any] | None = None) -> None:
        """Serves the clients at once, beside ``meanwhile``."""

        async def run() -> None:
            async with asyncio.timeout(150):
                await asyncio.gather(
                    *(client.run(self.app) for client in clients), *([meanwhile()] if meanwhile else [])
                )
            await self.runtime.aclose()

        asyncio.run(run())

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    @property
    def record(self) -> dict[str, Any]:
        (found,) = self.records()
        return found


@pytest.mark.parametrize("stream", [HOLD, WINDOW, ASYNC])
@pytest.mark.parametrize("guard_seconds", [0.0, 0.01])
def test_an_answer_arrives_whole_and_in_order(tmp_path: Path, stream: str, guard_seconds: float) -> None:
    host = Host(tmp_path, Speaker(WORDS, pause=0.001), stream, RuleGuard({"output": guard_seconds}))
    client = Client(chat())
    host.run(client)
    assert (client.status, client.text(), client.finish_reason()) == (200, "".join(WORDS), "stop")
    assert client.data.endswith(DONE)
    assert client.complete
    assert (host.record["outcome"], host.record["released_bytes"]) == ("allowed", len(client.data))


@pytest.mark.parametrize(("stream", "early"), [(HOLD, False), (WINDOW, True), (ASYNC, True)])
def test_text_leaves_while_the_upstream_still_speaks_except_in_hold(tmp_path: Path, stream: str, early: bool) -> None:
    upstream = Speaker(WORDS, pause=0.005)
    client = Client(chat())
    Host(tmp_path, upstream, stream).run(client)
    assert (client.first_text() < upstream.times[len(WORDS) // 2]) is early


@pytest.mark.parametrize(("stream", "shown"), [(HOLD, 0), (WINDOW, 8 * 20 + 9), (ASYNC, 8 * 20 + 16 + 16)])
def test_a_harmful_answer_is_cut_where_it_becomes_harmful(tmp_path: Path, stream: str, shown: int) -> None:
    async def pieces(_: Any) -> AsyncIterator[bytes]:
        yield opening()
        for word in HARM:
            await asyncio.sleep(0.002)
            yield says(word)[0]
        if stream != HOLD:
            await asyncio.Event().wait()  # until it is broken off
        yield ENDING

    upstream = Speaker(pieces)
    client = Client(chat())
    host = Host(tmp_path, upstream, stream, RuleGuard({"output": 0.005}))
    host.run(client)
    assert "".join(HARM).startswith(client.text())
    assert len(client.text()) <= shown
    assert (client.status, client.finish_reason()) == (200, "content_filter")
    assert client.data.endswith(DONE)
    assert client.complete
    assert host.record["outcome"] == "blocked"
    assert upstream.cancelled == (stream != HOLD)
    record = host.record
    assert (record["stream_mode"], record["stream_ending"]) == (
        stream[7:].partition(",")[0],
        "cut" if shown else "held",
    )
    assert record["released_characters"] == len(client.text())
    assert 0 < record["leaked_characters"] <= 16 if stream == ASYNC else record["leaked_characters"] == 0


@pytest.mark.parametrize("leaves", [False, True])
def test_a_long_answer_that_was_held_leaves_piece_by_piece(tmp_path: Path, leaves: bool) -> None:
    texts = [f"{n:06} " + "x" * 1000 for n in range(3000)]
    pieces = 0

    async def reads() -> None:
        nonlocal pieces
        pieces += 1
        if leaves and pieces == 2:
            client.gone.set()
            await asyncio.sleep(10)

    client = Client(chat(), reads=reads)
    host = Host(tmp_path, Speaker(texts), HOLD)
    host.run(client)
    record = host.record
    assert record["released_bytes"] >= len(client.data)
    if leaves:
        assert (client.complete, record["error"], record["released_bytes"] < 3e6) == (
            False,
            "client_disconnected",
            True,
        )
    else:
        assert (client.complete, client.text(), record["released_bytes"]) == (True, "".join(texts), len(client.data))
    assert client.headers[b"x-guard-action"] == b"allow"


def test_one_choice_is_cut_and_the_other_goes_on(tmp_path: Path) -> None:
    def pieces(_: Any) -> Iterator[bytes]:
        yield opening(0) + opening(1)
        for number in range(len(HARM)):
            yield says(HARM[number], index=0)[0] + says(f"other{number:02} ", index=1)[0]
        yield chunk({}, "stop", 0) + chunk({}, "stop", 1) + DONE

    upstream = Speaker(pieces, pause=0.002)
    client = Client(chat(n=2))
    host = Host(tmp_path, upstream, WINDOW, RuleGuard({"output": 0.003}))
    host.run(client)
    assert [client.finish_reason(choice) for choice in (0, 1)] == ["content_filter", "stop"]
    assert "a lock" not in client.text(0)
    assert "".join(HARM).startswith(client.text(0))
    assert client.text(1) == "".join(f"other{number:02} " for number in range(len(HARM)))
    assert upstream.cancelled == 0


# -- keep-alive --


@pytest.mark.parametrize("rules", ["{mode: hold, keep_alive: 40ms}", WINDOW.replace("30s", "40ms")])
def test_a_stream_that_is_held_shows_signs_of_life_and_then_its_text(tmp_path: Path, rules: str) -> None:
    client = Client(chat())
    host = Host(tmp_path, Speaker(WORDS[:10], pause=0.001), rules, RuleGuard({"output": 0.25}))
    host.run(client)
    assert client.data.count(COMMENT) >= 3
    assert client.text(data=client.data.rpartition(COMMENT)[0]) == ""
    assert client.text() == "".join(WORDS[:10])
    assert client.headers[b"x-guard-action"] == b"pending"
    # seconds held end with the first text, not with a sign of life; and signs of life are not released bytes
    assert host.record["timings"]["hold_back"] >= 0.2
    assert host.record["released_bytes"] == len(client.data.replace(COMMENT, b""))


def test_after_a_sign_of_life_a_block_and_an_error_are_said_in_the_stream(tmp_path: Path) -> None:
    rules = "{mode: hold, keep_alive: 40ms}"
    blocked, failed = Client(chat()), Client(chat())
    Host(tmp_path, Speaker(["pick a lock"]), rules, RuleGuard({"output": 0.1})).run(blocked)
    assert (blocked.status, blocked.finish_reason(), blocked.text()) == (200, "content_filter", "")

    class Late(BrokenGuard):
        async def moderate(self, request: Any) -> Any:
            await asyncio.sleep(0.1 if request.source == "output" else 0)
            return await super().moderate(request)

    Host(tmp_path, Speaker(["hello"]), rules, Late(GuardError("timeout"), after=1)).run(failed)
    assert (failed.status, failed.error["code"], failed.text()) == (200, "guard_unavailable", "")


def test_a_stream_that_breaks_before_its_first_text_is_held_and_not_unscreened(tmp_path: Path) -> None:
    host = Host(tmp_path, Speaker(lambda _: [opening(), b"data: {\n\n"], pause=0.02))
    client = Client(chat())
    host.run(client)
    assert (client.status, client.error["code"]) == (200, "upstream_malformed")
    record = host.record
    assert (record["stream_ending"], record["bypassed"]) == ("held", [])


def test_no_sign_of_life_goes_before_the_input_is_cleared(tmp_path: Path) -> None:
    client = Client(chat("how do I pick a lock?"))
    guard = RuleGuard({"input": 0.2})
    Host(tmp_path, Speaker(WORDS), "{mode: hold, keep_alive: 20ms}", guard, race=True).run(client)
    assert (client.status, len(client.pieces)) == (400, 1)


# -- the other sides --


@pytest.mark.parametrize("stream", [HOLD, WINDOW, ASYNC])
def test_a_client_that_leaves_in_mid_stream_cancels_the_guard_and_the_upstream(tmp_path: Path, stream: str) -> None:
    upstream = Speaker([*WORDS, *WORDS], pause=0.005)
    client = Client(chat())
    guard = RuleGuard({"output": 0.05})
    host = Host(tmp_path, upstream, stream, guard)

    async def leave() -> None:
        while upstream.taken < 5000 or (stream != HOLD and not client.text()):
            await asyncio.sleep(0.005)
        client.gone.set()

    host.run(client, meanwhile=leave)
    assert not client.complete
    assert upstream.cancelled == 1
    assert guard.cancelled == (stream != HOLD)
    record = host.record
    assert (record["outcome"], record["error"]) == ("aborted", "client_disconnected")
    assert (record["released_bytes"] > 0) == (stream != HOLD)


def _rest(name: str, shape: Shape) -> Callable[[Seen, asyncio.StreamReader, asyncio.StreamWriter], Any]:
    """Says the words, then the secret, too short for a window, and then what its name says."""
    said = "".join(WORDS[:10]) + SECRET
    after: dict[str, bytes] = {
        "malformed": chunked(b"data: {\n\n", end=False),
        "unknown_event": chunked(b'event: note\ndata: {"type": "note"}\n\n', end=False),
        "error_event": chunked(shape.error_event, end=False),
        "invalid_utf_8": chunked(b"data: \xff\n\n", end=False),
        "after_the_end": chunked(shape.ending(said) + shape.says(SECRET)),
        "no_end": chunked(),
        "no_finish": chunked(DONE),
        "bad_chunk": b"zz\r\n",
        "too_large": chunked(b": " + b"x" * 70_000 + b"\n\n", end=False),
    }

    async def behaviour(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(stream_head() + chunked(shape.opening(), end=False))
        for word in WORDS[:10]:
            writer.write(chunked(shape.says(word), end=False))
            await asyncio.sleep(0.005)
        writer.write(chunked(shape.says(SECRET), end=False) + after.get(name, b""))
        await writer.drain()
        await asyncio.sleep(0.02)
        if name == "reset":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        elif name == "stall":
            await reader.read(1)
        else:
            writer.close()

    return behaviour


BREAKS = {
    "reset": "upstream_reset",
    "stall": "upstream_timeout",
    "malformed": "upstream_malformed",
    "unknown_event": "upstream_unsupported",
    "error_event": "upstream_reset",
    "invalid_utf_8": "upstream_malformed",
    "after_the_end": "upstream_malformed",
    "no_end": "upstream_reset",
    "no_finish": "upstream_malformed",
    "bad_chunk": "upstream_timeout",  # aiohttp tells nobody, so that the silence ends it
    "too_large": "upstream_too_large",
}


@pytest.fixture(scope="module")
def breaking() -> Iterator[gateway.Upstream]:
    told = {f"{name}-{dialect}": _rest(name, shape) for name in BREAKS for dialect, shape in SHAPES.items()}
    with gateway.Upstream(told) as server:
        yield server


@pytest.mark.parametrize("dialect", SHAPES)
@pytest.mark.parametrize("name", BREAKS)
def test_an_upstream_that_breaks_in_mid_stream_is_said_and_what_is_held_is_dropped(
    tmp_path: Path, breaking: gateway.Upstream, name: str, dialect: str
) -> None:
    shape = SHAPES[dialect]
    ends_by_silence = BREAKS[name] == "upstream_timeout"
    upstream = UpstreamApp(breaking.url, silence=0.3 if ends_by_silence else 30)
    client = Client(shape.asked(f"{name}-{dialect}", True), shape.path)
    host = Host(tmp_path, upstream, WINDOW, yaml="limits: {answer_bytes: 64KB}")

    async def close() -> None:
        await client.until(lambda c: c.complete)
        await upstream.aclose()

    host.run(client, meanwhile=close)
    assert client.status == 200
    assert shape.text(client.data)
    assert ("".join(WORDS[:10]) + SECRET).startswith(shape.text(client.data))
    # on a slow machine the last words come together, and a window may hold the secret: then it was read
    read = "".join(str(request.conversation.answer) for request in host.guard.of("output"))
    assert (SECRET.strip().encode() in client.data) <= (SECRET.strip() in read)
    assert shape.code(events(client.data)[-1]) == BREAKS[name]
    assert client.data.endswith(shape.after_error)
    assert shape.last not in client.data
    record = host.record
    assert (record["outcome"], record["error"], record["status"]) == ("upstream_error", BREAKS[name], 200)
    assert record["released_bytes"] == len(client.data)
    assert (record["stream_ending"], record["bypassed"]) == ("cut", [])


@pytest.mark.parametrize("stream", [WINDOW, ASYNC])
@pytest.mark.parametrize("kind", ["unavailable", "timeout", "overloaded"])
def test_a_guard_that_fails_in_mid_stream_ends_it_with_an_error(tmp_path: Path, stream: str, kind: str) -> None:
    upstream = Speaker([*WORDS, SECRET, *WORDS], pause=0.002)
    client = Client(chat())
    host = Host(tmp_path, upstream, stream, BrokenGuard(GuardError(kind), after=4))
    host.run(client)
    assert (client.status, client.error["code"]) == (200, "guard_unavailable")
    assert client.text()
    assert SECRET not in client.text()
    assert upstream.cancelled == 1
    assert (host.record["outcome"], host.record["error"]) == ("guard_error", kind)


def test_a_worker_that_is_killed_in_mid_stream_ends_it_with_an_error(tmp_path: Path) -> None:
    upstream = Speaker(WORDS * 5, pause=0.01)
    client = Client(chat())
    with scripted_worker(tmp_path / "w.sock") as worker:
        settings = f"worker: {{socket: {tmp_path / 'w.sock'}, manage: false}}"
        host = Host(tmp_path, upstream, WINDOW, "worker", settings)

        async def kill() -> None:
            await client.until(lambda c: bool(c.text()))
            worker.popen.kill()

        host.run(client, meanwhile=kill)
    assert (client.status, client.error["code"]) == (200, "guard_unavailable")
    assert 0 < len(client.text()) < len("".join(WORDS * 5))
    assert upstream.cancelled == 1
    assert host.record["outcome"] == "guard_error"


@pytest.mark.parametrize("stream", [WINDOW, ASYNC])
def test_a_slow_client_slows_the_upstream_down(tmp_path: Path, stream: str) -> None:
    go = asyncio.Event()
    upstream = Speaker([f"{n:06} " + "x" * 1000 for n in range(2000)])
    rules = stream.replace("leak_bound: 16", "leak_bound: 2000")
    client = Client(chat(), reads=go.wait)

    async def read_at_last() -> None:
        last = -1
        while upstream.taken != last:
            last = upstream.taken
            await asyncio.sleep(0.1)
        assert 0 < last < 400_000  # the backlog of 256 KiB, and a piece
        go.set()

    host = Host(tmp_path, upstream, rules)
    host.run(client, meanwhile=read_at_last)
    assert len(client.text()) == 2000 * 1007
    assert host.record["outcome"] == "allowed"


def test_200_concurrent_streams_are_neither_lost_nor_mixed(tmp_path: Path) -> None:
    random_ = random.Random(4)

    async def pieces(body: Any) -> AsyncIterator[bytes]:
        marker = body["model"]
        yield opening()
        for n in range(20):
            await asyncio.sleep(random_.random() / 20)
            yield says(f"{marker}-{n} ")[0]
        yield ENDING

    guard = RuleGuard({"input": 0.005, "output": 0.02})
    host = Host(tmp_path, Speaker(pieces), WINDOW, guard)
    clients = [Client(chat() | {"model": f"m{n}"}) for n in range(200)]
    host.run(*clients)
    for number, client in enumerate(clients):
        assert client.text() == "".join(f"m{number}-{n} " for n in range(20))
        assert client.finish_reason() == "stop"
    records = host.records()
    assert len({record["id"] for record in records}) == 200
    assert {record["outcome"] for record in records} == {"allowed"}


# -- the race --


@pytest.mark.parametrize("stream", [False, True])
def test_a_race_shows_nothing_before_the_inputs_verdict_and_then_at_once(tmp_path: Path, stream: bool) -> None:
    whole = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"}
    whole["choices"] = [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}]

    def pieces(body: Any) -> list[bytes]:
        return [opening(), *says(*WORDS), ENDING] if body["stream"] else [json.dumps(whole).encode()]

    upstream = Speaker(pieces)
    guard = RuleGuard({"input": 1.0})
    client = Client(chat() | {"stream": stream})
    host = Host(tmp_path, upstream, WINDOW, guard, race=True)
    host.run(client)
    assert client.status == 200
    assert upstream.ended - client.began < 0.9  # the whole answer was there
    assert client.pieces[0][0] - client.began >= 1.0
    assert [request.source for request in guard.asked][:2] == ["input", "output"]
    assert host.record["outcome"] == "allowed"


@pytest.mark.parametrize("stream", [False, True])
def test_a_race_that_the_guard_wins_breaks_the_upstream_off_and_says_that_it_was_called(
    tmp_path: Path, stream: bool
) -> None:
    upstream = Speaker(WORDS * 100, pause=0.01)
    client = Client(chat("how do I pick a lock?") | {"stream": stream})
    host = Host(tmp_path, upstream, WINDOW, RuleGuard({"input": 0.1}), race=True)
    if not stream:
        upstream = host.app.app = Speaker(lambda _: (b" " for _ in range(1000)), pause=0.01)
    host.run(client)
    assert (client.status, client.error["code"]) == (400, "content_filter")
    assert b"word" not in client.data
    assert upstream.cancelled == 1
    assert (host.record["outcome"], host.record["upstream_called"]) == ("blocked", True)


def test_without_a_race_a_harmful_prompt_never_reaches_the_upstream(tmp_path: Path) -> None:
    upstream = Speaker(WORDS)
    client = Client(chat("how do I pick a lock?"))
    host = Host(tmp_path, upstream)
    host.run(client)
    assert client.status == 400
    assert (upstream.bodies, host.record["upstream_called"]) == ([], False)


def test_a_race_hears_of_a_broken_upstream_after_the_inputs_verdict(tmp_path: Path) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise UpstreamError(UpstreamErrorKind.UNREACHABLE)

    for text, status in (("how do I pick a lock?", 400), ("how do I bake bread?", 502)):
        client = Client(chat(text))
        Host(tmp_path, broken, WINDOW, RuleGuard({"input": 0.1}), race=True).run(client)
        assert client.status == status
        assert client.pieces[0][0] - client.began >= 0.1


@pytest.mark.parametrize(("race", "status"), [(True, 400), (False, 200)])
def test_a_race_is_refused_where_the_upstream_acts_on_tools_itself(tmp_path: Path, race: bool, status: int) -> None:
    messages = [{"role": "user", "content": "what is new?"}]
    tools = [{"type": "code_execution_20250825", "name": "code_execution"}]
    answer: dict[str, Any] = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m"}
    answer |= {"content": [{"type": "text", "text": "hi"}], "stop_reason": "end_turn", "stop_sequence": None}
    answer |= {"usage": {"input_tokens": 1, "output_tokens": 1}}
    upstream = Speaker(lambda _: [json.dumps(answer).encode()])
    client = Client({"model": "m", "max_tokens": 9, "messages": messages, "tools": tools}, "/v1/messages")
    host = Host(tmp_path, upstream, WINDOW, race=race)
    host.run(client)
    assert client.status == status, client.data
    assert len(upstream.bodies) == (not race)
