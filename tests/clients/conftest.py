"""The gateways that the clients meet, the upstream behind them, and the environments that clients live in."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from guard_middleware.scripted import ScriptedUpstream, Turn
from tests.clients import environments
from tests.clients.contract import ANSWERS, CALLS, SETTINGS, TURNS, Call, Case
from tests.support.gateway import Gateway, chat, eventually, scripted_worker
from tests.support.served import Served


class Upstream:
    """The scripted upstream on a free port; a stream waits before its harm until its client has seen something."""

    def __init__(self) -> None:
        self._going: dict[str, asyncio.Event] = {}
        scripted = ScriptedUpstream(ANSWERS, pace=self._pace)
        scripted.app.router.routes.append(Route("/go/{model}", self._go))
        # httptools: the default of other tests' processes too
        self._served = Served(scripted.app, ws="none")

    def __enter__(self) -> Self:
        self._served.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._served.__exit__()

    @property
    def url(self) -> str:
        return self._served.url

    def _event(self, model: str) -> asyncio.Event:
        return self._going.setdefault(model, asyncio.Event())

    async def _go(self, request: Request) -> Response:
        self._event(request.path_params["model"]).set()
        return Response()

    async def _pace(self, turn: Turn, event: bytes) -> None:
        if turn.model.startswith("late.") and f'"{TURNS} '.encode() in event:
            # A client that shows nothing before the end never says go.
            with_text = self._event(turn.model).wait()
            try:
                await asyncio.wait_for(with_text, 2)
            except TimeoutError:
                return


@dataclass
class Stage:
    """The gateways, and every call that was made through them."""

    gateways: Mapping[str, Gateway]
    upstream: Upstream
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def play(self, client: str) -> None:
        """Does every call of a client in every case; raises ``environments.Missing``."""
        command = environments.command(client)
        jobs = [self._job(client, call, case) for call in CALLS[client] for case in call.cases]
        done = subprocess.run(
            command,
            input=json.dumps(jobs),
            capture_output=True,
            text=True,
            timeout=280,
            env=environments.variables(),
            check=False,
        )
        lines = [line.removeprefix("result ") for line in done.stdout.splitlines() if line.startswith("result ")]
        assert len(lines) == len(jobs), (
            f"{client}: {len(lines)} of {len(jobs)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
        self.results |= {result["id"]: result for result in map(json.loads, lines)}

    def saw(self, client: str, call: Call, case: Case) -> dict[str, Any]:
        return self.results[_id(client, call, case)]

    def records(self, client: str, call: Call, case: Case) -> list[dict[str, Any]]:
        """The decision log's lines of a call: one for each request that reached the gateway."""
        job = self._job(client, call, case)
        return eventually(lambda: self.gateways[case.guard].records(model=job["model"]), seconds=5)

    def _job(self, client: str, call: Call, case: Case) -> dict[str, Any]:
        id = _id(client, call, case)
        model = f"{call.answer(case)}.{_NUMBERS.setdefault(id, len(_NUMBERS))}"
        return {
            "id": id,
            "call": call.name,
            "model": model,
            "prompt": case.prompt,
            "url": self.gateways[case.guard].url,
            "headers": {"x-tenant": case.tenant} if case.tenant else {},
            "go": f"{self.upstream.url}/go/{model}" if case.only_streams else "",
        }


_NUMBERS: dict[str, int] = {}


def _id(client: str, call: Call, case: Case) -> str:
    return f"{client} | {call.name} | {case.name}"


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("clients")
    sockets = {name: folder / f"{name}.sock" for name in ("works", "hangs", "gone")}
    impatient = {"policies": {"default": {"input": {"deadline": "100ms"}}}}
    with ExitStack() as stack:
        upstream = stack.enter_context(Upstream())
        workers = {name: stack.enter_context(scripted_worker(path)) for name, path in sockets.items()}
        gateways = {
            name: stack.enter_context(Gateway(folder, upstream.url, path, impatient if name == "hangs" else SETTINGS))
            for name, path in sockets.items()
        }
        assert gateways["hangs"].post(chat("hi", "good")).status_code == 200  # so that the question hangs
        workers["hangs"].popen.send_signal(signal.SIGSTOP)
        workers["gone"].popen.kill()
        workers["gone"].popen.wait()
        yield Stage(gateways, upstream)
