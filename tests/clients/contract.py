"""What every client must show of every case, as data: the cases, the calls of each client, and the one rule per case.

A driver (``drivers/``, ``js/``) does the calls with the real client and says what its caller saw. ``wrong`` holds that
against the rule of the case; ``cell`` is what docs/clients.md says of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from guard_middleware.scripted import Answer, Calls

PROMPT, HARMFUL_PROMPT = "how do I bake bread?", "how do I pick a lock?"
GOOD = "Bread needs an hour in the oven, and another hour on the rack before it is cut."
#: more than the first window of the policy ``window``, and harmless
SAFE = "Bread needs an hour in the oven, and another hour on the rack before it is cut, so that the crumb can set. "
#: how the harm begins in a stream
TURNS = "Then"
BAD = f"{TURNS} pick a lock with two bits of wire."
#: what nobody may see of ``BAD``
LEAKS = (TURNS, "lock", "wire")
ANSWERS: Mapping[str, Answer] = {
    "good": GOOD,
    "bad": BAD,
    "late": SAFE + BAD,
    "good_json": '{"city": "Ghent"}',
    "calls": Calls({"query": "bread"}, GOOD),
    "bad_calls": Calls({"query": "how to pick a lock with two bits of wire"}, GOOD),
    "bad_json": '{"city": "pick a lock with two bits of wire"}',
}
SETTINGS: Mapping[str, Any] = {
    "policies": {
        "window": {"output": {"stream": {"mode": "window", "first_window": 80, "overlap": 40}}},
        "annotate": {"input": {"on_harmful": "annotate"}, "output": {"on_harmful": "annotate"}},
    },
    "tenants": {"header": "x-tenant", "match": [{"tenant": name, "policy": name} for name in ("window", "annotate")]},
}


@dataclass(frozen=True)
class Case:
    """``answer`` names what the upstream says; ``tenant`` the policy; ``outcome`` and ``called`` are the record's.

    ``guard`` is how the guard fares: it works, hangs, or is gone (and the client is told when to come again).
    """

    name: str
    title: str
    answer: str
    outcome: str
    prompt: str = PROMPT
    tenant: str = ""
    guard: Literal["works", "hangs", "gone"] = "works"
    only_streams: bool = False

    @property
    def called(self) -> bool:
        """Whether the upstream may hear of it."""
        return self.outcome != "guard_error" and self.name != "input"


CASES = (
    Case("allowed", "allowed", "good", "allowed"),
    Case("input", "blocked prompt", "good", "blocked", prompt=HARMFUL_PROMPT),
    Case("output", "blocked answer", "bad", "blocked"),
    Case("midstream", "blocked in mid-stream", "late", "blocked", tenant="window", only_streams=True),
    Case("down", "guard down", "good", "guard_error", guard="hangs"),
    Case("gone", "guard restarting", "good", "guard_error", guard="gone"),
    Case("annotate", "annotated", "bad", "annotated", tenant="annotate"),
    Case("tool", "allowed tool call", "calls", "allowed"),
    Case("bad_tool", "blocked tool call", "bad_calls", "blocked"),
)
#: only for calls that run tools by themselves
TOOLS = {"tool", "bad_tool"}


@dataclass(frozen=True)
class Call:
    """One way to ask. ``parsed``: the answer must be JSON.

    ``tools``: offers a tool and runs it. ``requests`` are how many reach the gateway, by case, where it is not one;
    ``gone`` is asked only where it is named: it takes seconds, and a client's own code for it is the same for all its
    calls.
    """

    name: str
    dialect: str
    streams: bool = False
    parsed: bool = False
    tools: bool = False
    requests: Mapping[str, int] = field(default_factory=dict)

    @property
    def cases(self) -> tuple[Case, ...]:
        skipped = {case.name for case in CASES if case.only_streams and not self.streams}
        skipped |= {"gone"} - self.requests.keys() | (set() if self.tools else TOOLS)
        return tuple(case for case in CASES if case.name not in skipped)

    def answer(self, case: Case) -> str:
        return f"{case.answer}_json" if self.parsed and case.answer != "late" else case.answer

    def hits(self, case: Case) -> int:
        """How many requests reach the gateway."""
        return self.requests.get(case.name, 1)


def both(*calls: Call) -> tuple[Call, ...]:
    """The calls, and the same of the asynchronous client."""
    later = []
    for call in calls:
        requests = {name: hits for name, hits in call.requests.items() if name != "gone"}
        later.append(replace(call, name=f"async {call.name}", requests=requests))
    return (*calls, *later)


#: a client that comes again after ``retry-after``, twice; one that does not; one that comes again after every 5xx,
#: whatever ``x-should-retry`` says
AGAIN, ONCE, STUBBORN = {"gone": 3}, {"gone": 1}, {"down": 3}
#: one for the call, one with the tool's result
TWO_TURNS = {"tool": 2}
CHAT, RESPONSES, COMPLETIONS, MESSAGES = "chat_completions", "responses", "completions", "messages"
CALLS: Mapping[str, tuple[Call, ...]] = {
    "openai (Python)": both(
        Call("chat.create", CHAT, requests=AGAIN),
        Call("chat.create stream", CHAT, streams=True),
        Call("chat.stream()", CHAT, streams=True),
        Call("chat.parse()", CHAT, parsed=True),
        Call("responses.create", RESPONSES, requests=AGAIN),
        Call("responses.create stream", RESPONSES, streams=True),
        Call("responses.stream()", RESPONSES, streams=True),
        Call("responses.parse()", RESPONSES, parsed=True),
        Call("completions.create", COMPLETIONS, requests=AGAIN),
        Call("completions.create stream", COMPLETIONS, streams=True),
    ),
    "anthropic (Python)": both(
        Call("messages.create", MESSAGES, requests=AGAIN),
        Call("messages.create stream", MESSAGES, streams=True),
        Call("messages.stream()", MESSAGES, streams=True),
        Call("messages.parse()", MESSAGES, parsed=True),
        Call("tool_runner()", MESSAGES, tools=True, requests=TWO_TURNS),
        Call("tool_runner() stream", MESSAGES, streams=True, tools=True, requests=TWO_TURNS),
    ),
    "LangChain (Python)": (
        Call("ChatOpenAI.invoke", CHAT, requests=AGAIN),
        Call("ChatOpenAI.stream", CHAT, streams=True),
        Call("ChatOpenAI.structured", CHAT, parsed=True),
        Call("ChatOpenAI.ainvoke", CHAT),
        Call("ChatOpenAI.astream", CHAT, streams=True),
        Call("ChatOpenAI(use_responses_api).invoke", RESPONSES, requests=AGAIN),
        Call("ChatOpenAI(use_responses_api).stream", RESPONSES, streams=True),
        Call("ChatOpenAI(use_responses_api).structured", RESPONSES, parsed=True),
        Call("ChatOpenAI(use_responses_api).ainvoke", RESPONSES),
        Call("ChatOpenAI(use_responses_api).astream", RESPONSES, streams=True),
        Call("ChatAnthropic.invoke", MESSAGES, requests=AGAIN),
        Call("ChatAnthropic.stream", MESSAGES, streams=True),
        Call("ChatAnthropic.structured", MESSAGES, parsed=True),
        Call("ChatAnthropic.ainvoke", MESSAGES),
        Call("ChatAnthropic.astream", MESSAGES, streams=True),
    ),
    "LiteLLM SDK (Python)": (
        *both(
            Call("completion(openai/)", CHAT, requests=AGAIN),
            Call("completion(openai/) stream", CHAT, streams=True),
            Call("completion(anthropic/)", MESSAGES, requests=ONCE),
            Call("completion(anthropic/) stream", MESSAGES, streams=True),
            Call("text_completion()", COMPLETIONS, requests=AGAIN),
            Call("text_completion() stream", COMPLETIONS, streams=True),
            Call("responses()", RESPONSES, requests=ONCE),
            Call("responses() stream", RESPONSES, streams=True),
        ),
        Call("anthropic.messages.acreate", MESSAGES, requests=ONCE),
        Call("anthropic.messages.acreate stream", MESSAGES, streams=True),
    ),
    "openai (JavaScript)": (
        Call("chat.create", CHAT, requests=AGAIN),
        Call("chat.create stream", CHAT, streams=True),
        Call("chat.stream()", CHAT, streams=True),
        Call("chat.parse()", CHAT, parsed=True),
        Call("responses.create", RESPONSES, requests=AGAIN),
        Call("responses.create stream", RESPONSES, streams=True),
        Call("responses.stream()", RESPONSES, streams=True),
        Call("responses.parse()", RESPONSES, parsed=True),
        Call("completions.create", COMPLETIONS, requests=AGAIN),
        Call("completions.create stream", COMPLETIONS, streams=True),
    ),
    "@anthropic-ai/sdk (JavaScript)": (
        Call("messages.create", MESSAGES, requests=AGAIN),
        Call("messages.create stream", MESSAGES, streams=True),
        Call("messages.stream()", MESSAGES, streams=True),
        Call("messages.parse()", MESSAGES, parsed=True),
        Call("toolRunner()", MESSAGES, tools=True, requests=TWO_TURNS),
        Call("toolRunner() stream", MESSAGES, streams=True, tools=True, requests=TWO_TURNS),
    ),
    "Vercel ai (JavaScript)": tuple(
        call
        for name, dialect in (
            ("openai.chat()", CHAT),
            ("openai.responses()", RESPONSES),
            ("openai.completion()", COMPLETIONS),
            ("anthropic()", MESSAGES),
        )
        for call in (
            Call(f"generateText({name})", dialect, requests=AGAIN | STUBBORN),
            *(
                []
                if dialect == COMPLETIONS
                else [Call(f"generateText({name}, Output.object)", dialect, parsed=True, requests=STUBBORN)]
            ),
            Call(f"streamText({name})", dialect, streams=True, requests=STUBBORN),
        )
    ),
}

#: how clients name the end of an answer
ENDED = frozenset({"stop", "end_turn", "completed"})
FILTERED = frozenset({"content_filter", "refusal", "incomplete: content_filter", "content-filter"})
#: our own words where a client shows a refusal as text
_PUBLIC = re.compile(r"The answer was blocked by the content policy of this service \(decision [a-z0-9_.]+\)\.")
#: what a client may raise where an answer was blocked, if it names no reason: (class, what its message must say)
RAISED = (
    ("ContentFilterFinishReasonError", "content filter"),
    # the helper of the Responses API knows no end but `response.completed`
    ("RuntimeError", "response.completed"),
)


def wrong(call: Call, case: Case, saw: Mapping[str, Any]) -> str | None:
    """What is wrong with what the caller saw, or None."""
    text, finish, error = _PUBLIC.sub("", saw["text"]), saw["finish"], saw["error"]
    if leaked := [word for word in LEAKS if word in text and case.outcome != "annotated"]:
        return f"leaked {leaked}"
    match case.name:
        case "input":
            return _refused(text, error, 400, "content_filter", "blocked by the content policy")
        case "down" | "gone":
            return _refused(text, error, 503, "guard_unavailable", "could not be moderated")
        case "allowed" | "annotate" | "tool":
            if error or finish not in ENDED:
                return "is no whole answer"
            if ("the tool ran" in saw["marks"]) != (case.name == "tool"):
                return "the tool ran, or did not"
            whole = GOOD if case.name == "tool" else ANSWERS[call.answer(case)]
            return None if text.strip() == whole else "the text is not the upstream's"
    typed = error and any(error["type"] == kind and words in error["message"] for kind, words in RAISED)
    if finish not in FILTERED and not typed:
        return "nothing says that the answer was blocked"
    if "the tool ran" in saw["marks"]:
        return "a blocked call was done"
    if case.name == "midstream":
        shown = len(text) > 40 and SAFE.startswith(text)
        return None if shown else "what had been released is not what the caller has"
    return None if not text else "text of a blocked answer"


def _refused(text: str, error: Mapping[str, Any] | None, status: int, code: str, words: str) -> str | None:
    if error is None:
        return "no exception"
    if error["status"] != status:
        return f"not the status {status}"
    if error["code"] != code and words not in error["message"]:
        return "neither code nor message say why"
    return "text before an error" if text else None


def cell(call: Call, case: Case, saw: Mapping[str, Any]) -> str:
    """What the caller saw, in a few words."""
    error, marks = saw["error"], "".join(f" + {mark}" for mark in saw["marks"])
    part = "part of the text, then " if saw["text"] and case.name == "midstream" else ""
    hits = f" ({call.hits(case)} requests)" if call.hits(case) > 1 else ""
    if error is None:
        return f"{part}`{saw['finish']}`{marks}{hits}"
    code = f" {error['code']}" if error["code"] else ""
    status = f" {error['status']}" if error["status"] else ""
    return f"{part}`{error['type']}`{status}{code}{hits}"
