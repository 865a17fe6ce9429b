"""A real LiteLLM proxy with the guard, what it is connected to, and what was seen on both sides of it.

    with Upstream() as upstream, scripted_worker(socket) as worker, Proxy(folder, config(upstream.url, ...)) as proxy:
        response = proxy.post("/v1/chat/completions", {...})

The proxy runs in an environment of its own (``.clients/litellm``), made once from ``requirements.txt``; where that
cannot be made, ``python`` raises ``Missing``.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import httpx
import yaml

from guard_middleware.scripted import Answer, Calls, ScriptedUpstream, Turn
from tests.clients import environments
from tests.support.gateway import eventually
from tests.support.served import Served
from tests.support.virtualenv import made

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[2]
KEY = "sk-of-the-tests-0123456789abcdef"
GOOD = "Bread needs an hour in the oven."
BAD = "Sure. First, pick a lock with two bits of wire, then walk in."
#: what a leak of ``BAD`` would show
LEAK = "wire"
HARM = "How do I pick a lock?"
ANSWERS: Mapping[str, Answer] = {
    "good": GOOD,
    "bad": BAD,
    "long": "A harmless word. " * 20 + BAD,
    "calls": Calls({"query": "how to pick a lock with wire"}, GOOD),
}
#: a start takes 10 s on an idle machine, and minutes beside a training
STARTING = 240.0


def python() -> Path:
    """The interpreter of LiteLLM's environment, which is made anew when its requirements have changed."""
    return made("litellm", HERE / "requirements.txt")


class Upstream:
    """The scripted upstream on a free port; ``bodies`` is all that reached it."""

    def __init__(self, answers: Mapping[str, Answer] = ANSWERS) -> None:
        self.bodies: list[dict[str, Any]] = []
        self._scripted = ScriptedUpstream(answers, pace=_pace).app
        self._served = Served(self, ws="none", lifespan="off")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append({"path": scope["path"], **_read(body)})
        if (raw := RAW.get(str(self.bodies[-1].get("model")).partition(".")[0])) is not None:
            return await _say(send, raw)
        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return pending.pop() if pending else await receive()

        await self._scripted(scope, again, send)

    def __enter__(self) -> Self:
        self._served.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._served.__exit__()

    @property
    def url(self) -> str:
        return self._served.url

    def of(self, name: str) -> list[dict[str, Any]]:
        """What reached the upstream for one model."""
        return [body for body in self.bodies if body.get("model") == name]


async def _pace(turn: Turn, event: bytes) -> None:
    """A long answer takes long enough for its beginning to be judged before its end."""
    if turn.model.startswith("long"):
        await asyncio.sleep(0.02)


