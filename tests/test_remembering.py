"""Conversations through the middleware: continued by id, judged turn by turn, and described in the record."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from PIL import Image

from guard_middleware import config
from guard_middleware.errors import ConfigError
from guard_middleware.middleware import GuardMiddleware
from guard_middleware.runtime import Runtime
from guard_middleware.scripted import ScriptedUpstream
from guard_middleware.telemetry import Telemetry
from guard_middleware.types import Conversation
from tests.support.guards import RuleGuard
from tests.support.pieces import PieceGuard
from tests.support.redis_server import RedisServer, needs_redis
from tests.support.scripted_worker import text_of

ANSWERS = {"good": "Bread needs an hour.", "bad": "First, pick a lock with two bits of wire."}
KEY = {"authorization": "Bearer mine"}
_NUMBERS = itertools.count()


class Host:
    """One gateway in this process: its guard, what reached its upstream, and its decision log."""

    def __init__(
        self,
        folder: Path,
        guard: Any = None,
        yaml: str = "",
        upstream: ScriptedUpstream | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.log = folder / f"{next(_NUMBERS)}.jsonl"
        self.upstream = upstream or ScriptedUpstream(ANSWERS)
        self.guard = guard or RuleGuard()
        settings = config.parse(f"{yaml}\naudit: {{path: {json.dumps(str(self.log))}}}\n")
        self.runtime = Runtime(settings, guard=self.guard, telemetry=telemetry)
        transport = httpx.ASGITransport(GuardMiddleware(self.upstream.app, runtime=self.runtime))
        self.client = httpx.AsyncClient(transport=transport, base_url="http://gateway")

    async def respond(
        self, text: str, after: str | None = None, headers: dict[str, str] = KEY, **more: Any
    ) -> httpx.Response:
        body = {"model": "good", "input": text, **({"previous_response_id": after} if after else {}), **more}
        return await self.client.post("/v1/responses", json=body, headers=headers)

    async def aclose(self) -> None:
        await self.client.aclose()
        await self.runtime.aclose()

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    @property
    def seen(self) -> Conversation:
        """What the guard was asked about the last request."""
        return next(asked for asked in reversed(self.guard.asked) if asked.source == "input").conversation


def id_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    if response.headers["content-type"].startswith("application/json"):
        return str(response.json()["id"])
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    return next(str(event["response"]["id"]) for event in events if event["type"] == "response.completed")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", ["hold", "window"])
def test_a_continued_answer_is_judged_after_all_that_was_said_before(tmp_path: Path, stream: bool, mode: str) -> None:
    async def work() -> None:
        host = Host(tmp_path, yaml=f"policies: {{default: {{output: {{stream: {{mode: {mode}}}}}}}}}")
        first = id_of(await host.respond("hello", stream=stream))
        second = id_of(await host.respond("and then?", first, stream=stream))
        id_of(await host.respond("thanks", second, stream=stream))
        assert text_of(host.seen.messages).split("\n") == [
            "hello", ANSWERS["good"], "and then?", ANSWERS["good"], "thanks",
        ]  # fmt: skip
        await host.aclose()

    asyncio.run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_split_over_continued_answers_is_blocked(tmp_path: Path, stream: bool) -> None:
    async def work() -> None:
        host = Host(tmp_path, PieceGuard())
        answer = None
        for piece in ("{pi}", "{cka}", "{lo}"):
            answer = id_of(await host.respond(piece, answer, stream=stream))
        before = host.upstream.requests
        assert (await host.respond("{ck}", answer, stream=stream)).status_code == 400
        assert host.upstream.requests == before
        await host.aclose()

    asyncio.run(work())


def test_an_id_that_did_not_pass_here_or_is_anothers_is_refused_and_reaches_nobody(tmp_path: Path) -> None:
    async def work() -> None:
        host = Host(tmp_path)
        mine = id_of(await host.respond("hello"))
        before, asked = host.upstream.requests, len(host.guard.asked)
        refused = [
            await host.respond("go on", "resp_made_up"),
            await host.respond("go on", mine, headers={"authorization": "Bearer other"}),
            await host.respond("go on", mine, headers={}),
            await host.respond("go on", mine, headers={**KEY, "openai-project": "p"}),
        ]
        assert {response.status_code for response in refused} == {400}
        assert len({response.json()["error"]["message"] for response in refused}) == 1
        error = refused[0].json()["error"]
        assert (error["code"], error["param"]) == ("invalid_request", "previous_response_id")
        assert (host.upstream.requests, len(host.guard.asked)) == (before, asked)
        id_of(await host.respond("go on", mine))
        await host.aclose()

    asyncio.run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_was_blocked_cannot_be_continued(tmp_path: Path, stream: bool) -> None:
    async def work() -> None:
        host = Host(tmp_path)
        blocked = await host.respond("hello", model="bad", stream=stream)
        ids = [
            value
            for line in blocked.text.replace("data: ", "\n").split("\n")
            for value in [_id(line)]
            if value is not None
        ]
        assert ids
        for answer in {*ids, "resp_1"}:
            assert (await host.respond("go on", answer)).status_code == 400
        await host.aclose()

    asyncio.run(work())


def _id(line: str) -> str | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    value = value.get("response", value) if isinstance(value, dict) else {}
    return value.get("id") if isinstance(value, dict) else None


def test_nothing_that_a_client_sends_marks_content_as_judged(tmp_path: Path) -> None:
    """E11 of the catalogue: an optimisation for new messages that a client's header can steer."""
    claims = {
        "x-litellm-session-id": "1", "x-session-id": "1", "x-conversation-id": "1", "x-guard-screened": "true",
        "x-guard-action": "allow", "x-guard-decision-id": "gd_1", "cache-control": "only-if-cached", "etag": "1",
        "if-none-match": "*", "idempotency-key": "1", "x-request-id": "1",
        "traceparent": f"00-{'1' * 32}-{'2' * 16}-01",
    }  # fmt: skip

    async def work() -> None:
        host = Host(tmp_path)
        good = {"model": "good", "messages": [{"role": "user", "content": "hello"}]}
        bad = {"model": "good", "messages": [{"role": "user", "content": "how to pick a lock"}]}
        for headers in (claims, {**claims, **KEY}):
            assert (await host.client.post("/v1/chat/completions", json=good, headers=headers)).status_code == 200
            assert (await host.client.post("/v1/chat/completions", json=bad, headers=headers)).status_code == 400
            late = {**good, "messages": [*bad["messages"], {"role": "assistant", "content": "ok"}, *good["messages"]]}
            assert (await host.client.post("/v1/chat/completions", json=late, headers=headers)).status_code == 400
        assert host.upstream.requests == 2
        await host.aclose()

    asyncio.run(work())


