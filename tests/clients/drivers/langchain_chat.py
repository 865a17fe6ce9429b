"""LangChain's ChatOpenAI (both of its APIs) and ChatAnthropic."""

from __future__ import annotations

import os
from typing import Any

from driving import Job, Seen, main
from langchain_anthropic import ChatAnthropic
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Weather(BaseModel):
    """The weather of a city."""

    city: str


def chat(job: Job) -> Any:
    return ChatOpenAI(model=job.model, api_key="sk-test", base_url=f"{job.url}/v1", default_headers=job.headers)


def responses(job: Job) -> Any:
    return ChatOpenAI(
        model=job.model,
        api_key="sk-test",
        base_url=f"{job.url}/v1",
        default_headers=job.headers,
        use_responses_api=True,
    )


def messages(job: Job) -> Any:
    return ChatAnthropic(
        model=job.model, api_key="sk-test", base_url=job.url, default_headers=job.headers, max_tokens=512
    )


def message(answer: Any, seen: Seen) -> None:
    seen.say(answer.text)
    known = answer.response_metadata
    details = known.get("incomplete_details") or {}
    reason = known.get("finish_reason") or known.get("stop_reason") or known.get("status")
    seen.end(f"{reason}: {details['reason']}" if details else reason)
    seen.mark("moderation", known.get("moderation") or answer.additional_kwargs.get("moderation"))


def call(kind: Any, how: str) -> Any:
    def invoke(job: Job, seen: Seen) -> None:
        message(kind(job).invoke(job.prompt), seen)

    def stream(job: Job, seen: Seen) -> None:
        for part in kind(job).stream(job.prompt):
            message(part, seen)

    def structured(job: Job, seen: Seen) -> None:
        found = kind(job).with_structured_output(Weather, method="json_schema", include_raw=True).invoke(job.prompt)
        message(found["raw"], seen)

    async def ainvoke(job: Job, seen: Seen) -> None:
        message(await kind(job).ainvoke(job.prompt), seen)

    async def astream(job: Job, seen: Seen) -> None:
        async for part in kind(job).astream(job.prompt):
            message(part, seen)

    return locals()[how]


if __name__ == "__main__":
    os.environ["LANGSMITH_TRACING"] = "false"
    kinds = {"ChatOpenAI": chat, "ChatOpenAI(use_responses_api)": responses, "ChatAnthropic": messages}
    hows = ("invoke", "stream", "structured", "ainvoke", "astream")
    main({f"{name}.{how}": call(kind, how) for name, kind in kinds.items() for how in hows})
