"""Every way to ask with the anthropic SDK."""

from __future__ import annotations

from functools import cache
from typing import Any

import anthropic
from anthropic import beta_async_tool, beta_tool
from driving import Job, Seen, main
from pydantic import BaseModel


class Weather(BaseModel):
    city: str


def tool(seen: Seen, make: Any = beta_tool) -> Any:
    """A tool that leaves a mark when it runs."""

    def look_up(query: str) -> str:
        seen.mark("the tool ran", query)
        return f"Nothing on {query}."

    async def look_up_later(query: str) -> str:
        return look_up(query)

    run = look_up if make is beta_tool else look_up_later
    return make(run, name="look_up", description="Looks something up.")


@cache
def _client(kind: Any, url: str, headers: tuple[tuple[str, str], ...]) -> Any:
    return kind(api_key="sk-test", base_url=url, default_headers=dict(headers))


def sync(job: Job) -> anthropic.Anthropic:
    return _client(anthropic.Anthropic, job.url, tuple(job.headers.items()))


def later(job: Job) -> anthropic.AsyncAnthropic:
    return _client(anthropic.AsyncAnthropic, job.url, tuple(job.headers.items()))


def ask(job: Job) -> Any:
    return {"model": job.model, "max_tokens": 512, "messages": [{"role": "user", "content": job.prompt}]}


def message(answer: Any, seen: Seen) -> None:
    if not seen.text:
        seen.say("".join(block.text for block in answer.content if block.type == "text"))
    seen.end(answer.stop_reason)
    seen.mark("x_guard", getattr(answer, "x_guard", None))


def event(part: Any, seen: Seen) -> None:
    if part.type == "content_block_delta" and part.delta.type == "text_delta":
        seen.say(part.delta.text)
    elif part.type == "message_delta":
        seen.end(part.delta.stop_reason)
        seen.mark("x_guard", getattr(part, "x_guard", None))


def create(job: Job, seen: Seen) -> None:
    raw = sync(job).messages.with_raw_response.create(**ask(job))
    seen.mark("header", raw.headers.get("x-guard-action") == "annotate")
    message(raw.parse(), seen)


def stream(job: Job, seen: Seen) -> None:
    events = sync(job).messages.create(**ask(job), stream=True)
    seen.mark("header", events.response.headers.get("x-guard-action") == "annotate")
    for part in events:
        event(part, seen)


def helper(job: Job, seen: Seen) -> None:
    with sync(job).messages.stream(**ask(job)) as events:
        seen.mark("header", events.response.headers.get("x-guard-action") == "annotate")
        for part in events:
            event(part, seen)
        message(events.get_final_message(), seen)


def tool_runner(job: Job, seen: Seen) -> None:
    message(sync(job).beta.messages.tool_runner(**ask(job), tools=[tool(seen)]).until_done(), seen)


def tool_runner_stream(job: Job, seen: Seen) -> None:
    for events in sync(job).beta.messages.tool_runner(**ask(job), tools=[tool(seen)], stream=True):
        for part in events:
            event(part, seen)


async def create_later(job: Job, seen: Seen) -> None:
    raw = await later(job).messages.with_raw_response.create(**ask(job))
    seen.mark("header", raw.headers.get("x-guard-action") == "annotate")
    message(await raw.parse(), seen)


async def stream_later(job: Job, seen: Seen) -> None:
    events = await later(job).messages.create(**ask(job), stream=True)
    seen.mark("header", events.response.headers.get("x-guard-action") == "annotate")
    async for part in events:
        event(part, seen)


async def helper_later(job: Job, seen: Seen) -> None:
    async with later(job).messages.stream(**ask(job)) as events:
        seen.mark("header", events.response.headers.get("x-guard-action") == "annotate")
        async for part in events:
            event(part, seen)
        message(await events.get_final_message(), seen)


async def parse_later(job: Job, seen: Seen) -> None:
    message(await later(job).messages.parse(**ask(job), output_format=Weather), seen)


async def tool_runner_later(job: Job, seen: Seen) -> None:
    message(
        await later(job).beta.messages.tool_runner(**ask(job), tools=[tool(seen, beta_async_tool)]).until_done(), seen
    )


async def tool_runner_stream_later(job: Job, seen: Seen) -> None:
    async for events in later(job).beta.messages.tool_runner(
        **ask(job), tools=[tool(seen, beta_async_tool)], stream=True
    ):
        async for part in events:
            event(part, seen)


if __name__ == "__main__":
    main(
        {
            "messages.create": create,
            "messages.create stream": stream,
            "messages.stream()": helper,
            "messages.parse()": lambda job, seen: message(
                sync(job).messages.parse(**ask(job), output_format=Weather), seen
            ),
            "tool_runner()": tool_runner,
            "tool_runner() stream": tool_runner_stream,
            "async messages.create": create_later,
            "async messages.create stream": stream_later,
            "async messages.stream()": helper_later,
            "async messages.parse()": parse_later,
            "async tool_runner()": tool_runner_later,
            "async tool_runner() stream": tool_runner_stream_later,
        }
    )
