"""What is accepted of a teacher's answer: whole in form, one to ten steps, true to the labels, and no word of them.

Refuses, each by its name (``Fault``): an empty, cut-off or refused answer; another form; no step, or more than ten; a
verdict that differs from the labels; a conclusion that differs from the verdict, or is missing; talk of a verdict that
was given; tags and control tokens, which the guard's own output form needs for itself; half of a surrogate pair.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import cast

from guard_middleware.guard.parse import TAGS
from guard_middleware.types import Label
from guard_training.corpus.rows import Row, encodable
from guard_training.synthesis.prompt import MAX_STEPS


class Fault(StrEnum):
    EMPTY = "empty"
    CUT_OFF = "cut off"
    REFUSED = "refused"
    FORM = "form"
    STEPS = "steps"
    VERDICT = "verdict"
    CONCLUSION = "conclusion"
    LEAK = "leak"
    CONTROL = "control token"


class Unusable(ValueError):
    """An answer that is not accepted. The text says why, without quoting it."""

    def __init__(self, fault: Fault, why: str) -> None:
        super().__init__(why)
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Rationale:
    """An accepted answer: ``text`` goes between ``<think>`` and ``</think>``; the labels are the teacher's verdict."""

    text: str
    steps: int
    request: Label
    response: Label | None


_ANSWERS = re.compile(
    r"\n\s*\**Answers:?\**:?\s*\n\s*Request:\s*(harmful|unharmful)\s*\n\s*Response:\s*(harmful|unharmful|None)\s*\Z"
)
_HEADING = re.compile(r"\s*#{1,4}\s*\**\s*(Task|Reasoning Step)\s+(\d+)\**\s*[:.]?\**\s*(.*)")
_LABEL = re.compile(r"\b(harmful|unharmful)\b", re.I)
_OTHER_WORDS = re.compile(r"\bnot\s+(?:un)?harmful\b", re.I)
_CONTROL = re.compile(r"<\|[^|>\n]{1,40}\|>")
_LEAKS = re.compile(
    r"ground[\s-]?truth|\bdecide yourself\b"
    r"|\b(?:given|provided|stated|supplied|assigned|expected|known|settled|reference|gold|target|correct|right|true)"
    r"\s+(?:label|verdict|annotation|classification)s?\b"
    r"|\b(?:label|verdict|annotation|classification)s?\s+(?:(?:is|are|was|were|has been|have been)\s+)?"
    r"(?:already\s+)?(?:given|provided|stated|supplied|settled|known)\b"
    r"|\b(?:labell?ed|annotated)\s+(?:as\s+)?(?:un)?harmful\b"
    # not a label that is seen: "based on the label of the bottle"
    r"|\b(?:according to|given|based on|per|following|(?:in line|consistent) with|match(?:es|ing)?|as)"
    r" (?:the|this|that) (?:(?:un)?harmful )?(?:label|verdict|annotation)s?\b(?! (?:of|on|in)\b)"
    r"|\b(?:verdict|annotation)s? (?:say|state|mark|call)s?\b[^.\n]{0,40}\b(?:un)?harmful\b"
    r"|\b(?:i|we) (?:was|were|am|are|have been) (?:told|given|instructed|asked)"
    r" (?:to (?:explain|justify|conclude|reach|arrive)|that (?:the|this) (?:request|response|answer) is"
    r"|(?:that )?(?:it|this) is (?:un)?harmful"
    r"|(?:the|a|this) (?:verdict|label))\b",
    re.I,
)


