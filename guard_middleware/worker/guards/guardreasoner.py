"""GuardReasoner-VL (3B, 7B, Eco) on a server that tokenises text: the same prompt and output as everywhere else here.

One call judges the request and the answer. The prompt is ``guard.prompt``'s, as chat messages: with the Qwen2.5-VL
template the images stand behind ``Human user:`` as in training. The output is ``guard.parse``'s; a server that takes
the reasoning out of the text (a reasoning parser) is understood as well.

Refuses what ``guard.parse`` refuses, and ``think=False``: chat messages cannot begin the model's own turn.

Source: https://github.com/yueliu1999/GuardReasoner-VL
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.guard.parse import END_THINK, RESULT, THINK, parse
from guard_middleware.guard.prompt import ASSISTANT, END, HUMAN, NO_ANSWER, SYSTEM
from guard_middleware.types import Conversation
from guard_middleware.worker.guards.base import (
    Finding,
    Modality,
    Neutraliser,
    Output,
    Parsed,
    Question,
    Target,
    Turn,
    Words,
    joined,
    slots,
)

_HARMLESS = Neutraliser(tags=["think", "result", "tool_call", "tool_response"])
_LABEL = {
    "request": re.compile(r"Request:[ \t]*(?=harmful|unharmful)"),
    "response": re.compile(r"Response:[ \t]*(?=harmful|unharmful)"),
}


@dataclass(frozen=True, slots=True)
class GuardReasonerVL:
    """See the module."""

    name: ClassVar[str] = "guardreasoner-vl"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"text", "image"})
    thinks: ClassVar[bool] = True
    words: ClassVar[Words] = Words(harmful=("harmful",), unharmful=("unharmful",))

    categories: ClassVar[Mapping[str, str]] = {}

    def prompt(
        self, conversation: Conversation, drawn: Sequence[str] = (), *, think: bool = True
    ) -> tuple[Question, ...]:
        if not think:
            raise GuardError(GuardErrorKind.UNSUPPORTED, "an endpoint cannot make this guard judge without thinking")
        request, answer = slots(conversation, _HARMLESS, drawn)
        turn = joined([HUMAN, *request, ASSISTANT, *((NO_ANSWER,) if answer is None else answer), END])
        targets: tuple[Target, ...] = ("request",) if answer is None else ("request", "response")
        return (Question(targets, (Turn("system", (SYSTEM,)), Turn("user", turn)), max_tokens=2048),)

    def parse(self, output: Output, question: Question) -> Parsed:
        text = output.text
        if output.reasoning and THINK not in text:
            text = f"{THINK}\n{output.reasoning}\n{END_THINK}\n{text}"
        read = parse(text, answered="response" in question.targets)
        verdict = max(output.text.rfind(RESULT), 0)

        def at(target: Target) -> int:
            found = _LABEL[target].search(output.text, verdict)
            return found.end() if found else -1

        findings = [Finding("request", read.request, at("request"))]
        if read.response is not None:
            findings.append(Finding("response", read.response, at("response")))
        return Parsed(tuple(findings), reasoning=read.reasoning)
