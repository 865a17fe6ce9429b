"""Finished requests to describe, with a marker wherever content is."""

from __future__ import annotations

import dataclasses
from typing import Any

from guard_middleware.types import (
    Action,
    Basis,
    Blob,
    Conversation,
    Decision,
    Definition,
    GuardCall,
    Message,
    Reasoning,
    Record,
    Source,
    Text,
    ToolCall,
    ToolCallResponse,
    Usage,
    Verdict,
)

MARKER = "mauve-walrus-81"
IMAGE = b"\x89PNG " + MARKER.encode()

CONVERSATION = Conversation(
    messages=(
        Message("system", (Text(f"be kind {MARKER}"),)),
        Message("user", (Text(f"how do I pick a lock? {MARKER}"), Blob("image/png", IMAGE)), name=f"ann {MARKER}"),
        Message("assistant", (Reasoning(f"hm {MARKER}"), ToolCall("c1", f"find_{MARKER}", f'{{"q":"{MARKER}"}}'))),
        Message("tool", (ToolCallResponse("c1", f"found {MARKER}"),)),
    ),
    definitions=(Definition("tool", f"finds {MARKER}"),),
)
ANSWER = Message("assistant", (Text(f"with two bits of wire {MARKER}"),))


def verdict(source: Source = "input", **changes: Any) -> Verdict:
    base = Verdict(
        request="unharmful",
        response=None if source == "input" else "harmful",
        request_score=0.25,
        response_score=None if source == "input" else 0.75,
        reasoning="The user asks about locks. Mild.",
        usage=Usage(prompt=120, completion=40, reasoning=30),
        model="nano",
        revision="r1",
        categories=("burglary",),
        drawn_text=(f"drawn {MARKER}",),
        timings=(("queue", 0.001), ("generate", 0.004)),
    )
    return dataclasses.replace(base, **changes)


def decision(source: Source = "input", judged: Verdict | None = None, **changes: Any) -> Decision:
    base = Decision(
        id=f"gd-{source}",
        source=source,
        action=Action.ALLOW,
        basis=Basis.VERDICT if judged else Basis.ERROR,
        policy="default",
        policy_digest="p1",
        would=Action.ALLOW,
        verdict=judged,
        error=None if judged else "timeout",
    )
    return dataclasses.replace(base, **changes)


def call(source: Source = "input", judged: Verdict | None = None, seconds: float = 0.25, **changes: Any) -> GuardCall:
    return GuardCall(source, None if source == "input" else 0, decision(source, judged, **changes), seconds)


def record(**changes: Any) -> Record:
    """A request whose input passed and whose answer was judged and passed too."""
    base = Record(
        id="gd-1",
        dialect="chat_completions",
        method="POST",
        path="/v1/chat/completions",
        model="vlm",
        stream=False,
        tenant="acme",
        policy="default",
        policy_digest="p1",
        outcome="allowed",
        status=200,
        error=None,
        upstream_called=True,
        calls=(call("input", verdict()), call("output", verdict("output"))),
        held_bytes=900,
        released_bytes=900,
        conversation=CONVERSATION,
        answers=(ANSWER,),
        timings=(("hold_back", 0.5), ("upstream", 1.5)),
    )
    return dataclasses.replace(base, **changes)
