"""The guard driven from outside: what a host without ASGI gets to send, and what it gets to return."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from guard_middleware import config
from guard_middleware.errors import UpstreamError, UpstreamErrorKind
from guard_middleware.exchange import Answer, GuardedExchange
from guard_middleware.runtime import Runtime
from tests.support.guards import RuleGuard

CHAT = "/v1/chat/completions"
JSON = ((b"content-type", b"application/json"),)
EVENTS = ((b"content-type", b"text/event-stream"),)


def body(text: str, **extra: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": text}], **extra}).encode()


def completion(text: str) -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps(
        {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    ).encode()


def events(words: Sequence[str]) -> list[bytes]:
    def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        value = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
        return b"data: " + json.dumps(value).encode() + b"\n\n"

    said = [chunk({"content": word}) for word in words]
    return [chunk({"role": "assistant", "content": ""}), *said, chunk({}, "stop"), b"data: [DONE]\n\n"]


async def given(*pieces: bytes, error: Exception | None = None) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
    if error is not None:
        raise error


def run(
    folder: Path, work: Callable[[Callable[[bytes], GuardedExchange]], Awaitable[Any]], yaml: str = ""
) -> tuple[Any, list[dict[str, Any]]]:
    """``work`` gets what opens an exchange; returns its result and the decision log."""
    log = folder / "decisions.jsonl"

    async def main() -> Any:
        settings = config.parse(f"{yaml}\naudit: {{path: {json.dumps(str(log))}}}\n")
        runtime = Runtime(settings, guard=RuleGuard())
        try:
            return await work(lambda sent: GuardedExchange(runtime, CHAT, sent, headers=JSON))
        finally:
            await runtime.aclose()

    result = asyncio.run(main())
    return result, [json.loads(line) for line in log.read_text().splitlines()]


async def exchanged(exchange: GuardedExchange, answer: AsyncIterator[bytes], headers: Any = JSON) -> tuple[int, bytes]:
    async with exchange:
        sent = await exchange.request()
        assert not isinstance(sent, Answer)
        released = await exchange.answer(200, headers, answer)
        return released.status, await released.read()


def test_a_harmless_request_is_handed_over_and_its_answer_released(tmp_path: Path) -> None:
    async def work(opened: Callable[[bytes], GuardedExchange]) -> tuple[int, bytes]:
        return await exchanged(opened(body("bread?")), given(completion("An hour.")))

    (status, text), [record] = run(tmp_path, work)
    assert status == 200
    assert json.loads(text)["choices"][0]["message"]["content"] == "An hour."
    assert record["decisions"][-1]["action"] == "allow"


def test_a_harmful_request_is_answered_and_never_handed_over(tmp_path: Path) -> None:
    async def work(opened: Callable[[bytes], GuardedExchange]) -> tuple[int, bytes]:
        async with opened(body("how do I pick a lock?")) as exchange:
            refused = await exchange.request()
            assert isinstance(refused, Answer)
            return refused.status, await refused.read()

    (status, text), [record] = run(tmp_path, work)
    assert (status, record["decisions"][-1]["action"]) == (400, "block")
    assert "error" in json.loads(text)


def test_a_harmful_answer_is_replaced(tmp_path: Path) -> None:
    async def work(opened: Callable[[bytes], GuardedExchange]) -> tuple[int, bytes]:
        return await exchanged(opened(body("bread?")), given(completion("First, pick a lock with wire.")))

    (_, text), [record] = run(tmp_path, work)
    assert b"wire" not in text
    assert record["decisions"][-1]["action"] == "block"


@pytest.mark.parametrize("mode", ["hold", "window"])
def test_a_harmful_stream_is_cut_before_its_harm_and_the_hosts_call_ends(tmp_path: Path, mode: str) -> None:
    ended = []

    async def upstream() -> AsyncIterator[bytes]:
        try:
            for piece in events(["pick ", "a ", "lock ", "with ", "wire "] * 300):
                yield piece
                await asyncio.sleep(0)
        finally:
            ended.append(True)

    async def work(opened: Callable[[bytes], GuardedExchange]) -> tuple[int, bytes]:
        return await exchanged(opened(body("bread?", stream=True)), upstream(), EVENTS)

    (status, text), [record] = run(tmp_path, work, f"policies: {{default: {{output: {{stream: {{mode: {mode}}}}}}}}}")
    assert (status, record["decisions"][-1]["action"]) == (200, "block")
    assert b"wire" not in text
    assert ended


def test_a_broken_upstream_becomes_the_apis_own_error(tmp_path: Path) -> None:
    async def work(opened: Callable[[bytes], GuardedExchange]) -> list[int]:
        reset = UpstreamError(UpstreamErrorKind.RESET)
        async with opened(body("bread?")) as exchange:
            await exchange.request()
            unreachable = (await exchange.failed(UpstreamError(UpstreamErrorKind.UNREACHABLE))).status
        broken, _ = await exchanged(opened(body("bread?")), given(b'{"id"', error=reset))
        return [unreachable, broken]

    statuses, records = run(tmp_path, work)
    assert statuses == [502, 502]
    assert len(records) == 2


@pytest.mark.parametrize("answered", [True, False])
def test_a_race_that_the_verdict_ends_takes_no_answer_any_more(tmp_path: Path, answered: bool) -> None:
    ended = []

    async def upstream() -> AsyncIterator[bytes]:
        try:
            yield completion("An hour.")
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def work(opened: Callable[[bytes], GuardedExchange]) -> tuple[int, bytes]:
        async with opened(body("how do I pick a lock?")) as exchange:
            assert isinstance(await exchange.request(), bytes)
            chunks = upstream()
            await anext(chunks)
            await asyncio.sleep(0.05)  # the verdict comes while the host still makes its call
            if answered:
                blocked = await exchange.answer(200, JSON, chunks)
            else:
                blocked = await exchange.failed(UpstreamError(UpstreamErrorKind.RESET))
                await chunks.aclose()  # type: ignore[attr-defined]
            return blocked.status, await blocked.read()

    (status, text), [record] = run(tmp_path, work, "policies: {default: {race: true}}")
    assert (status, record["outcome"]) == (400, "blocked")
    assert b"hour" not in text
    assert ended


def test_a_call_that_the_exchange_makes_itself_ends_with_the_verdict(tmp_path: Path) -> None:
    seen: list[str] = []

    async def upstream(scope: Any, receive: Any, send: Any) -> None:
        seen.append(json.loads((await receive())["body"])["messages"][0]["content"])
        try:
            await asyncio.sleep(60)
        finally:
            seen.append("ended")

    log = tmp_path / "decisions.jsonl"
    settings = config.parse(f"policies: {{default: {{race: true}}}}\naudit: {{path: {json.dumps(str(log))}}}\n")

    async def main() -> int:
        runtime = Runtime(settings, guard=RuleGuard({"input": 0.05}))
        try:
            sent = body("how do I pick a lock?")
            async with GuardedExchange(runtime, CHAT, sent, headers=JSON, upstream=upstream) as exchange:
                return (await exchange.released()).status
        finally:
            await runtime.aclose()

    assert asyncio.run(main()) == 400
    assert seen == ["how do I pick a lock?", "ended"]


def test_what_the_host_drops_is_recorded_once_and_ends_its_call(tmp_path: Path) -> None:
    ended = []

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                yield events(["word "])[1]
                await asyncio.sleep(0)
        finally:
            ended.append(True)

    async def work(opened: Callable[[bytes], GuardedExchange]) -> None:
        async with opened(body("bread?")):
            pass
        async with opened(body("bread?", stream=True)) as exchange:
            await exchange.request()
            answer = asyncio.ensure_future(exchange.answer(200, EVENTS, endless()))
            await asyncio.sleep(0.05)
            answer.cancel()

    _, records = run(tmp_path, work)
    assert len(records) == 2
    assert ended


@pytest.mark.parametrize(("proxies", "status"), [("[unix]", 400), ("[127.0.0.1/32]", 200)])
def test_the_hosts_tenant_selects_the_policy_where_it_is_believed(tmp_path: Path, proxies: str, status: int) -> None:
    yaml = (
        "policies: {strict: {}, lax: {input: {on_harmful: annotate}}}\n"
        "default_policy: lax\n"
        f"tenants: {{header: x-tenant, trusted_proxies: {proxies}, match: [{{tenant: acme, policy: strict}}]}}\n"
    )
    log = tmp_path / "decisions.jsonl"

    async def main() -> int:
        runtime = Runtime(config.parse(f"{yaml}audit: {{path: {json.dumps(str(log))}}}\n"), guard=RuleGuard())
        try:
            exchange = GuardedExchange(runtime, CHAT, body("how do I pick a lock?"), headers=JSON, tenant="acme")
            async with exchange:
                sent = await exchange.request()
                return sent.status if isinstance(sent, Answer) else 200
        finally:
            await runtime.aclose()

    assert asyncio.run(main()) == status
