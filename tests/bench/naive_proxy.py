"""What one would write first: Starlette, httpx, and one HTTP request to the guard per prompt and per answer.

It parses leniently, reads plain text only, holds each answer until its verdict, and keeps no record: less work than
the gateway does, over the same worker. ``overhead.py`` starts it, for scale.

    python tests/bench/naive_proxy.py --upstream http://127.0.0.1:9000 --worker /tmp/guard.sock
"""

from __future__ import annotations

import argparse
import socket
import uuid
from typing import Any

import httpx
import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from guard_middleware.types import Conversation, Message, Source, Text, Verdict
from guard_middleware.wire import CONTENT_TYPE, ModerationRequest, decode_answer, encode_request


class NaiveProxy:
    def __init__(self, upstream: str, worker: str) -> None:
        self._upstream = httpx.AsyncClient(base_url=upstream)
        self._guard = httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=worker), base_url="http://worker")
        self.app = Starlette(routes=[Route("/v1/chat/completions", self._chat, methods=["POST"])])

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        asked = tuple(Message(m["role"], (Text(m["content"]),)) for m in body["messages"])
        if await self._harmful("input", asked, None):
            return Response(b'{"error": {"code": "content_filter"}}', 400, media_type="application/json")
        answer = await self._upstream.post("/v1/chat/completions", json=body)
        said = _streamed(answer.content) if body.get("stream") else answer.json()["choices"][0]["message"]["content"]
        if await self._harmful("output", asked, Message("assistant", (Text(said),))):
            return Response(b'{"error": {"code": "content_filter"}}', 400, media_type="application/json")
        return Response(answer.content, answer.status_code, media_type=answer.headers["content-type"])

    async def _harmful(self, source: Source, asked: tuple[Message, ...], answer: Message | None) -> bool:
        question = ModerationRequest(uuid.uuid4().hex, Conversation(asked, answer=answer), source, 10.0)
        response = await self._guard.post(
            "/v1/moderate", content=encode_request(question), headers={"content-type": CONTENT_TYPE}
        )
        _, outcome = decode_answer(response.content)
        assert isinstance(outcome, Verdict)
        return outcome.label(source) == "harmful"


def _streamed(body: bytes) -> str:
    words = []
    for line in body.splitlines():
        if line.startswith(b"data: {"):
            chunk: Any = orjson.loads(line[6:])
            words += [choice["delta"].get("content") or "" for choice in chunk["choices"]]
    return "".join(words)


def serve(app: Starlette) -> None:
    """Serves ``app`` on a free port of loopback, set up like the gateway, and prints ``ready URL``."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http="httptools", loop="uvloop", lifespan="off", access_log=False, log_level="warning")
    print(f"ready http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(config).run(sockets=[listener])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--worker", required=True, help="the worker's Unix socket")
    options = parser.parse_args()
    serve(NaiveProxy(options.upstream, options.worker).app)


if __name__ == "__main__":
    main()
