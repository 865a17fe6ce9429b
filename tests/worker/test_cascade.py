"""How much the guard thinks: what each mode runs, where hybrid thinks, what that costs, and what stays an error."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.guard.parse import completion
from guard_middleware.types import Judging, Label, Usage
from guard_middleware.worker.batching import Ran
from guard_middleware.worker.calibration import Calibration, Scale
from guard_middleware.worker.cascade import Judged, Planned, cascade
from guard_middleware.worker.engine import Generation, GuardPrompt
from guard_middleware.worker.windows import Judgement

REASON, LABEL, HYBRID = Judging(), Judging("label"), Judging("hybrid", 0.1, 0.9)
NONE = Calibration()


def prompt(number: int, *, answered: bool = False) -> Planned:
    return GuardPrompt((number,), (), answered, 50), 1


def label(score: float) -> Label:
    return "harmful" if score >= 0.5 else "unharmful"


def output(asked: GuardPrompt, request: float, response: float | None = None) -> Generation:
    """A label costs 1 token, a reasoning 20, 15 of them thought."""
    reasoning = f"Step 1: {asked.ids[0]}." if asked.think else ""
    tokens, thought = (20, 15) if asked.think else (1, 0)
    text = completion(reasoning, label(request), None if response is None else label(response))
    return Generation(text, 100, tokens, thought, request, response, "stop")


class Engine:
    """Gives each prompt its scores, and is told what was asked. ``thinks`` are the scores after reasoning."""

    def __init__(
        self,
        labels: Sequence[float | tuple[float, float] | GuardError],
        thinks: Sequence[float | tuple[float, float] | GuardError | Generation] = (),
    ) -> None:
        self.labels, self.thinks = labels, thinks or labels
        self.asked: list[tuple[bool, list[int]]] = []

    async def run(self, planned: Sequence[Planned]) -> list[Ran[Generation]]:
        prompts = [one for one, _ in planned]
        self.asked.append((prompts[0].think, [one.ids[0] for one in prompts]))
        assert len({one.think for one in prompts}) == 1
        return [Ran(self._result(one), 0.25, 2.0 if one.think else 0.5) for one in prompts]

    def _result(self, asked: GuardPrompt) -> Generation | GuardError:
        found = (self.thinks if asked.think else self.labels)[asked.ids[0]]
        match found:
            case GuardError() | Generation():
                return found
            case (request, response):
                return output(asked, request, response)
            case score:
                return output(asked, score)


def judged(engine: Engine, judging: Judging, *prompts: Planned, calibration: Calibration = NONE) -> Judged:
    async def work() -> Judged:
        return await cascade(prompts or [prompt(0)], judging, engine.run, calibration)

    return asyncio.run(work())


def scores(found: Judged) -> list[float | None]:
    return [
        one.response_score if isinstance(one, Judgement) and one.response is not None else one.request_score
        for one in found.outcomes
        if isinstance(one, Judgement)
    ]


@pytest.mark.parametrize(
    ("judging", "asked", "score", "thought", "usage"),
    [
        (REASON, [(True, [0])], 0.8, True, Usage(100, 20, 15)),
        (LABEL, [(False, [0])], 0.4, False, Usage(100, 1, 0)),
        (HYBRID, [(False, [0]), (True, [0])], 0.8, True, Usage(200, 21, 15)),
        (Judging("hybrid", 0.5, 0.9), [(False, [0])], 0.4, False, Usage(100, 1, 0)),
    ],
)
def test_each_mode_runs_what_it_says_and_counts_what_it_ran(
    judging: Judging, asked: object, score: float, thought: bool, usage: Usage
) -> None:
    engine = Engine([0.4], [0.8])
    found = judged(engine, judging)
    assert engine.asked == asked
    assert (scores(found), found.thought) == ([score], thought)
    (outcome,) = found.outcomes
    assert isinstance(outcome, Judgement)
    assert outcome.usage == usage
    assert bool(outcome.reasoning) == thought
    assert found.queue_seconds == 0.25 * len(engine.asked)


@pytest.mark.parametrize(
    ("score", "thinks"),
    [(0.0, False), (0.0999, False), (0.1, True), (0.5, True), (0.9, True), (0.9001, False), (1.0, False)],
)
def test_hybrid_thinks_from_the_lower_bound_to_the_upper_both_included(score: float, thinks: bool) -> None:
    assert judged(Engine([score]), HYBRID).thought is thinks


def test_hybrid_thinks_only_in_the_windows_whose_score_is_uncertain() -> None:
    engine = Engine([0.01, 0.3, 0.99, 0.6], [0.5, 0.05, 0.5, 0.7])
    found = judged(engine, HYBRID, *map(prompt, range(4)))
    assert engine.asked == [(False, [0, 1, 2, 3]), (True, [1, 3])]
    assert scores(found) == [0.01, 0.05, 0.99, 0.7]


def test_of_an_answer_its_own_score_decides_and_windows_of_the_request_are_not_thought_about() -> None:
    engine = Engine([0.5, (0.5, 0.01), (0.01, 0.5)])
    judged(engine, HYBRID, prompt(0), prompt(1, answered=True), prompt(2, answered=True))
    assert engine.asked == [(False, [0, 1, 2]), (True, [2])]


CUT = Generation("<think>\nStep 1: and", 100, 50, 50, None, None, "length")
GARBLED = Generation("no verdict", 100, 2, 2, None, None, "stop")


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [
        (CUT, GuardErrorKind.TRUNCATED),
        (GARBLED, GuardErrorKind.UNPARSEABLE),
        (GuardError("timeout"), GuardErrorKind.TIMEOUT),
    ],
)
def test_the_label_never_stands_in_for_a_reasoning_that_failed(
    outcome: Generation | GuardError, kind: GuardErrorKind
) -> None:
    (found,) = judged(Engine([0.6], [outcome]), HYBRID).outcomes
    assert isinstance(found, GuardError)
    assert found.kind is kind


@pytest.mark.parametrize("judging", [LABEL, HYBRID])
def test_a_guard_without_a_label_of_its_own_is_an_error_and_is_not_made_to_reason(judging: Judging) -> None:
    engine = Engine([GuardError("unsupported")], [0.2])
    (found,) = judged(engine, judging).outcomes
    assert isinstance(found, GuardError)
    assert found.kind is GuardErrorKind.UNSUPPORTED
    assert [think for think, _ in engine.asked] == [False]


def test_an_overloaded_worker_is_no_verdict_in_the_second_pass_either() -> None:
    class Full(Engine):
        async def run(self, planned: Sequence[Planned]) -> list[Ran[Generation]]:
            if planned[0][0].think:
                raise GuardError("overloaded")
            return await super().run(planned)

    with pytest.raises(GuardError, match="overloaded"):
        judged(Full([0.5]), HYBRID)


def test_bounds_are_held_against_calibrated_scores_and_each_kind_has_its_own_calibration() -> None:
    flat = Calibration({("label", "request"): Scale(4.0), ("reason", "request"): Scale(0.5)}, "c")
    engine = Engine([0.95], [0.8])
    assert not judged(engine, HYBRID).thought
    found = judged(engine, HYBRID, calibration=flat)  # sigmoid(logit(0.95) / 4) = 0.68
    assert found.thought
    assert scores(found) == [pytest.approx(16 / 17)]
    assert scores(judged(engine, LABEL, calibration=replace(flat, scales={("label", "response"): Scale(4.0)}))) == [
        0.95
    ]
