"""Real processes for tests: the gateway's command, a worker, and an upstream that misbehaves on request.

    with Upstream() as upstream, scripted_worker(folder) as socket, Gateway(folder, upstream.url, socket) as gateway:
        response = httpx.post(f"{gateway.url}/v1/chat/completions", json=chat(model="good"))
        record = gateway.record(response)

The upstream chooses what to do by the model's name up to its first dot, so that ``reset.17`` is its own in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx

CHAT = "/v1/chat/completions"
GOOD = "Bread needs an hour."
BAD = "First, pick a lock with two bits of wire."
#: what a leak of ``BAD`` would show
LEAK = "wire"
PATIENCE = 20.0
_T = TypeVar("_T")
_REPOSITORY = Path(__file__).resolve().parents[2]
_UNIQUE = itertools.count()


#: every question reaches the guard: for tests that ask the same again after it broke
FORGETFUL = {"cache": {"verdicts": {"entries": 0}}}


def unique(model: str) -> str:
    """The model ``model`` under a name that no other request has."""
    return f"{model}.{next(_UNIQUE)}"


def chat(text: Any = "how do I bake bread?", model: str = "good", **extra: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **extra}


def eventually(probe: Callable[[], _T], *, seconds: float = PATIENCE) -> _T:
    """The first true value of ``probe``, which is asked again and again."""
    end = time.monotonic() + seconds
    while not (value := probe()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:g} s: {value!r}")
        time.sleep(0.01)
    return value


# -- the upstream --


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as it arrived at the upstream."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]

    @property
    def json(self) -> Any:
        return json.loads(self.body) if self.body else {}

    @property
    def model(self) -> str:
        return str(self.json.get("model", ""))


Behaviour = Callable[[Seen, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Upstream:
    """A server of raw bytes in a thread of its own; ``seen`` is everything that reached it."""

    def __init__(self, behaviours: Mapping[str, Behaviour] | None = None) -> None:
        self.behaviours: dict[str, Behaviour] = {**BEHAVIOURS, **(behaviours or {})}
        self.seen: list[Seen] = []
        #: models whose connection the other side closed before the answer's end
        self.abandoned: list[str] = []
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="upstream", daemon=True)
        self._listening = threading.Event()
        self._stop = asyncio.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._listening.wait(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)
        self._loop.close()

    def of(self, model: str) -> list[Seen]:
        """What reached the upstream for one model."""
        return [seen for seen in self.seen if seen.model == model]

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        tasks: set[asyncio.Task[None]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                await self._connection(reader, writer)
            finally:
                tasks.discard(task)
                writer.close()

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._listening.set()
        await self._stop.wait()
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, target, _ = head[0].split(" ")
                pairs = [line.split(":", 1) for line in head[1:] if line]
                headers = tuple((name.lower(), value.strip()) for name, value in pairs)
                length = next((int(value) for name, value in headers if name == "content-length"), 0)
                seen = Seen(method, target, headers, await reader.readexactly(length))
                self.seen.append(seen)
                behaviour = self.behaviours[seen.model.partition(".")[0]] if seen.body else models
                answering = asyncio.ensure_future(behaviour(seen, reader, writer))
                try:
                    await answering
                except ConnectionError:
                    self.abandoned.append(seen.model)
                    return
                if writer.is_closing():
                    return


def head(kind: str = "application/json", status: str = "200 OK", *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", f"content-type: {kind}", *headers, "", ""]).encode()


def whole(value: Any, status: str = "200 OK", kind: str = "application/json", *headers: str) -> bytes:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return head(kind, status, f"content-length: {len(body)}", *headers) + body


def chunked(*pieces: bytes, end: bool = True) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + (b"0\r\n\r\n" if end else b"")


def stream_head() -> bytes:
    return head("text/event-stream", "200 OK", "transfer-encoding: chunked")


def completion(seen: Seen, *messages: Mapping[str, Any], finish: str = "stop") -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": seen.model,
        "choices": [
            {"index": index, "message": {"role": "assistant", **message}, "finish_reason": finish}
            for index, message in enumerate(messages)
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }


def chunk(seen: Seen, delta: Mapping[str, Any], finish: str | None = None, index: int = 0) -> bytes:
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    body = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": seen.model}
    return event({**body, "choices": [choice]})


def event(value: Any) -> bytes:
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()


def says(*texts: str) -> Behaviour:
    """Answers with these texts, one per choice that was asked for, streamed where that was asked for."""

    async def behaviour(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = [texts[index % len(texts)] for index in range(seen.json.get("n") or 1)]
        if not seen.json.get("stream"):
            writer.write(whole(completion(seen, *({"content": text} for text in said))))
        else:
            pieces = [chunk(seen, {"role": "assistant", "content": ""}, index=i) for i in range(len(said))]
            pieces += [chunk(seen, {"content": f"{word} "}, index=i) for i, t in enumerate(said) for word in t.split()]
            pieces += [chunk(seen, {}, "stop", index=i) for i in range(len(said))]
            if (seen.json.get("stream_options") or {}).get("include_usage"):
                pieces.append(event({**completion(seen), "object": "chat.completion.chunk"}))
            writer.write(stream_head() + chunked(*pieces, event("[DONE]")))
        await writer.drain()

    return behaviour


async def models(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    listed = [{"id": "good", "object": "model", "created": 0, "owned_by": "test"}]
    writer.write(whole({"object": "list", "data": listed}))
    await writer.drain()


BEHAVIOURS: dict[str, Behaviour] = {"good": says(GOOD), "bad": says(BAD), "mixed": says(GOOD, BAD)}


# -- processes --


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {
        **kept,
        "PYTHONPATH": str(_REPOSITORY),
        "PYTHONWARNINGS": "default::ResourceWarning,default::RuntimeWarning",
    }


class Process:
    """A command whose standard output tells when it is ready; its standard error must hold no complaint."""

    def __init__(self, argv: list[str], folder: Path, ready: str) -> None:
        self.argv, self._ready = argv, ready
        self.stderr = folder / f"{next(_UNIQUE)}.stderr"
        self.lines: list[str] = []

    def start(self) -> str:
        """Returns the line that says ready."""
        return self.begin()()

    def begin(self) -> Callable[[], str]:
        """Starts the process; the result waits for the line that says ready."""
        with self.stderr.open("wb") as errors:
            self.popen = subprocess.Popen(
                self.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=_environment(), text=True
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self._wait_ready

    def _wait_ready(self) -> str:
        eventually(lambda: self.said(self._ready) or self.popen.poll() is not None)
        line = self.said(self._ready)
        assert line, f"{self.argv[:3]} did not start:\n{self.stderr.read_text()}"
        return line

    def said(self, start: str) -> str:
        """The last line of standard output that starts so, or an empty one."""
        return next((line for line in reversed(self.lines) if line.startswith(start)), "")

    def stop(self) -> None:
        self.popen.terminate()
        try:
            self.popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            raise
        finally:
            self._reader.join(PATIENCE)
            for pipe in (self.popen.stdin, self.popen.stdout):
                if pipe is not None:
                    pipe.close()
        complaints = [word for word in ("Traceback", "never", "Warning:") if word in self.stderr.read_text()]
        assert not complaints, self.stderr.read_text()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.append(line.rstrip("\n"))


@contextlib.contextmanager
def scripted_worker(path: Path, *options: str) -> Iterator[Process]:
    """``tests/support/scripted_worker.py`` on the Unix socket ``path``."""
    script = Path(__file__).with_name("scripted_worker.py")
    process = Process([sys.executable, str(script), "--socket", str(path), *options], path.parent, "worker ready")
    process.start()
    try:
        yield process
    finally:
        process.popen.send_signal(signal.SIGCONT)
        process.stop()


def command() -> list[str]:
    """``guard-gateway`` as it is installed."""
    return [str(Path(sys.executable).with_name("guard-gateway"))]


class Gateway(Process):
    """``guard-gateway serve`` in front of ``upstream``, with the worker that listens on ``worker``."""

    def __init__(
        self,
        folder: Path,
        upstream: str,
        worker: Path,
        config: Mapping[str, Any] | None = None,
        argv: list[str] | None = None,
    ) -> None:
        name = next(_UNIQUE)
        self.log, self.config = folder / f"{name}.jsonl", folder / f"{name}.yaml"
        settings = {
            "worker": {"socket": str(worker), "manage": False},
            "audit": {"path": str(self.log)},
            "cache": {"verdicts": {"entries": 0}},  # what fails is to be asked again, and again
            **(config or {}),
        }
        self.config.write_text(json.dumps(settings, indent=1))
        options = ["--config", str(self.config), "--upstream", upstream, "--port", "0"]
        super().__init__([*(argv or [*command(), "serve"]), *options], folder, "ready ")
        self.url = ""

    def __enter__(self) -> Self:
        self.url = self.start().removeprefix("ready ")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.stop()
        if kind is None:
            ids = [record["id"] for record in self.records()]
            assert len(ids) == len(set(ids)), "a request has two lines in the decision log"

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def post(self, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{CHAT}", json=body, timeout=PATIENCE, trust_env=False, **options)

    def raw(self, *pieces: bytes, shut: bool = False) -> bytes:
        """Everything that comes back on one connection for these bytes until the gateway closes it."""
        with socket.create_connection(self.address, timeout=PATIENCE) as connection:
            for piece in pieces:
                connection.sendall(piece)
            if shut:
                connection.shutdown(socket.SHUT_WR)
            answer = b""
            with contextlib.suppress(ConnectionError):
                while data := connection.recv(65536):
                    answer += data
            return answer

    def records(self, **facts: Any) -> list[dict[str, Any]]:
        """The decisions of the log that say so."""
        lines = self.lines_of("decision")
        return [line for line in lines if all(line[name] == value for name, value in facts.items())]

    def lines_of(self, schema: str) -> list[dict[str, Any]]:
        """The log's lines of one kind: ``decision``, ``weights`` or ``shadow``."""
        text = self.log.read_text() if self.log.exists() else ""
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [line for line in lines if line["schema"].startswith(f"guard_middleware.{schema}/")]

    def record(self, response: httpx.Response | None = None, **facts: Any) -> dict[str, Any]:
        """The one line of a request, by its answer or by what else is known of it."""
        if response is not None:
            # The header names the request or one of its decisions (<request>.input, <request>.output.0).
            facts["id"] = response.headers["x-guard-decision-id"].partition(".")[0]
        (found,) = eventually(lambda: self.records(**facts))
        return found
