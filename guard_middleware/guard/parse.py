"""What the guard writes, read strictly: one block of reasoning and exactly one verdict after it.

The reasoning quotes the text it judges, so anything that an attacker writes can turn up inside it. Therefore no
verdict is ever searched for: the output either is the one form below from its first to its last character, or it
is ``GuardError(unparseable)``, which policy treats as a guard that gave no verdict.

    <think>
    ...
    </think>
    <result>
    Answers:
    Request: harmful|unharmful
    Response: harmful|unharmful|None
    </result>

Refuses: a missing or repeated ``<think>``, ``</think>``, ``<result>`` or ``</result>``; text before ``<think>``,
between the blocks or after ``</result>``; another label, another case, a repeated or missing line; ``None`` for an
answer that was given, and a label for one that was not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.types import Label

THINK, END_THINK = "<think>", "</think>"
RESULT, END_RESULT = "<result>", "</result>"
TAGS = (THINK, END_THINK, RESULT, END_RESULT)

_RESULT = re.compile(
    r"\s*<result>\s*Answers:[ \t]*\n"
    r"[ \t]*Request:[ \t]*(harmful|unharmful)[ \t]*\n"
    r"[ \t]*Response:[ \t]*(harmful|unharmful|None)\s*</result>\s*",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Parsed:
    """``response`` is None exactly when no answer was given to judge."""

    reasoning: str
    request: Label
    response: Label | None


def parse(output: str, *, answered: bool) -> Parsed:
    """The verdict in a guard's whole output (control tokens removed); raises ``GuardError(unparseable)`` otherwise."""
    if any(output.count(tag) != 1 for tag in TAGS):
        raise GuardError(GuardErrorKind.UNPARSEABLE, "the output does not hold each tag exactly once")
    before, _, rest = output.partition(THINK)
    if before.strip():
        raise GuardError(GuardErrorKind.UNPARSEABLE, "the output does not start with its reasoning")
    reasoning, end, result = rest.partition(END_THINK)
    found = _RESULT.fullmatch(result)
    if not end or found is None:
        raise GuardError(GuardErrorKind.UNPARSEABLE, "what follows the reasoning is not exactly one verdict")
    request, response = found.groups()
    if (response == "None") == answered:
        expected = "lacks a label for the answer" if answered else "labels an answer that was not given"
        raise GuardError(GuardErrorKind.UNPARSEABLE, f"the verdict {expected}")
    return Parsed(reasoning.strip(), cast(Label, request), cast(Label, response) if answered else None)


def completion(reasoning: str, request: Label, response: Label | None) -> str:
    """The output that ``parse`` reads back as exactly these values; what training teaches the guard to write.

    Raises ``ValueError`` for reasoning that holds one of the tags, since no parser could tell it from the verdict.
    """
    if any(tag in reasoning for tag in TAGS):
        raise ValueError("reasoning must not hold a tag of the output format")
    return (
        f"{THINK}\n{reasoning.strip()}\n{END_THINK}\n"
        f"{RESULT}\nAnswers:\nRequest: {request}\nResponse: {response}\n{END_RESULT}"
    )
