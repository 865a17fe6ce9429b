"""A FastAPI application that serves the chat API itself, guarded by one line.

    uvicorn app:app --port 8000

Replace ``answer`` by your model. Every other route of this application is refused, except those that ``unguarded``
names.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import BackgroundTasks, FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from guard_middleware.config import load
from guard_middleware.middleware import GuardMiddleware

COUNTED: dict[str, int] = {}


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """The guard's worker is ready before this begins, and ends after it."""
    COUNTED.clear()
    yield


app = FastAPI(lifespan=lifespan)
# Loaded here, so that a broken file stops the import, and with it the server.
app.add_middleware(GuardMiddleware, config=load(os.environ.get("GUARD_CONFIG", "guard.yaml")), unguarded=["/health"])


class Message(BaseModel):
    role: str
    content: Any


class Request(BaseModel):
    model: str
    messages: list[Message]
    stream: bool = False


async def answer(messages: list[Message]) -> AsyncIterator[str]:
    """The model of this example: it says again what it was told."""
    for word in f"You said: {messages[-1].content}".split(" "):
        yield f"{word} "


@app.post("/v1/chat/completions")
async def chat(request: Request, later: BackgroundTasks) -> Any:
    later.add_task(count, request.model)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}
    if request.stream:
        return StreamingResponse(events(head, request), media_type="text/event-stream")
    said = "".join([piece async for piece in answer(request.messages)])
    choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
    return {**head, "object": "chat.completion", "choices": [choice]}


async def events(head: dict[str, Any], request: Request) -> AsyncIterator[str]:
    async for piece in answer(request.messages):
        yield event(head, {"role": "assistant", "content": piece})
    yield event(head, {}, "stop") + "data: [DONE]\n\n"


def event(head: dict[str, Any], delta: dict[str, str], finish: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"


def count(model: str) -> None:
    COUNTED[model] = COUNTED.get(model, 0) + 1


@app.get("/health")
def health() -> dict[str, Any]:
    return {"status": "ok", "answered": COUNTED}
