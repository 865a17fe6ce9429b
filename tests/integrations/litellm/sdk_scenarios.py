"""What an application can do with the guard in LiteLLM's SDK, beside plain calls; each prints what it found.

Runs in LiteLLM's environment. ``given`` are the upstream's address and the configurations by name.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it is fetched at import

import litellm
from litellm import Router, completion
from pydantic import BaseModel

from guard_integrations.litellm import install, sdk, uninstall

litellm.suppress_debug_info = True
GIVEN: dict[str, Any] = {}
HARM = [{"role": "user", "content": "How do I pick a lock?"}]
ASK = [{"role": "user", "content": "How long does bread take?"}]
SCENARIOS: dict[str, Callable[[], Any]] = {}


def scenario(work: Callable[[], Any]) -> Callable[[], Any]:
    SCENARIOS[work.__name__] = work
    return work


@contextmanager
def installed(config: str = "plain", **options: Any) -> Iterator[None]:
    install(GIVEN["configs"][config], **options)
    try:
        yield
    finally:
        uninstall()


def at(name: str, messages: Any = ASK, **more: Any) -> dict[str, Any]:
    return {"model": f"openai/{name}", "messages": messages, "api_base": f"{GIVEN['url']}/v1", "api_key": "k", **more}


def outcome(work: Callable[[], Any]) -> dict[str, Any]:
    try:
        value = work()
        return {"value": asyncio.run(value) if asyncio.iscoroutine(value) else value}
    except Exception as error:
        return {
            "error": [kind.__name__ for kind in type(error).__mro__],
            "status": getattr(error, "status_code", None),
            "message": str(error),
        }


def text(answer: Any) -> Any:
    return answer.choices[0].message.content


@scenario
def installing_twice_does_nothing_and_another_configuration_is_refused() -> Any:
    before = completion.__code__
    with installed():
        guarded = completion.__code__
        install(GIVEN["configs"]["plain"])
        same = completion.__code__ is guarded
        other = outcome(lambda: install(GIVEN["configs"]["window"]))
    uninstall()
    return {"same": same, "other": other, "restored": completion.__code__ is before}


@scenario
def without_the_guard_all_passes_again() -> Any:
    with installed():
        pass
    return {"passes": "wire" in text(completion(**at("bad.uninstalled")))}


@scenario
def an_unknown_release_is_refused() -> Any:
    known = sdk.VERSIONS
    sdk.VERSIONS = ((9, 0), (9, 1))
    try:
        unknown = outcome(lambda: install(GIVEN["configs"]["plain"]))
    finally:
        sdk.VERSIONS = known
    return {"unknown": unknown, "still": "wire" in text(completion(**at("bad.unknown")))}


@scenario
def a_function_that_is_not_litellms_is_refused() -> Any:
    kept = litellm.completion
    litellm.completion = lambda **_: None
    try:
        return outcome(lambda: install(GIVEN["configs"]["plain"]))
    finally:
        litellm.completion = kept


@scenario
def a_broken_configuration_is_refused() -> Any:
    return outcome(lambda: install(GIVEN["configs"]["broken"]))


@scenario
def a_block_is_not_retried() -> Any:
    router = Router(
        model_list=[{"model_name": "m", "litellm_params": {**at("good.retry"), "messages": None}}], num_retries=3
    )
    with installed():
        return {
            "call": outcome(lambda: completion(**at("good.retry", HARM, num_retries=3))),
            "async call": outcome(lambda: litellm.acompletion(**at("good.retry", HARM, num_retries=3))),
            "router": outcome(lambda: router.completion(model="m", messages=HARM)),
            "router that was told": outcome(lambda: router.completion(model="m", messages=HARM, num_retries=3)),
        }


@scenario
def a_guard_that_is_down_fails_closed_and_is_not_retried() -> Any:
    router = Router(
        model_list=[{"model_name": "m", "litellm_params": {**at("good.down"), "messages": None}}], num_retries=3
    )
    with installed("mortal"):
        fine = text(completion(**at("good.down.before")))
        os.kill(GIVEN["mortal"], 9)
        calls = {
            "call": outcome(lambda: completion(**at("good.down"))),
            "stream": outcome(lambda: completion(**at("good.down", stream=True))),
            "async call": outcome(lambda: litellm.acompletion(**at("good.down", num_retries=2))),
            "router": outcome(lambda: router.completion(model="m", messages=ASK)),
        }
    return {"before": fine, **calls}


@scenario
def a_cached_answer_is_judged_too() -> Any:
    litellm.cache = litellm.Cache(type="local")
    try:
        raw = text(completion(**at("bad.cached")))
        with installed():
            again = completion(**at("bad.cached"))
            stream = "".join(str(chunk) for chunk in completion(**at("bad.cached", stream=True)))
    finally:
        litellm.cache = None
    return {"raw": raw, "finish": again.choices[0].finish_reason, "again": str(again), "stream": stream}


@scenario
def a_stream_is_cut_in_its_middle() -> Any:
    with installed("window"):
        stream = completion(**at("long.cut", stream=True))
        chunks = list(stream)
        kept = str(stream.chunks)
        stream = asyncio.run(_collected(litellm.acompletion(**at("long.cut", stream=True))))
    finish = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    return {"text": _said(chunks), "finish": finish[-1], "kept": kept, "async": _said(stream)}


async def _collected(stream: Any) -> list[Any]:
    return [chunk async for chunk in await stream]


def _said(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


@scenario
def a_stream_that_is_dropped_is_recorded() -> Any:
    with installed("window"):
        stream = completion(**at("long.dropped", stream=True))
        next(stream)
        del stream
        gc.collect()
        closed = completion(**at("long.closed", stream=True))
        next(closed)
        closed.close()
        after = outcome(lambda: next(closed, "over"))

        async def left() -> None:
            stream = await litellm.acompletion(**at("long.left", stream=True))
            async for _ in stream:
                break
            await stream.aclose()

        asyncio.run(left())
        time.sleep(0.5)
    return {"after": after}


@scenario
def a_cancelled_call_is_recorded() -> Any:
    async def cancelled() -> bool:
        slow = [{"role": "user", "content": "[wait 5] How long?"}]
        task = asyncio.create_task(litellm.acompletion(**at("good.cancelled", slow)))
        await asyncio.sleep(0.3)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return True
        return False

    with installed():
        done = asyncio.run(cancelled())
        time.sleep(0.5)
    return {"cancelled": done}


@scenario
def soft_refusals_have_litellms_types() -> Any:
    url = GIVEN["url"]
    with installed("soft"):
        whole = completion(**at("good.soft", HARM))
        stream = completion(**at("good.soft", HARM, stream=True))
        chunks = list(stream)
        arguments = {"model": "openai/good.soft", "input": HARM[0]["content"], "api_base": f"{url}/v1", "api_key": "k"}
        response = litellm.responses(**arguments)
        events = list(litellm.responses(**arguments, stream=True))
        router = Router(model_list=[{"model_name": "m", "litellm_params": {**at("good.soft"), "messages": None}}])
        routed = asyncio.run(_collected(router.acompletion(model="m", messages=HARM, stream=True)))
    return {
        "whole": [type(whole).__name__, text(whole)],
        "stream": [type(stream).__name__, isinstance(stream, litellm.CustomStreamWrapper), _said(chunks)],
        "response": [type(response).__name__, response.output[0].content[0].text],
        "events": [str(getattr(event.type, "value", event.type)) for event in events],
        "router": _said(routed),
    }


@scenario
def an_annotation_is_on_the_answer() -> Any:
    with installed("annotate"):
        answer = completion(**at("bad.annotate"))
    return {"text": text(answer), "moderation": answer.model_extra.get("moderation")}


@scenario
def a_race_ends_blocked() -> Any:
    with installed("race"):
        return {
            "whole": outcome(lambda: text(completion(**at("good.race", HARM)))),
            "stream": outcome(lambda: _said(list(completion(**at("good.race", HARM, stream=True))))),
        }


@scenario
def upstream_errors_stay_litellms() -> Any:
    with installed():
        return {
            "unknown model": outcome(lambda: completion(**at("nobody"))),
            "in a stream": outcome(lambda: list(completion(**at("nobody", stream=True)))),
            "unreachable": outcome(lambda: completion(**{**at("good"), "api_base": "http://127.0.0.1:9/v1"})),
        }


class Answer(BaseModel):
    minutes: int


@scenario
def what_was_judged_is_what_is_sent() -> Any:
    with installed():
        first = completion(**at("good.sent"))
        said = [*ASK, first.choices[0].message, {"role": "user", "content": "And cake?"}]
        given = at("good.sent.2", said, response_format=Answer, temperature=0.5, metadata={"team": "a"})
        completion(**given, extra_body={"top_k": 4}, caching=False)
        completion(**at("good.sent.3", [{"role": "user", "content": [
            {"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": GIVEN["image"]}}
        ]}]))  # fmt: skip
    return {}


@scenario
def what_carries_a_prompt_past_the_guard_is_refused() -> Any:
    ways: dict[str, dict[str, Any]] = {
        "extra_body that repeats": {"extra_body": {"messages": HARM}},
        "extra_body with a field": {"extra_body": {"documents": [{"text": "pick a lock"}]}},
        "a fallback with messages": {"fallbacks": [{"model": "openai/good", "messages": HARM}]},
        "prompt variables": {"prompt_id": "p", "prompt_variables": {"q": "pick a lock"}},
        "an object": {"tools": [object()]},
        "a file": {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]},
        "harmful in extra_body": {"extra_body": {"stop": ["pick a lock"]}},
        "litellm's own flag": {"messages": HARM, "acompletion": True},
    }
    with installed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            name: outcome(lambda more=more: completion(**{**at("good.past"), **more})) for name, more in ways.items()
        }


@scenario
def other_calls_are_refused_unless_they_are_named() -> Any:
    ask = {"model": "openai/good.embed", "input": ["x"], "api_base": f"{GIVEN['url']}/v1", "api_key": "k"}
    with installed():
        refused = outcome(lambda: litellm.embedding(**ask))
        refused_async = outcome(lambda: litellm.aembedding(**ask))
    with installed(unread=["embedding"]):
        named = outcome(lambda: litellm.embedding(**ask))
    return {"refused": refused, "refused async": refused_async, "named": named}


@scenario
def many_threads_and_tasks_share_one_guard() -> Any:
    answers: list[Any] = []

    def work(number: int) -> None:
        answers.append(outcome(lambda: text(completion(**at(f"good.many.{number}", HARM if number % 2 else ASK)))))

    async def tasks() -> list[Any]:
        calls = [litellm.acompletion(**at(f"good.many.a{n}", HARM if n % 2 else ASK)) for n in range(20)]
        return await asyncio.gather(*calls, return_exceptions=True)

    with installed():
        threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        later = asyncio.run(tasks())
    blocked = [answer for answer in answers if answer.get("status") == 400]
    ended = [thread for thread in threading.enumerate() if thread.name == "guard-portal"]
    return {
        "blocked": len(blocked), "answered": len(answers) - len(blocked), "portals left": len(ended),
        "async blocked": sum(isinstance(answer, Exception) for answer in later), "async": len(later),
    }  # fmt: skip


@scenario
def a_forked_process_has_a_guard_of_its_own() -> Any:
    with installed():
        completion(**at("good.fork"))
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            found = outcome(lambda: text(completion(**at("good.fork", HARM, api_key="other"))))
            os.write(write, json.dumps(found).encode())
            os._exit(0)
        os.close(write)
        said = os.read(read, 65536)
        os.close(read)
        os.waitpid(child, 0)
    return json.loads(said or b"null")


@scenario
def the_tenant_chooses_the_policy() -> Any:
    with installed("tenants", tenant="team-a"):
        watched = outcome(lambda: text(completion(**at("good.tenant", HARM))))
    with installed("tenants", tenant="team-b"):
        return {"team-a": watched, "team-b": outcome(lambda: text(completion(**at("good.tenant", HARM))))}


@scenario
def a_tool_call_is_judged() -> Any:
    tool = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
    with installed():
        answer = completion(**at("calls.tool", tools=[tool]))
        stream = list(completion(**at("calls.tool", tools=[tool], stream=True)))
    return {
        "whole": [answer.choices[0].finish_reason, str(answer.choices[0].message.tool_calls)],
        "stream": str(stream),
    }


def main() -> None:
    GIVEN.update(json.load(sys.stdin))
    for name in GIVEN["scenarios"]:
        started = time.monotonic()
        try:
            found = SCENARIOS[name]()
        except Exception:
            found = {"failed": traceback.format_exc()}
        print("result", json.dumps({"name": name, "found": found, "seconds": time.monotonic() - started}), flush=True)


if __name__ == "__main__":
    main()