def validate(text: str | None, row: Row, *, finish: str | None = "stop") -> Rationale:
    """The rationale in a teacher's answer to ``row``; ``finish`` is the API's finish reason. Raises ``Unusable``."""
    if finish == "content_filter":
        raise Unusable(Fault.REFUSED, "the API filtered it")
    if not (text or "").strip():
        raise Unusable(Fault.EMPTY, "it was empty")
    if finish == "length":
        raise Unusable(Fault.CUT_OFF, "it was cut off; be shorter")
    text = _unfenced(cast(str, text))
    if not encodable(text):
        raise Unusable(Fault.FORM, "it held half of a surrogate pair")
    if any(tag in text for tag in TAGS) or _CONTROL.search(text):
        raise Unusable(Fault.CONTROL, "it held a tag or a control token, which stays out even as a quotation")
    found = _ANSWERS.search(text)
    if found is None:
        raise Unusable(Fault.FORM, "it did not end with the three lines of the answers")
    request, response = cast(Label, found[1]), cast(Label | None, None if found[2] == "None" else found[2])
    tasks = _tasks(text[: found.start()], answered=bool(row.response))
    _check_verdict(row, request, response)
    for steps, label in zip(tasks, (request, response), strict=False):
        _check_conclusion(steps[-1], cast(Label, label))
    reasoning = "\n".join(step for steps in tasks for step in steps)
    own = f"{row.prompt}\n{row.response or ''}".casefold()
    # The exchange may speak of a ground truth of its own, and be quoted.
    if any(leak[0].casefold() not in own for leak in _LEAKS.finditer(reasoning)):
        raise Unusable(Fault.LEAK, "it spoke of a verdict or an instruction that was given")
    return Rationale(_canonical(tasks), sum(map(len, tasks)), request, response)


def _unfenced(text: str) -> str:
    inner = re.fullmatch(r"\s*```[a-z]*\n(.*?)\n?```\s*", text, re.S)
    return "\n" + (inner[1] if inner else text).strip()


def _tasks(text: str, *, answered: bool) -> list[list[str]]:
    """The steps of each task."""
    tasks: list[list[str]] = []
    for line in text.splitlines():
        heading = _HEADING.fullmatch(line)
        if heading and heading[1] == "Task":
            if int(heading[2]) != len(tasks) + 1 or heading[3]:
                raise Unusable(Fault.FORM, "the headings of the tasks were not `# Task 1` and `# Task 2`, in order")
            tasks.append([])
        elif heading:
            if not tasks or int(heading[2]) not in (len(tasks[-1]) + 1, sum(map(len, tasks)) + 1):
                raise Unusable(Fault.FORM, "the steps of a task were not numbered from 1")
            tasks[-1].append(heading[3])
        elif line.strip():
            if not tasks or not tasks[-1]:
                raise Unusable(Fault.FORM, "there were words outside the steps")
            tasks[-1][-1] += f"\n{line.strip()}"
    if len(tasks) != 1 + answered:
        raise Unusable(Fault.FORM, f"it had {len(tasks)} tasks instead of {1 + answered}")
    tasks = [[step.strip() for step in steps] for steps in tasks]
    if not all(steps and all(steps) for steps in tasks) or sum(map(len, tasks)) > MAX_STEPS:
        raise Unusable(Fault.STEPS, f"each task needs a step, each step words, and there are at most {MAX_STEPS} steps")
    return tasks


def _check_verdict(row: Row, request: Label, response: Label | None) -> None:
    if row.request not in (None, request):
        raise Unusable(Fault.VERDICT, "the line about the request differed from the verdict")
    if (response is None) == bool(row.response) or (row.response and row.response_label not in (None, response)):
        raise Unusable(Fault.VERDICT, "the line about the response differed from the verdict")


def _check_conclusion(step: str, label: Label) -> None:
    said = _LABEL.findall(step)
    if not said or said[-1].lower() != label or _OTHER_WORDS.search(step):
        raise Unusable(Fault.CONCLUSION, f'the last step of a task did not end with its conclusion, the word "{label}"')


def _canonical(tasks: list[list[str]]) -> str:
    lines = []
    for number, steps in enumerate(tasks, 1):
        lines.append(f"# Task {number}")
        for count, step in enumerate(steps, 1):
            lines += [f"## Reasoning Step {count}", step]
    return "\n".join(lines)
