"""A streamed answer from end to end in one process: an upstream that speaks slowly, and a client by hand.

upstream = Speaker(["Bread ", "needs ", "an hour."], pause=0.02)
client = Client(chat(stream=True))
await client.run(GuardMiddleware(upstream, runtime=runtime))
client.text()
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from guard_middleware.types import Text

CHAT = "/v1/chat/completions"


def chat(text: str = "how do I bake bread?", **extra: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], "stream": True, **extra}


def chunk(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> bytes:
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"


def opening(index: int = 0) -> bytes:
    return chunk({"role": "assistant", "content": ""}, index=index)


def says(*texts: str, index: int = 0) -> list[bytes]:
    return [chunk({"content": text}, index=index) for text in texts]


DONE = b"data: [DONE]\n\n"
ENDING = chunk({}, "stop") + DONE


class Speaker:
    """An ASGI application that streams an answer, piece by piece.

    ``pieces`` are texts, or a function that makes the pieces (as bytes) from the request's body. ``first`` and
    ``pause`` are the seconds before the first piece and between two.
    """

    def __init__(
        self,
        pieces: Iterable[str] | Callable[[Any], AsyncIterator[bytes] | Iterable[bytes]],
        *,
        first: float = 0.0,
        pause: float = 0.0,
    ) -> None:
        self._pieces: Any = pieces if callable(pieces) else list(pieces)
        self._first, self._pause = first, pause
        self.bodies: list[Any] = []
        #: bytes that the other side took, and how many calls were broken off
        self.taken = self.cancelled = 0
        #: (seconds on the clock, bytes) of each piece, of the last call
        self.times: list[float] = []
        self.began = self.ended = 0.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"])
        self.bodies.append(body)
        self.began, self.times = time.perf_counter(), []
        kind = b"text/event-stream" if body.get("stream") else b"application/json"
        try:
            await asyncio.sleep(self._first)
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
            pieces = self._pieces(body) if callable(self._pieces) else [opening(), *says(*self._pieces), ENDING]
            async for piece in _paced(pieces, self._pause):
                self.times.append(time.perf_counter())
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                self.taken += len(piece)
            self.ended = time.perf_counter()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


async def _paced(pieces: AsyncIterator[bytes] | Iterable[bytes], pause: float) -> AsyncIterator[bytes]:
    """Each piece when it is due: what one costs is no pause for the next."""
    due = time.perf_counter()
    if isinstance(pieces, AsyncIterator):
        async for piece in pieces:
            yield piece
        return
    for piece in pieces:
        yield piece
        due += pause
        await asyncio.sleep(max(0.0, due - time.perf_counter()))


class Client:
    """One request by hand; keeps when each piece came. ``reads`` is awaited before a piece is taken."""

    def __init__(self, body: Any, path: str = CHAT, reads: Callable[[], Any] | None = None) -> None:
        self._body, self._path, self._reads = json.dumps(body).encode(), path, reads
        self.gone = asyncio.Event()
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.pieces: list[tuple[float, bytes]] = []
        self.began = self.ended = 0.0
        self.complete = False
        self._changed = asyncio.Event()

    async def run(self, app: Any) -> Client:
        pending = [{"type": "http.request", "body": self._body, "more_body": False}]

        async def receive() -> Any:
            if pending:
                return pending.pop()
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.status, self.headers = message["status"], dict(message["headers"])
            else:
                if self._reads is not None:
                    await self._reads()
                if message.get("body"):
                    self.pieces.append((time.perf_counter(), message["body"]))
                self.complete = not message.get("more_body", False)
            self._changed.set()

        scope = {
            "type": "http", "method": "POST", "path": self._path, "raw_path": self._path.encode(),
            "query_string": b"", "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2), "scheme": "http", "http_version": "1.1", "root_path": "",
            "asgi": {"version": "3.0"},
        }  # fmt: skip
        self.began = time.perf_counter()
        try:
            await app(scope, receive, send)
        finally:
            self.ended = time.perf_counter()
            self._changed.set()
        return self

    async def until(self, seen: Callable[[Client], bool]) -> None:
        """Waits for what it shows, with patience."""
        async with asyncio.timeout(10):
            while not seen(self):
                self._changed.clear()
                await self._changed.wait()

    @property
    def data(self) -> bytes:
        return b"".join(data for _, data in self.pieces)

    def chunks(self, data: bytes | None = None) -> list[Any]:
        lines = (self.data if data is None else data).split(b"\n")
        return [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]

    def text(self, choice: int = 0, field: str = "content", data: bytes | None = None) -> str:
        """What one choice said."""
        return "".join(
            found["delta"].get(field) or ""
            for value in self.chunks(data)
            for found in value.get("choices", ())
            if found["index"] == choice
        )

    def finish_reason(self, choice: int = 0) -> str | None:
        found = [
            c["finish_reason"] for value in self.chunks() for c in value.get("choices", ()) if c["index"] == choice
        ]
        (reason,) = {reason for reason in found if reason} or {None}
        return reason

    @property
    def error(self) -> Any:
        """The error inside the stream, or the one in its place."""
        found = [value["error"] for value in self.chunks() if "error" in value] if self.status == 200 else []
        return (found or [json.loads(self.data)["error"]])[0] if found or self.status != 200 else None

    def first_text(self) -> float:
        """When the first text came, on the clock."""
        return next(at for at, data in self.pieces if self.text(data=data))


def characters(message: Any) -> int:
    """The text of an answer that the guard was asked about."""
    return sum(len(part.text) for part in message.parts if isinstance(part, Text))
