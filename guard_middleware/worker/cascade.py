"""How much the guard thinks about one question: between the plan of its prompts and the merge of what came of them.

``reason`` runs every prompt with reasoning and ``label`` every prompt without. ``hybrid`` runs them without, and then
with reasoning those whose calibrated score is uncertain: of an answer its own score, for it is what is asked about; a
window that shows no answer beside one that does is never thought about. What was thought about counts, at the price of
both; an engine with a prefix cache finds the prompt in it.

An error stays an error: where the reasoning fails, or is cut off, the label before it does not stand in.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from guard_middleware.errors import GuardError
from guard_middleware.types import Judging, Usage
from guard_middleware.worker.batching import Ran
from guard_middleware.worker.calibration import Calibration
from guard_middleware.worker.engine import Generation, GuardPrompt
from guard_middleware.worker.windows import Judgement, judge

#: (prompt, its tokens)
Planned: TypeAlias = tuple[GuardPrompt, int]
Run: TypeAlias = Callable[[Sequence[Planned]], Awaitable[Sequence[Ran[Generation]]]]


@dataclass(frozen=True, slots=True)
class Judged:
    """What came of the prompts, in order. The seconds are the sums over the passes of each one's slowest prompt."""

    outcomes: tuple[Judgement | GuardError, ...]
    thought: bool
    queue_seconds: float
    run_seconds: float


async def cascade(planned: Sequence[Planned], judging: Judging, run: Run, calibration: Calibration) -> Judged:
    """Judges the prompts of one question. Raises what ``run`` raises."""
    first = await _pass(planned, run, calibration, think=judging.mode == "reason")
    if judging.mode != "hybrid":
        return first
    answered = any(prompt.answered for prompt, _ in planned)
    uncertain = [
        n
        for n, ((prompt, _), outcome) in enumerate(zip(planned, first.outcomes, strict=True))
        if prompt.answered == answered and _uncertain(outcome, judging)
    ]
    if not uncertain:
        return first
    second = await _pass([planned[n] for n in uncertain], run, calibration, think=True)
    outcomes = list(first.outcomes)
    for n, outcome in zip(uncertain, second.outcomes, strict=True):
        outcomes[n] = _after(outcomes[n], outcome)
    return Judged(
        tuple(outcomes), True, first.queue_seconds + second.queue_seconds, first.run_seconds + second.run_seconds
    )


async def _pass(planned: Sequence[Planned], run: Run, calibration: Calibration, *, think: bool) -> Judged:
    asked = [(replace(prompt, think=think), tokens) for prompt, tokens in planned]
    ran = await run(asked)
    outcomes = tuple(_outcome(prompt, one.result, calibration) for (prompt, _), one in zip(asked, ran, strict=True))
    return Judged(outcomes, think, max(one.queue_seconds for one in ran), max(one.run_seconds for one in ran))


def _outcome(prompt: GuardPrompt, result: Generation | GuardError, calibration: Calibration) -> Judgement | GuardError:
    if isinstance(result, GuardError):
        return result
    try:
        return calibration.of(judge(prompt, result), thought=prompt.think)
    except GuardError as error:
        return error


def _uncertain(outcome: Judgement | GuardError, judging: Judging) -> bool:
    if isinstance(outcome, GuardError):
        return False
    score = outcome.request_score if outcome.response_score is None else outcome.response_score
    return judging.low <= score <= judging.high


def _after(label: Judgement | GuardError, thought: Judgement | GuardError) -> Judgement | GuardError:
    """What was thought, at the price of the label too."""
    if isinstance(label, GuardError) or isinstance(thought, GuardError):
        return thought
    before, now = label.usage, thought.usage
    usage = Usage(before.prompt + now.prompt, before.completion + now.completion, before.reasoning + now.reasoning)
    return replace(thought, usage=usage)
