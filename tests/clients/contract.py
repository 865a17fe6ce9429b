"""What every client must show of every case, as data: the cases, the calls of each client, and the one rule per case.

A driver (``drivers/``, ``js/``) does the calls with the real client and says what its caller saw. ``wrong`` holds that
against the rule of the case; ``cell`` is what docs/clients.md says of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from guard_middleware.scripted import Answer

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
)


@dataclass(frozen=True)
class Call:
    """One way to ask. ``parsed``: the answer must be JSON. ``whole``: shows text only once the answer is complete.

    ``comes_again`` is how many requests it makes of a gateway that says ``retry-after: 1``; None is not asked, because
    the wait is long and the clients' own code for it is the same for all their calls.
    """

    name: str
    dialect: str
    streams: bool = False
    parsed: bool = False
    whole: bool = False
    comes_again: int | None = None

    @property
    def cases(self) -> tuple[Case, ...]:
        skipped = {case.name for case in CASES if case.only_streams and not self.streams}
        skipped |= {"gone"} if self.comes_again is None else set()
        return tuple(case for case in CASES if case.name not in skipped)

    def answer(self, case: Case) -> str:
        return f"{case.answer}_json" if self.parsed and case.answer != "late" else case.answer

    def hits(self, case: Case) -> int:
        """How many requests reach the gateway."""
        return self.comes_again or 1 if case.name == "gone" else 1


def both(*calls: Call) -> tuple[Call, ...]:
    """The calls, and the same of the asynchronous client."""
    later = [replace(call, name=f"async {call.name}", comes_again=None) for call in calls]
    return (*calls, *later)


CHAT, RESPONSES, COMPLETIONS, MESSAGES = "chat_completions", "responses", "completions", "messages"
CALLS: Mapping[str, tuple[Call, ...]] = {
    "openai (Python)": both(
        Call("chat.create", CHAT, comes_again=3),
        Call("chat.create stream", CHAT, streams=True),
        Call("chat.stream()", CHAT, streams=True),
        Call("chat.parse()", CHAT, parsed=True),
        Call("responses.create", RESPONSES, comes_again=3),
        Call("responses.create stream", RESPONSES, streams=True),
        Call("responses.stream()", RESPONSES, streams=True),
        Call("responses.parse()", RESPONSES, parsed=True),
        Call("completions.create", COMPLETIONS, comes_again=3),
        Call("completions.create stream", COMPLETIONS, streams=True),
    ),
    "anthropic (Python)": both(
        Call("messages.create", MESSAGES, comes_again=3),
        Call("messages.create stream", MESSAGES, streams=True),
        Call("messages.stream()", MESSAGES, streams=True),
        Call("messages.parse()", MESSAGES, parsed=True),
        Call("tool_runner()", MESSAGES),
        Call("tool_runner() stream", MESSAGES, streams=True),
    ),
}

#: how clients name the end of an answer
ENDED = frozenset({"stop", "end_turn", "completed"})
FILTERED = frozenset({"content_filter", "refusal", "incomplete: content_filter"})
#: what a client may raise where an answer was blocked: (class, what its message must say)
RAISED = (
    ("ContentFilterFinishReasonError", "content filter"),
    # the helper of the Responses API knows no end but `response.completed`
    ("RuntimeError", "response.completed"),
)


def wrong(call: Call, case: Case, saw: Mapping[str, Any]) -> str | None:
    """What is wrong with what the caller saw, or None."""
    text, finish, error = str(saw["text"]), saw["finish"], saw["error"]
    if leaked := [word for word in LEAKS if word in text and case.outcome != "annotated"]:
        return f"leaked {leaked}"
    match case.name:
        case "input":
            return _refused(text, error, 400, "content_filter", "blocked by the content policy")
        case "down" | "gone":
            return _refused(text, error, 503, "guard_unavailable", "could not be moderated")
        case "allowed" | "annotate":
            if error or finish not in ENDED:
                return "is no whole answer"
            return None if text.strip() == ANSWERS[call.answer(case)] else "the text is not the upstream's"
    if error is None and finish not in FILTERED:
        return "a blocked answer that looks like an ordinary one"
    if error and not any(error["type"] == kind and words in error["message"] for kind, words in RAISED):
        return "the exception does not say what happened"
    if case.name == "midstream" and not call.whole:
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
