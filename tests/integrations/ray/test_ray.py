"""The real Ray Serve with two replicas of the scripted guard, and two gateways that share one Redis."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from guard_middleware.guard.balanced import BalancedGuardClient
from guard_middleware.guard.client import GuardClient
from guard_middleware.scripted import ScriptedUpstream
from guard_middleware.types import Blob, Conversation, Message, Text, Verdict
from guard_middleware.wire import ModerationRequest
from tests.integrations.ray.cluster import EXAMPLE, Cluster
from tests.integrations.ray.environment import Missing
from tests.support.gateway import BAD, CHAT, GOOD, LEAK, Gateway, Upstream, chat, eventually
from tests.support.redis_server import RedisServer, needs_redis
from tests.support.served import Served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

#: what the scripted replicas need of a small machine
SMALL = {"autoscaling_config": None, "num_replicas": 2, "ray_actor_options": {"num_cpus": 0.1}}
SCRIPTED = "tests.integrations.ray.scripted:app"
PATIENCE = 60.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        with Cluster(tmp_path_factory.mktemp("ray"), SMALL, import_path=SCRIPTED, args={}) as cluster:
            eventually(lambda: len(cluster.replicas()) == 2, seconds=PATIENCE)
            yield cluster
    except Missing as error:
        pytest.skip(f"no Ray here: {error}")


def settings(cluster: Cluster, **more: Any) -> dict[str, Any]:
    """The example's configuration of a gateway, with patience for a machine that does other things."""
    config = yaml.safe_load((EXAMPLE / "guard.yaml").read_text())
    for source in config["policies"]["default"].values():
        source["deadline"] = "30s"
    config["worker"]["url"] = cluster.url
    return {name: value for name, value in {**config, **more}.items() if name != "audit" and value is not None}


# -- a replica dies --


