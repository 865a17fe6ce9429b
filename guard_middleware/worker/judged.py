"""What the questions to an endpoint's guard found: one by one, thought about again, and together. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from guard_middleware.errors import GuardError
from guard_middleware.types import Judging, Label, Usage
from guard_middleware.wire import ModerationRequest
from guard_middleware.worker.guards.base import Parsed, Question, Target


@dataclass(frozen=True, slots=True)
class Judged:
    """One target of one question: its label, the probability of *harmful* (None where the server gives no log
    probabilities), and the rest of what was said with it."""

    target: Target
    label: Label
    score: float | None
    parsed: Parsed

    def unsure(self, judging: Judging) -> bool:
        """Whether it is to be thought about; a label alone says nothing of how sure it is."""
        return self.score is None or judging.low <= self.score <= judging.high


#: what one question found, and what it cost
Found: TypeAlias = tuple[list[Judged], Usage] | GuardError

#: The score of a label that the guard contradicts itself about, or whose probability cannot be read where the server
#: gives some: on the label's side of 0.5 and no further, so that an ensemble asks the next guard.
UNSURE: Mapping[Label, float] = {"harmful": 0.5, "unharmful": 0.49}


def unsure(found: Found, request: ModerationRequest) -> bool:
    """As in ``cascade``: of an answer its own score counts, for it is what is asked about."""
    target: Target = "request" if request.conversation.answer is None else "response"
    if isinstance(found, GuardError):
        return False
    return any(one.target == target and one.unsure(request.judging) for one in found[0])


def after(label: Found, thought: Found) -> Found:
    """What was thought, at the price of the label too."""
    if isinstance(label, GuardError) or isinstance(thought, GuardError):
        return thought
    return thought[0], total([label[1], thought[1]])


def settled(questions: Sequence[Question], found: Sequence[Found]) -> tuple[list[Judged], Usage]:
    """What all questions found, or the first error.

    A harmful answer stands whatever failed beside it, and so does a harmful request that is asked about alone;
    where the request's own label is what failed, it shares the answer's.
    """
    errors = [one for one in found if isinstance(one, GuardError)]
    answers = [one for one in found if not isinstance(one, GuardError)]
    judged = [finding for findings, _ in answers for finding in findings]
    if errors:
        asked = "response" if any("response" in question.targets for question in questions) else "request"
        harmful = [one for one in judged if one.target == asked and one.label == "harmful"]
        if not harmful:
            raise errors[0]
        if merged(judged, "request") is None:
            judged.append(replace(harmful[0], target="request"))
    return judged, total(usage for _, usage in answers)


def merged(judged: Iterable[Judged], target: Target) -> tuple[Label, float] | None:
    """*harmful* if any says so, with the highest score."""
    found = [one for one in judged if one.target == target]
    if not found:
        return None
    label: Label = "harmful" if any(one.label == "harmful" for one in found) else "unharmful"
    return label, max(float(one.label == "harmful") if one.score is None else one.score for one in found)


def total(usages: Iterable[Usage]) -> Usage:
    counted = list(usages)
    return Usage(
        prompt=sum(one.prompt for one in counted),
        completion=sum(one.completion for one in counted),
        reasoning=sum(one.reasoning for one in counted),
    )
