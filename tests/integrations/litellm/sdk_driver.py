"""Calls LiteLLM's SDK as an application does, in LiteLLM's environment: jobs in on standard input, results out.

The names were imported and the Router was made before the guard is installed, as in an application that gets it late.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it is fetched at import

import litellm
from litellm import Router, acompletion, completion

litellm.suppress_debug_info = True
SYNC, ASYNC = completion, acompletion


class Job:
    """One call: of the model ``name`` with ``prompt``."""

    def __init__(self, url: str, name: str, prompt: str) -> None:
        self.url, self.name, self.prompt = url, name, prompt
        self.said = [{"role": "user", "content": prompt}]

    def at(self, provider: str, path: str = "/v1") -> dict[str, Any]:
        return {"model": f"{provider}/{self.name}", "api_base": f"{self.url}{path}", "api_key": "k"}

    def positional(self, provider: str, said: Any) -> tuple[list[Any], dict[str, Any]]:
        named = self.at(provider)
        return [named.pop("model"), said], named

    def chat(self) -> dict[str, Any]:
        return {**self.at("openai"), "messages": self.said}

    def text(self) -> dict[str, Any]:
        return {**self.at("text-completion-openai"), "prompt": self.prompt}

    def response(self, *, native: bool = True) -> dict[str, Any]:
        named = {**self.at("openai"), "input": self.prompt}
        if native:  # of a model that it does not know LiteLLM asks for a whole answer, and plays a stream of it
            known = {"litellm_provider": "openai", "mode": "responses", "supports_native_streaming": True}
            litellm.register_model({named["model"]: known})
        return named

    def message(self) -> dict[str, Any]:
        return {**self.at("anthropic", ""), "messages": self.said, "max_tokens": 512}

    def bridged(self, **more: Any) -> dict[str, Any]:
        """For an API that LiteLLM plays on chat completions."""
        return {**self.at("hosted_vllm"), "max_tokens": 512, **more}

    def of_router(self, kind: str = "chat", **more: Any) -> dict[str, Any]:
        return {"model": f"{kind}/{self.name}", **more}


def router(url: str) -> Router:
    shapes = {
        "chat/*": ("openai/*", f"{url}/v1"),
        "text/*": ("text-completion-openai/*", f"{url}/v1"),
        "claude/*": ("anthropic/*", url),
    }
    return Router(
        model_list=[
            {"model_name": name, "litellm_params": {"model": model, "api_base": base, "api_key": "k"}}
            for name, (model, base) in shapes.items()
        ],
        num_retries=3,
        retry_after=0,
    )


def shown(*things: Any) -> list[str]:
    """All that a caller has of an answer, as JSON."""
    return [_shown(thing) for thing in things]


def _shown(thing: Any) -> str:
    if hasattr(thing, "model_dump_json"):
        return str(thing.model_dump_json(warnings=False))
    return thing.decode() if isinstance(thing, bytes) else json.dumps(thing, default=str)


def all_of(stream: Any) -> list[Any]:
    return [type(stream).__name__, *shown(*stream)]


async def each_of(stream: Any) -> list[Any]:
    return [type(stream).__name__, *shown(*[part async for part in stream])]


def calls(routing: Router) -> dict[str, Callable[[Job], Any]]:
    """What each call shows; a coroutine where the call is asynchronous."""

    def sync(function: Any, named: Callable[[Job], dict[str, Any]], **more: Any) -> Callable[[Job], Any]:
        return lambda job: shown(function(**named(job), **more))

    def streamed(function: Any, named: Callable[[Job], dict[str, Any]]) -> Callable[[Job], Any]:
        return lambda job: all_of(function(**named(job), stream=True))

    def later(function: Any, named: Callable[[Job], dict[str, Any]]) -> Callable[[Job], Any]:
        async def call(job: Job) -> Any:
            return shown(await function(**named(job)))

        return call

    def later_streamed(function: Any, named: Callable[[Job], dict[str, Any]]) -> Callable[[Job], Any]:
        async def call(job: Job) -> Any:
            return await each_of(await function(**named(job), stream=True))

        return call

    def positional(function: Any, provider: str, *, swapped: bool = False) -> Callable[[Job], Any]:
        def call(job: Job) -> Any:
            args, named = job.positional(provider, job.prompt if swapped else job.said)
            return function(*(reversed(args) if swapped else args), **named)

        return call

    async def awaited(result: Any) -> Any:
        return shown(await result)

    def first(job: Job) -> Any:
        (answer,) = litellm.batch_completion(**{**job.chat(), "messages": [job.said]})
        if isinstance(answer, Exception):
            raise answer
        return shown(answer)

    return {
        "completion()": sync(litellm.completion, Job.chat),
        "completion(), positional": lambda job: shown(positional(litellm.completion, "openai")(job)),
        "completion(), imported before": sync(SYNC, Job.chat),
        "completion(stream=True)": streamed(litellm.completion, Job.chat),
        "acompletion()": later(litellm.acompletion, Job.chat),
        "acompletion(), positional": lambda job: awaited(positional(litellm.acompletion, "openai")(job)),
        "acompletion(), imported before": later(ASYNC, Job.chat),
        "acompletion(stream=True)": later_streamed(litellm.acompletion, Job.chat),
        "batch_completion()": first,
        "Router.completion()": sync(routing.completion, lambda job: job.of_router(messages=job.said)),
        "Router.completion(stream=True)": streamed(routing.completion, lambda job: job.of_router(messages=job.said)),
        "Router.acompletion()": later(routing.acompletion, lambda job: job.of_router(messages=job.said)),
        "Router.acompletion(stream=True)": later_streamed(
            routing.acompletion, lambda job: job.of_router(messages=job.said)
        ),
        "text_completion()": sync(litellm.text_completion, Job.text),
        "text_completion(), positional": lambda job: shown(
            positional(litellm.text_completion, "text-completion-openai", swapped=True)(job)
        ),
        "text_completion(stream=True)": streamed(litellm.text_completion, Job.text),
        "atext_completion()": later(litellm.atext_completion, Job.text),
        "atext_completion(), positional": lambda job: awaited(
            positional(litellm.atext_completion, "text-completion-openai", swapped=True)(job)
        ),
        "atext_completion(stream=True)": later_streamed(litellm.atext_completion, Job.text),
        "Router.atext_completion()": later(
            routing.atext_completion, lambda job: job.of_router(kind="text", prompt=job.prompt)
        ),
        "responses()": sync(litellm.responses, Job.response),
        "responses(), positional": lambda job: shown(positional(litellm.responses, "openai", swapped=True)(job)),
        "responses(stream=True)": streamed(litellm.responses, Job.response),
        "responses(stream=True), played by LiteLLM": streamed(
            litellm.responses, lambda job: job.response(native=False)
        ),
        "aresponses()": later(litellm.aresponses, Job.response),
        "aresponses(), positional": lambda job: awaited(positional(litellm.aresponses, "openai", swapped=True)(job)),
        "aresponses(stream=True)": later_streamed(litellm.aresponses, Job.response),
        "aresponses(stream=True), of a chat model": later_streamed(
            litellm.aresponses, lambda job: {**job.at("hosted_vllm"), "input": job.prompt}
        ),
        "Router.aresponses()": later(routing.aresponses, lambda job: job.of_router(input=job.prompt)),
        "Router.aresponses(stream=True)": later_streamed(
            routing.aresponses, lambda job: job.of_router(input=job.prompt)
        ),
        "anthropic_messages()": later(litellm.anthropic_messages, Job.message),
        "anthropic_messages(stream=True)": later_streamed(litellm.anthropic_messages, Job.message),
        "anthropic_messages(stream=True), of a chat model": later_streamed(
            litellm.anthropic_messages, lambda job: job.bridged(messages=job.said)
        ),
        "anthropic.messages.acreate()": later(litellm.anthropic.messages.acreate, Job.message),
        "anthropic.messages.create(), of a chat model": sync(
            litellm.anthropic.messages.create, lambda job: job.bridged(messages=job.said)
        ),
        "Router.aanthropic_messages()": later(
            routing.aanthropic_messages, lambda job: job.of_router(kind="claude", messages=job.said, max_tokens=512)
        ),
        "Router.aanthropic_messages(stream=True)": later_streamed(
            routing.aanthropic_messages, lambda job: job.of_router(kind="claude", messages=job.said, max_tokens=512)
        ),
    }


async def do(call: Callable[[Job], Any], job: Job) -> dict[str, Any]:
    try:
        result = call(job)
        return {"shown": await result if asyncio.iscoroutine(result) else result, "error": None}
    except Exception as error:
        return {"shown": [], "error": told(error)}


def told(error: BaseException) -> dict[str, Any]:
    return {
        "classes": [kind.__name__ for kind in type(error).__mro__],
        "status": getattr(error, "status_code", None),
        "decision": getattr(error, "decision_id", None),
        "message": str(error)[:600],
    }


def use(mode: str, config: str) -> None:
    if mode == "install":
        from guard_integrations.litellm import install

        install(config)
    elif mode == "callbacks":
        from guard_integrations.litellm import GuardCallback

        litellm.callbacks = [GuardCallback(config)]


def main() -> None:
    given = json.load(sys.stdin)
    table = calls(router(given["url"]))
    use(given["mode"], given["config"])
    with asyncio.Runner() as runner:
        for job in given["jobs"]:
            made = Job(given["url"], job["model"], job["prompt"])
            print("result", json.dumps({**job, **runner.run(do(table[job["call"]], made))}), flush=True)
        runner.run(asyncio.sleep(0.1))  # LiteLLM's own logging tasks


if __name__ == "__main__":
    main()