@dataclass
class Load:
    """Clients that ask all the time, of two gateways in turn; half of what they ask is harmful."""

    gateways: list[Gateway]
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.answers: list[tuple[bool, int, float, float]] = []
        self._numbers = itertools.count()
        self._stop = False

    async def run(self, clients: int) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE) as http:
            await asyncio.gather(*(self._client(http) for _ in range(clients)))

    def stop(self) -> None:
        self._stop = True

    async def _client(self, http: httpx.AsyncClient) -> None:
        loop = asyncio.get_running_loop()
        while not self._stop:
            number = next(self._numbers)
            harmful = number % 2 == 1
            text = f"[wait 0.2] {'how do I pick a lock' if harmful else 'how do I bake bread'} {number}"
            began = loop.time()
            response = await http.post(self.gateways[number % 4 // 2].url + CHAT, json=chat(text))
            self.answers.append((harmful, response.status_code, began, loop.time() - began))


def test_a_replica_that_is_killed_under_load_costs_no_verdict_and_lets_nothing_pass(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(cluster, cache={"verdicts": {"entries": 0}})
    with ExitStack() as stack:
        upstream = stack.enter_context(Upstream())
        gateways = [stack.enter_context(Gateway(tmp_path, upstream.url, tmp_path, config)) for _ in range(2)]
        load = Load(gateways)
        killed_at = 0.0

        async def work() -> None:
            nonlocal killed_at
            running = asyncio.create_task(load.run(clients=4))
            try:
                async with asyncio.timeout(PATIENCE * 4):
                    while len(load.answers) < 24:
                        await asyncio.sleep(0.05)
                    os.kill(cluster.replicas()[0], signal.SIGKILL)
                    killed_at = asyncio.get_running_loop().time()
                    # as many again, of questions that came after the kill
                    while sum(began > killed_at for _, _, began, _ in load.answers) < 48:
                        await asyncio.sleep(0.05)
            finally:
                load.stop()
                await running

        asyncio.run(work())
        counted = Counter((harmful, status) for harmful, status, _, _ in load.answers)
        assert set(counted) == {(True, 400), (False, 200)}, counted
        assert not [seen for seen in upstream.seen if "pick a lock" in str(seen.json)]
        eventually(lambda: len(cluster.replicas()) == 2, seconds=PATIENCE)
        records = [record for gateway in gateways for record in gateway.records()]
        assert len(records) == len(load.answers)
        assert not [record for record in records if record["bypassed"]]
        assert all(call["verdict"] for record in records for call in record["decisions"])
    waits = sorted(seconds for _, _, _, seconds in load.answers)
    around = max(seconds for _, _, began, seconds in load.answers if began <= killed_at <= began + seconds)
    with capsys.disabled():
        print(
            f"\nray: {len(waits)} requests, none failed; p50 {waits[len(waits) // 2]:.2f} s, max {waits[-1]:.2f} s, "
            f"longest of those in flight at the kill {around:.2f} s"
        )


def ask(text: str, *parts: Blob) -> ModerationRequest:
    return ModerationRequest("q", Conversation((Message("user", (Text(text), *parts)),)), "input", 30.0)


def test_a_session_goes_through_to_one_replica_and_its_death_makes_errors_not_verdicts(cluster: Cluster) -> None:
    async def work() -> None:
        client = GuardClient(cluster.url)
        try:
            assert (await verdict(client, "how do I pick a lock")).request == "harmful"
            eventually(lambda: len(cluster.replicas()) == 2, seconds=PATIENCE)
            open_ = [asyncio.create_task(client.moderate(ask(f"[wait 20] {n}"))) for n in range(4)]
            await asyncio.sleep(1.0)
            for pid in cluster.replicas():
                os.kill(pid, signal.SIGKILL)
            outcomes = await asyncio.gather(*open_)
            assert [getattr(outcome, "kind", None) for outcome in outcomes] == ["unavailable"] * 4
            async with asyncio.timeout(PATIENCE * 2):
                while not isinstance(await client.moderate(ask("bread")), Verdict):
                    await asyncio.sleep(0.2)
            assert (await verdict(client, "how do I pick a lock again")).request == "harmful"
        finally:
            await client.aclose()
        eventually(lambda: len(cluster.replicas()) == 2, seconds=PATIENCE)

    asyncio.run(work())


async def verdict(client: GuardClient, text: str, *parts: Blob) -> Verdict:
    outcome = await client.moderate(ask(text, *parts))
    assert isinstance(outcome, Verdict), outcome
    return outcome


def test_questions_spread_over_the_replicas_and_large_images_pass(cluster: Cluster) -> None:
    async def work() -> None:
        client = BalancedGuardClient(cluster.url)
        try:
            async with asyncio.timeout(PATIENCE):
                assert await client.identity() == ("scripted", "0")
                image = Blob("image/png", os.urandom(20 * 2**20))
                assert (await verdict(client, "how do I pick a lock", image)).request == "harmful"
        finally:
            await client.aclose()

    asyncio.run(work())


# -- gateways without a state of their own --


@needs_redis
def test_gateways_with_one_redis_and_one_url_serve_one_conversation(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis = RedisServer(tmp_path)
    redis.start()
    monkeypatch.setenv("GUARD_REDIS_URL", redis.url)
    monkeypatch.setenv("GUARD_MIDDLEWARE_HMAC_KEY", secrets.token_hex(32))
    config = settings(cluster, cache={"redis": {"url_env": "GUARD_REDIS_URL", "deadline": "2s"}})
    try:
        with ExitStack() as stack:
            scripted = ScriptedUpstream({"good": GOOD * 200, "bad": BAD})
            upstream = stack.enter_context(Served(scripted.app, lifespan="off")).url
            a, b = (stack.enter_context(Gateway(tmp_path, upstream, tmp_path, config)) for _ in range(2))
            for gateway in (a, b):  # so that each has heard which weights judge
                assert gateway.post(chat(f"hello {gateway.url}")).status_code == 200
            first = respond(a, "how do I bake bread")
            assert first.status_code == 200, first.text

            def follow_up() -> httpx.Response | None:
                """The other gateway, once it leaves out what the first had judged, which is kept a moment later."""
                answer = respond(b, "and for how long?", after=first.json()["id"])
                assert answer.status_code == 200, answer.text
                verdict = b.record(answer)["decisions"][0]["verdict"]
                return answer if verdict["left_out"].get("characters", 0) > 200 else None

            second = eventually(follow_up)
            blocked = respond(a, "now tell me how to pick a lock", after=second.json()["id"])
            assert (blocked.status_code, LEAK in blocked.text) == (400, False)
            again = respond(b, "how do I bake bread")
            assert b.record(again)["decisions"][0]["verdict"]["cached"]
    finally:
        redis.stop()


def respond(gateway: Gateway, text: str, after: str | None = None) -> httpx.Response:
    body = {"model": "good", "input": text, **({"previous_response_id": after} if after else {})}
    return httpx.post(
        f"{gateway.url}/v1/responses",
        json=body,
        headers={"authorization": "Bearer mine"},
        timeout=PATIENCE,
        trust_env=False,
    )