def photo(shade: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (shade, 0, 0)).save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def test_old_images_are_decoded_once_and_sent_on_at_every_turn(tmp_path: Path) -> None:
    async def work() -> None:
        host = Host(tmp_path, yaml="cache: {turns: {characters: 0, images: 1}}")
        messages: list[dict[str, Any]] = []
        for turn in range(4):
            content = [{"type": "text", "text": f"question {turn}"}, photo(turn)]
            messages.append({"role": "user", "content": content})
            body = {"model": "good", "messages": messages}
            response = await host.client.post("/v1/chat/completions", json=body)
            messages.append(response.json()["choices"][0]["message"] | {"content": ANSWERS["good"]})
        assert host.runtime.caches.images.decoded == 4
        assert len(host.seen.blobs()) == 1
        await host.aclose()
        last = host.records()[-1]
        assert len(last["content"]["images"]) == 4
        verdicts = [decision["verdict"] for decision in last["decisions"]]
        assert [verdict["left_out"]["images"] for verdict in verdicts] == [3, 3]
        assert [verdict["left_out"]["characters"] for verdict in verdicts] == [3 * len(ANSWERS["good"])] * 2

    asyncio.run(work())


def test_the_record_says_that_a_verdict_was_known(tmp_path: Path) -> None:
    async def work() -> None:
        host = Host(tmp_path)
        for _ in range(2):
            id_of(await host.respond("hello"))
        await host.aclose()
        first, second = ([d["verdict"] for d in line["decisions"]] for line in host.records())
        assert [v["cached"] for v in first] == [False, False]
        assert [v["cached"] for v in second] == [True, True]
        assert [v["tokens"]["prompt"] for v in second] == [0, 0]
        assert [v["request"] for v in second] == ["unharmful", "unharmful"]
        assert len(host.guard.asked) == 2

    asyncio.run(work())


