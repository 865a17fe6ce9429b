"""LiteLLM's SDK, for every API that it speaks."""

from __future__ import annotations

import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it is fetched at import

import litellm
from driving import Job, Seen, main

litellm.suppress_debug_info = True


def _common(job: Job, provider: str, path: str = "/v1") -> dict[str, Any]:
    return {
        "model": f"{provider}/{job.model}",
        "api_base": f"{job.url}{path}",
        "api_key": "sk-test",
        "extra_headers": job.headers,
    }


def _said(job: Job) -> list[dict[str, str]]:
    return [{"role": "user", "content": job.prompt}]


def chat(job: Job) -> dict[str, Any]:
    return {**_common(job, "openai"), "messages": _said(job)}


def anthropic(job: Job) -> dict[str, Any]:
    return {**_common(job, "anthropic", ""), "messages": _said(job), "max_tokens": 512}


def text(job: Job) -> dict[str, Any]:
    return {**_common(job, "text-completion-openai"), "prompt": job.prompt}


def responses(job: Job) -> dict[str, Any]:
    # Of a model that it does not know LiteLLM asks for a whole answer, and plays a stream of it.
    known = {"litellm_provider": "openai", "mode": "responses", "supports_native_streaming": True}
    litellm.register_model({f"openai/{job.model}": known})
    return {**_common(job, "openai"), "input": job.prompt}


def completion(answer: Any, seen: Seen) -> None:
    for choice in answer.choices:
        inner = getattr(choice, "delta", None) or getattr(choice, "message", None)
        seen.say(inner.content if inner is not None else choice.text)
        seen.end(choice.finish_reason)
    seen.mark("moderation", getattr(answer, "moderation", None))
    seen.mark("x_guard", getattr(answer, "x_guard", None))


def response(answer: Any, seen: Seen) -> None:
    if not seen.text:
        seen.say(answer.output_text)
    details = answer.incomplete_details
    reason = details.get("reason") if isinstance(details, dict) else getattr(details, "reason", None)
    seen.end(answer.status if reason is None else f"{answer.status}: {reason}")
    seen.mark("moderation", getattr(answer, "moderation", None))


def response_event(event: Any, seen: Seen) -> None:
    if event.type == "response.output_text.delta":
        seen.say(event.delta)
    elif event.type in ("response.completed", "response.incomplete", "response.failed"):
        response(event.response, seen)


def _streamed(function: Any, arguments: Any, reader: Any) -> Any:
    def call(job: Job, seen: Seen) -> None:
        for part in function(**arguments(job), stream=True):
            reader(part, seen)

    return call


def _later(function: Any, arguments: Any, reader: Any) -> Any:
    async def call(job: Job, seen: Seen) -> None:
        reader(await function(**arguments(job)), seen)

    return call


def _later_streamed(function: Any, arguments: Any, reader: Any) -> Any:
    async def call(job: Job, seen: Seen) -> None:
        async for part in await function(**arguments(job), stream=True):
            reader(part, seen)

    return call


def message(answer: Any, seen: Seen) -> None:
    seen.say("".join(block["text"] for block in answer["content"] if block["type"] == "text"))
    seen.end(answer["stop_reason"])
    seen.mark("x_guard", answer.get("x_guard"))


async def native_messages(job: Job, seen: Seen) -> None:
    message(await litellm.anthropic.messages.acreate(**anthropic(job)), seen)


async def native_messages_stream(job: Job, seen: Seen) -> None:
    """This call hands on the bytes of the stream as they are; the caller reads events."""
    import json

    buffer = b""
    async for piece in await litellm.anthropic.messages.acreate(**anthropic(job), stream=True):
        buffer += piece
        while b"\n\n" in buffer:
            event, _, buffer = buffer.partition(b"\n\n")
            data = next((line[5:] for line in event.split(b"\n") if line.startswith(b"data:")), None)
            if data is None:
                continue
            body = json.loads(data)
            if body["type"] == "content_block_delta":
                seen.say(body["delta"].get("text"))
            elif body["type"] == "message_delta":
                seen.end(body["delta"]["stop_reason"])
                seen.mark("x_guard", body.get("x_guard"))


def family(name: str, function: str, arguments: Any, one: Any, part: Any) -> dict[str, Any]:
    """The four ways of one API."""
    sync, later = getattr(litellm, function), getattr(litellm, f"a{function}")
    return {
        name: lambda job, seen: one(sync(**arguments(job)), seen),
        f"{name} stream": _streamed(sync, arguments, part),
        f"async {name}": _later(later, arguments, one),
        f"async {name} stream": _later_streamed(later, arguments, part),
    }


if __name__ == "__main__":
    main(
        {
            **family("completion(openai/)", "completion", chat, completion, completion),
            **family("completion(anthropic/)", "completion", anthropic, completion, completion),
            **family("text_completion()", "text_completion", text, completion, completion),
            **family("responses()", "responses", responses, response, response_event),
            "anthropic.messages.acreate": native_messages,
            "anthropic.messages.acreate stream": native_messages_stream,
        }
    )