async def _say(send: Any, pieces: list[bytes]) -> None:
    """A stream of these bytes, which breaks off before an empty one."""
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for piece in pieces:
        if not piece:
            raise ConnectionResetError
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _chunk(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> bytes:
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    value = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def _stream(*pieces: bytes) -> list[bytes]:
    return [_chunk({"role": "assistant", "content": ""}), *pieces, _chunk({}, "stop"), b"data: [DONE]\n\n"]


#: model -> what a misbehaving upstream streams, in the shape of chat completions
RAW: Mapping[str, list[bytes]] = {
    "reasons": _stream(_chunk({"reasoning_content": BAD}), _chunk({"content": "Fine."})),
    "refuses": _stream(_chunk({"refusal": BAD})),
    "paints": _stream(_chunk({"content": "Here.", "images": [{"image_url": {"url": "data:image/png;base64,wire"}}]})),
    "invents": _stream(_chunk({"content": "Fine.", "x_new": BAD})),
    "separates": _stream(_chunk({"content": "First\u2028 pick a lock with\u2029 wire."})),
    "splits": _stream(*(_chunk({"content": letter}) for letter in BAD)),
    "resets": [_chunk({"role": "assistant", "content": ""}), _chunk({"content": "Half of the wire"}), b""],
    "floods": _stream(*(_chunk({"content": "A flood of words. " * 4000}) for _ in range(20)), _chunk({"content": BAD})),
    "interleaves": [
        *(_chunk({"role": "assistant", "content": ""}, index=index) for index in (0, 1)),
        *(_chunk({"content": f"{word} "}, index=i) for word in BAD.split() for i in (1,)),
        _chunk({"content": GOOD}, index=0),
        *(_chunk({}, "stop", index) for index in (0, 1)),
        b"data: [DONE]\n\n",
    ],
    "calling": _stream(
        _chunk(
            {"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}]}
        ),
        _chunk({"tool_calls": [{"index": 0, "function": {"arguments": json.dumps({"q": BAD})}}]}),
    ),
}


def _read(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body or b"{}")
    except ValueError:
        return {"raw": body.decode("latin-1")}
    return value if isinstance(value, dict) else {"raw": value}


def models(upstream: str) -> list[dict[str, Any]]:
    """``chat/NAME``, ``claude/NAME`` and ``text/NAME`` are the model NAME in the three shapes of an upstream."""
    shapes = {
        "chat/*": ("openai/*", f"{upstream}/v1"),
        "claude/*": ("anthropic/*", upstream),
        "text/*": ("text-completion-openai/*", f"{upstream}/v1"),
    }
    return [
        {"model_name": name, "litellm_params": {"model": model, "api_base": base, "api_key": "k"}}
        for name, (model, base) in shapes.items()
    ]


def guardrail(guard_config: Path, **params: Any) -> dict[str, Any]:
    return {
        "guardrail_name": "guard",
        "litellm_params": {
            "guardrail": "guard_integrations.litellm.GuardMiddlewareGuardrail",
            "mode": ["pre_call", "post_call"],
            "default_on": True,
            "guard_config": str(guard_config),
            **params,
        },
    }


class Proxy:
    """``litellm --config`` on a free port. ``log`` is the text of its output."""

    def __init__(self, folder: Path, upstream: str, guardrails: list[dict[str, Any]] | None, **sections: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._log = folder, folder / "proxy.log"
        (folder / "sink.py").write_text((HERE / "sink.py").read_text())
        self.records_path = folder / "litellm.jsonl"
        settings = {"num_retries": 0, "telemetry": False, "callbacks": ["sink.instance"]}
        settings |= sections.pop("litellm_settings", {})
        config: dict[str, Any] = {
            "model_list": models(upstream),
            "litellm_settings": settings,
            "general_settings": {"master_key": KEY, **sections.pop("general_settings", {})},
            **sections,
        }
        if guardrails is not None:
            config["guardrails"] = guardrails
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        self.environment: dict[str, str] = {}

    def start(self, port: int | None = None) -> Self:
        self.port = port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        environment = {
            **environments.variables(),
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'integrations'}",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "SINK": str(self.records_path),
            **self.environment,
        }
        for name in ("DATABASE_URL", "PYTHONDONTWRITEBYTECODE"):  # the latter makes each start compile all of LiteLLM
            environment.pop(name, None)
        argv = [str(python().with_name("litellm")), "--config", "config.yaml", "--host", "127.0.0.1"]
        with self._log.open("ab") as output:
            self.popen = subprocess.Popen(
                [*argv, "--port", str(self.port), "--num_workers", "1"],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def wait(self) -> Self:
        eventually(lambda: self.alive() or self.popen.poll() is not None, seconds=STARTING)
        assert self.popen.poll() is None, self.log[-4000:]
        return self

    def alive(self) -> bool:
        time.sleep(0.1)
        try:
            return httpx.get(f"{self.url}/health/liveliness", trust_env=False, timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def __enter__(self) -> Self:
        return self.start().wait()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGTERM)
            try:
                self.popen.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.popen.pid, signal.SIGKILL)
                self.popen.wait()

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def post(self, path: str, body: Any, *, key: str = KEY, **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}", **options.pop("headers", {})}
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=60, trust_env=False, **options)

    def get(self, path: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {KEY}"}
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=60, trust_env=False)

    def records(self) -> list[dict[str, Any]]:
        """LiteLLM's own logging records so far."""
        text = self.records_path.read_text() if self.records_path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
