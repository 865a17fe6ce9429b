"""Every way to ask with the openai SDK."""

from __future__ import annotations

from functools import cache
from typing import Any

import openai
from driving import Job, Seen, main
from pydantic import BaseModel


class Weather(BaseModel):
    city: str


@cache
def _client(kind: Any, url: str, headers: tuple[tuple[str, str], ...]) -> Any:
    return kind(api_key="sk-test", base_url=f"{url}/v1", default_headers=dict(headers))


def sync(job: Job) -> openai.OpenAI:
    return _client(openai.OpenAI, job.url, tuple(job.headers.items()))


def later(job: Job) -> openai.AsyncOpenAI:
    return _client(openai.AsyncOpenAI, job.url, tuple(job.headers.items()))


def chat(job: Job) -> Any:
    return {"model": job.model, "messages": [{"role": "user", "content": job.prompt}]}


def text(job: Job) -> Any:
    return {"model": job.model, "prompt": job.prompt}


def ask(job: Job) -> Any:
    return {"model": job.model, "input": job.prompt}


def _annotated(answer: Any, seen: Seen) -> None:
    """``moderation`` counts only where the SDK has it as its own type, or as what it lets through."""
    moderation = getattr(answer, "moderation", None)
    if moderation is None:
        return
    side = moderation["output"] if isinstance(moderation, dict) else moderation.output
    results = (side.get("results") or [side]) if isinstance(side, dict) else getattr(side, "results", [side])
    first = results[0]
    flagged = first["flagged"] if isinstance(first, dict) else first.flagged
    seen.mark("moderation" if isinstance(moderation, BaseModel) else "moderation (untyped)", flagged is True)


# -- chat completions --


def completion(answer: Any, seen: Seen) -> None:
    (choice,) = answer.choices
    seen.say(choice.message.content)
    seen.end(choice.finish_reason)
    _annotated(answer, seen)


def chunk(part: Any, seen: Seen) -> None:
    for choice in part.choices:
        seen.say(choice.delta.content)
        seen.end(choice.finish_reason)
    _annotated(part, seen)


def chat_stream(job: Job, seen: Seen) -> None:
    for part in sync(job).chat.completions.create(**chat(job), stream=True):
        chunk(part, seen)


def chat_helper(job: Job, seen: Seen) -> None:
    with sync(job).chat.completions.stream(**chat(job)) as events:
        for event in events:
            if event.type == "content.delta":
                seen.say(event.delta)
        final = events.get_final_completion()
    seen.end(final.choices[0].finish_reason)
    _annotated(final, seen)


async def chat_create_later(job: Job, seen: Seen) -> None:
    completion(await later(job).chat.completions.create(**chat(job)), seen)


async def chat_stream_later(job: Job, seen: Seen) -> None:
    async for part in await later(job).chat.completions.create(**chat(job), stream=True):
        chunk(part, seen)


async def chat_helper_later(job: Job, seen: Seen) -> None:
    async with later(job).chat.completions.stream(**chat(job)) as events:
        async for event in events:
            if event.type == "content.delta":
                seen.say(event.delta)
        final = await events.get_final_completion()
    seen.end(final.choices[0].finish_reason)
    _annotated(final, seen)


async def chat_parse_later(job: Job, seen: Seen) -> None:
    completion(await later(job).chat.completions.parse(**chat(job), response_format=Weather), seen)


# -- responses --


def response(answer: Any, seen: Seen) -> None:
    if not seen.text:
        seen.say(answer.output_text)
    details = answer.incomplete_details
    seen.end(answer.status if details is None else f"{answer.status}: {details.reason}")
    _annotated(answer, seen)


def response_event(event: Any, seen: Seen) -> None:
    if event.type == "response.output_text.delta":
        seen.say(event.delta)
    elif event.type in ("response.completed", "response.incomplete", "response.failed"):
        response(event.response, seen)


def responses_stream(job: Job, seen: Seen) -> None:
    for event in sync(job).responses.create(**ask(job), stream=True):
        response_event(event, seen)


def responses_helper(job: Job, seen: Seen) -> None:
    with sync(job).responses.stream(**ask(job)) as events:
        for event in events:
            response_event(event, seen)
        response(events.get_final_response(), seen)


async def responses_create_later(job: Job, seen: Seen) -> None:
    response(await later(job).responses.create(**ask(job)), seen)


async def responses_stream_later(job: Job, seen: Seen) -> None:
    async for event in await later(job).responses.create(**ask(job), stream=True):
        response_event(event, seen)


async def responses_helper_later(job: Job, seen: Seen) -> None:
    async with later(job).responses.stream(**ask(job)) as events:
        async for event in events:
            response_event(event, seen)
        response(await events.get_final_response(), seen)


async def responses_parse_later(job: Job, seen: Seen) -> None:
    response(await later(job).responses.parse(**ask(job), text_format=Weather), seen)


# -- completions --


def written(answer: Any, seen: Seen) -> None:
    for choice in answer.choices:
        seen.say(choice.text)
        seen.end(choice.finish_reason)
    _annotated(answer, seen)


def completions_stream(job: Job, seen: Seen) -> None:
    for part in sync(job).completions.create(**text(job), stream=True):
        written(part, seen)


async def completions_create_later(job: Job, seen: Seen) -> None:
    written(await later(job).completions.create(**text(job)), seen)


async def completions_stream_later(job: Job, seen: Seen) -> None:
    async for part in await later(job).completions.create(**text(job), stream=True):
        written(part, seen)


if __name__ == "__main__":
    main(
        {
            "chat.create": lambda job, seen: completion(sync(job).chat.completions.create(**chat(job)), seen),
            "chat.create stream": chat_stream,
            "chat.stream()": chat_helper,
            "chat.parse()": lambda job, seen: completion(
                sync(job).chat.completions.parse(**chat(job), response_format=Weather), seen
            ),
            "async chat.create": chat_create_later,
            "async chat.create stream": chat_stream_later,
            "async chat.stream()": chat_helper_later,
            "async chat.parse()": chat_parse_later,
            "responses.create": lambda job, seen: response(sync(job).responses.create(**ask(job)), seen),
            "responses.create stream": responses_stream,
            "responses.stream()": responses_helper,
            "responses.parse()": lambda job, seen: response(
                sync(job).responses.parse(**ask(job), text_format=Weather), seen
            ),
            "async responses.create": responses_create_later,
            "async responses.create stream": responses_stream_later,
            "async responses.stream()": responses_helper_later,
            "async responses.parse()": responses_parse_later,
            "completions.create": lambda job, seen: written(sync(job).completions.create(**text(job)), seen),
            "completions.create stream": completions_stream,
            "async completions.create": completions_create_later,
            "async completions.create stream": completions_stream_later,
        }
    )