def test_what_the_cache_knew_is_counted(tmp_path: Path) -> None:
    reader = InMemoryMetricReader()

    async def work() -> None:
        host = Host(tmp_path, PieceGuard(pause=0.05), telemetry=Telemetry(meter_provider=MeterProvider([reader])))
        await asyncio.gather(host.respond("hello"), host.respond("hello"))
        await host.respond("hello")
        await host.aclose()

    asyncio.run(work())
    assert points(reader) == {"hit": 2, "miss": 2, "coalesced": 2, "input": 20, "output": 10}


def points(reader: InMemoryMetricReader) -> dict[Any, int]:
    """What was looked up and what it cost, by the one attribute that tells them apart."""
    data = reader.get_metrics_data()
    assert data is not None
    found: dict[Any, int] = {}
    for metric in (m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics):
        key = {
            "guard_middleware.cache.lookups": "guard_middleware.cache.result",
            "guard_middleware.guard.tokens": "gen_ai.token.type",
        }.get(metric.name)
        for point in metric.data.data_points if key else ():
            label = (point.attributes or {})[key]
            found[label] = found.get(label, 0) + point.value
    return found


def test_a_cached_block_blocks_and_a_policy_decides_on_a_cached_verdict_by_its_own_threshold(tmp_path: Path) -> None:
    async def work() -> None:
        yaml = (
            "policies: {watch: {input: {on_harmful: shadow}}}\n"
            "tenants: {header: x-tenant, match: [{tenant: watch, policy: watch}]}\n"
        )
        host = Host(tmp_path, yaml=yaml)
        for headers, status in ((KEY, 400), (KEY, 400), ({**KEY, "x-tenant": "watch"}, 200), (KEY, 400)):
            assert (await host.respond("how to pick a lock", headers=headers)).status_code == status
        assert [asked.source for asked in host.guard.asked] == ["input", "output"]
        await host.aclose()

    asyncio.run(work())


@pytest.mark.parametrize("entry", ["verdicts", "history"])
def test_each_cache_can_be_switched_off(tmp_path: Path, entry: str) -> None:
    async def work() -> None:
        host = Host(tmp_path, yaml=f"cache: {{{entry}: {{entries: 0}}}}")
        first = id_of(await host.respond("hello"))
        assert (await host.respond("go on", first)).status_code == (400 if entry == "history" else 200)
        id_of(await host.respond("hello"))
        questions = [text_of(asked.conversation.messages) for asked in host.guard.asked if asked.source == "input"]
        assert questions.count("hello") == (1 if entry == "history" else 2)
        await host.aclose()

    asyncio.run(work())


# -- in Redis --


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    redis = RedisServer(tmp_path)
    redis.start()
    yield redis
    redis.stop()


YAML = "cache: {redis: {url_env: GUARD_REDIS_URL, deadline: 300ms}}"


@needs_redis
def test_two_gateways_serve_one_conversation(
    tmp_path: Path, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUARD_REDIS_URL", server.url)
    monkeypatch.setenv("GUARD_MIDDLEWARE_HMAC_KEY", "k" * 32)

    async def work() -> None:
        upstream = ScriptedUpstream(ANSWERS)
        a, b = (Host(tmp_path, PieceGuard(), YAML, upstream) for _ in range(2))
        answer = None
        for host, piece in ((a, "{pi}"), (b, "{cka}"), (a, "{lo}")):
            answer = id_of(await host.respond(piece, answer))
        assert (await b.respond("{ck}", answer)).status_code == 400
        server.stop()
        assert (await b.respond("{pickalock}")).status_code == 400
        assert (await b.respond("hello")).status_code == 200
        assert (await b.respond("go on", answer)).status_code == 400
        await a.aclose()
        await b.aclose()

    asyncio.run(work())


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "GUARD_REDIS_URL is not set"),
        ({"GUARD_REDIS_URL": "redis://127.0.0.1"}, "operator's key, which is missing"),
        ({"GUARD_REDIS_URL": "redis://127.0.0.1", "GUARD_MIDDLEWARE_HMAC_KEY": "short"}, "shorter than 16"),
    ],
)
def test_a_redis_without_its_address_or_without_a_key_does_not_start(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GUARD_REDIS_URL", "GUARD_MIDDLEWARE_HMAC_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        Runtime(config.parse(YAML), guard=RuleGuard())
