"""Several guards, one verdict: what a rule makes of their verdicts and errors, and a guard that asks them by it.

``combine`` is the whole rule, pure, and says as early as it can what the outcome is. A member *says harmful* where its
score reaches the policy's threshold, so that one verdict of an ensemble decides as its members' own would have:

    any              one says harmful: harmful, whatever became of the others
                     else an error of any member is the outcome
                     else unharmful
    all              an error of any member is the outcome
                     else harmful where every one says so who has a say
    first_confident  in order: the first whose score is at most ``confident[0]`` or at least ``confident[1]`` decides;
                     an error is no confidence, but for one that the content provokes, which decides;
                     the last one asked decides alone, its error included

A member that finds no harm and was told to ignore part of the content has no say under ``all`` and no confidence. What
nobody read whose verdict counts is ``ignored`` of the outcome too, and no policy lets that pass as *unharmful*.

So no member's error is ever taken for *unharmful*. Nor does an error undo what was found: where it would be the outcome
and somebody asked before says harmful, the outcome is harmful, so that a policy which lets errors pass does not let
this pass. Of several errors one that the content provokes counts first, since policies block it whatever else they let
pass.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TypeVar

from guard_middleware.config import Ensemble, SourcePolicy
from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.policy import PROVOKED, risk
from guard_middleware.types import NOT_NEEDED, Label, Opinion, Source, Usage, Verdict
from guard_middleware.wire import Guard, ModerationRequest

Outcome = Verdict | GuardError
_N = TypeVar("_N", int, float)


def combine(ensemble: Ensemble, threshold: float, source: Source, said: Mapping[str, Outcome]) -> Outcome | None:
    """The outcome of what the members have ``said`` so far, by name, or None while it is open.

    Never one that a later answer would decide otherwise. Scores are those that policy counts (``policy.risk``).
    """
    known = {name: _usable(said[name], source) for name in ensemble.of if name in said}
    if ensemble.rule == "first_confident":
        return _first_confident(ensemble, threshold, source, known)
    verdicts = _verdicts(known)
    if ensemble.rule == "any" and any(_risk(one, source) >= threshold for one in verdicts.values()):
        return _merged(ensemble, verdicts)
    if len(known) < len(ensemble.of):
        return None
    if len(verdicts) < len(known):
        return _broken(ensemble, threshold, source, known)
    if ensemble.rule == "all":
        heard = [one for one in verdicts.values() if not one.ignored or _risk(one, source) >= threshold]
        return _merged(ensemble, verdicts, heard)
    return _merged(ensemble, verdicts)


def _first_confident(
    ensemble: Ensemble, threshold: float, source: Source, known: Mapping[str, Outcome]
) -> Outcome | None:
    asked: dict[str, Outcome] = {}
    for name in ensemble.of:
        if name not in known:
            return None
        asked[name] = one = known[name]
        last = name == ensemble.of[-1]
        if isinstance(one, GuardError):
            if last or one.kind in PROVOKED:
                return _broken(ensemble, threshold, source, asked)
        elif last or _confident(ensemble, one, source):
            return _merged(ensemble, _verdicts(asked), [one])
    raise AssertionError


def _confident(ensemble: Ensemble, verdict: Verdict, source: Source) -> bool:
    """A label without a score is none."""
    assert ensemble.confident is not None
    low, high = ensemble.confident
    value = _risk(verdict, source)
    return verdict.score(source) is not None and (value >= high or (value <= low and not verdict.ignored))


def _broken(ensemble: Ensemble, threshold: float, source: Source, asked: Mapping[str, Outcome]) -> Outcome:
    """What becomes of an error among those who were ``asked``: harm that one of them found, else the error."""
    verdicts = _verdicts(asked)
    worst = max(verdicts.values(), key=lambda one: _risk(one, source), default=None)
    if worst is not None and _risk(worst, source) >= threshold:
        return _merged(ensemble, verdicts, [worst])
    return _failed({name: one for name, one in asked.items() if isinstance(one, GuardError)})


def _verdicts(known: Mapping[str, Outcome]) -> dict[str, Verdict]:
    return {name: one for name, one in known.items() if isinstance(one, Verdict)}


def _usable(outcome: Outcome, source: Source) -> Outcome:
    if isinstance(outcome, Verdict):
        sources: tuple[Source, ...] = ("input",) if outcome.response is None else ("input", "output")
        if source not in sources or any(risk(outcome, one) is None for one in sources):
            return GuardError(GuardErrorKind.UNPARSEABLE, f"the verdict does not judge the {source}")
    return outcome


def _risk(verdict: Verdict, source: Source) -> float:
    value = risk(verdict, source)
    assert value is not None
    return value


def _failed(errors: Mapping[str, GuardError]) -> GuardError:
    """One error for all; that of the last where several weigh the same, for it is the last that had to decide."""
    worst = next((e for e in errors.values() if e.kind in PROVOKED), list(errors.values())[-1])
    waits = [e.retry_after for e in errors.values() if e.retry_after is not None]
    message = "; ".join(f"{name}: {e.message}" for name, e in errors.items())
    return GuardError(worst.kind, message, retry_after=max(waits, default=None))


def _merged(ensemble: Ensemble, verdicts: Mapping[str, Verdict], say: Sequence[Verdict] = ()) -> Verdict:
    """One verdict in the name of those that gave one; labels and scores are the rule's of those who have a ``say``,
    which is everybody where nobody else has."""
    every = list(verdicts.values())
    say = say or every
    request, request_score = _voted(ensemble, say, "input")
    response: Label | None = None
    response_score: float | None = None
    if all(one.response is not None for one in every):
        response, response_score = _voted(ensemble, say, "output")
    spent = sum if ensemble.rule == "first_confident" else max  # one after the other, or side by side
    return Verdict(
        request=request,
        response=response,
        request_score=request_score,
        response_score=response_score,
        reasoning="\n\n".join(f"[{name}]\n{one.reasoning}" for name, one in verdicts.items() if one.reasoning),
        usage=Usage(
            sum(one.usage.prompt for one in every),
            sum(one.usage.completion for one in every),
            sum(one.usage.reasoning for one in every),
        ),
        model=f"{ensemble.rule}({', '.join(f'{name}: {one.model}' for name, one in verdicts.items())})",
        revision=", ".join(f"{name}: {one.revision}" for name, one in verdicts.items()),
        categories=tuple(dict.fromkeys(category for one in every for category in one.categories)),
        drawn_text=next((one.drawn_text for one in every if one.drawn_text), ()),
        timings=_by_name([one.timings for one in every], spent),
        cached=all(one.cached for one in every),
        left_out=_by_name([one.left_out for one in every], max),
        judging=every[0].judging,
        thought=any(one.thought for one in every),
        ignored=tuple(kind for kind in say[0].ignored if all(kind in one.ignored for one in say)),
    )


def _by_name(pairs: Iterable[tuple[tuple[str, _N], ...]], fold: Callable[[list[_N]], _N]) -> tuple[tuple[str, _N], ...]:
    found: dict[str, list[_N]] = {}
    for name, number in chain.from_iterable(pairs):
        found.setdefault(name, []).append(number)
    return tuple((name, fold(numbers)) for name, numbers in found.items())


def _voted(ensemble: Ensemble, verdicts: Sequence[Verdict], source: Source) -> tuple[Label, float]:
    """Label and score of one source; with the worst score for ``any`` and the best for ``all`` every threshold cuts
    the ensemble as the rule cuts its members."""
    strict, best = (all, min) if ensemble.rule == "all" else (any, max)
    harmful = strict(one.label(source) == "harmful" for one in verdicts)
    return "harmful" if harmful else "unharmful", best(_risk(one, source) for one in verdicts)


class EnsembleGuard:
    """Asks the members that ``rules.ensemble`` names, out of ``guards``, and gives their one outcome.

    ``any`` and ``all`` ask them side by side; ``first_confident`` in order, each with an equal share of the time that
    is left, so that one that hangs leaves time for the next. Whoever is not needed any more is cancelled. The outcome
    carries each member's own (``opinions``).
    """

    def __init__(self, rules: SourcePolicy, guards: Mapping[str, Guard]) -> None:
        if rules.ensemble is None:
            raise ValueError("a policy without an ensemble")
        self._ensemble, self._threshold = rules.ensemble, rules.threshold
        self._guards = {name: guards[name] for name in rules.ensemble.of}

    async def moderate(self, request: ModerationRequest) -> Outcome:
        """See ``wire.Guard``."""
        if not 0.0 < request.deadline < math.inf:
            return GuardError(GuardErrorKind.TIMEOUT, "no time was left to ask the guard")
        poll = _Poll(self._guards, request)
        try:
            while (outcome := combine(self._ensemble, self._threshold, request.source, poll.said)) is None:
                await (poll.next() if self._ensemble.rule == "first_confident" else poll.all())
        finally:
            await poll.aclose()
        opinions = poll.opinions()
        if isinstance(outcome, GuardError):
            return GuardError(outcome.kind, outcome.message, retry_after=outcome.retry_after, opinions=opinions)
        return replace(outcome, opinions=opinions)


class _Poll:
    """One question to several guards: who was asked, who has answered, and how long each took."""

    def __init__(self, guards: Mapping[str, Guard], request: ModerationRequest) -> None:
        self.said: dict[str, Outcome] = {}
        self._guards, self._request = guards, request
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._tasks: dict[str, asyncio.Task[Outcome]] = {}
        self._asked: dict[str, float] = {}
        self._ended: dict[str, float] = {}

    async def next(self) -> None:
        """Asks the next one and waits for it."""
        name = next(name for name in self._guards if name not in self.said)
        left = self._request.deadline - (self._loop.time() - self._began)
        await self._answers({name: left / (len(self._guards) - len(self.said))})

    async def all(self) -> None:
        """Asks everybody at the first call; waits until one more has answered."""
        await self._answers({} if self._tasks else dict.fromkeys(self._guards, self._request.deadline))

    async def aclose(self) -> None:
        """Nobody is needed any more."""
        open_ = [task for task in self._tasks.values() if not task.done()]
        for task in open_:
            task.cancel()
        await asyncio.gather(*open_, return_exceptions=True)

    def opinions(self) -> tuple[Opinion, ...]:
        """What each of those who were asked said, in order."""
        now = self._loop.time()
        return tuple(
            _opinion(name, self.said.get(name), asked - self._began, self._ended.get(name, now) - asked)
            for name, asked in self._asked.items()
        )

    async def _answers(self, asks: Mapping[str, float]) -> None:
        for name, deadline in asks.items():
            self._asked[name] = self._loop.time()
            question = self._guards[name].moderate(replace(self._request, deadline=max(deadline, 0.001)))
            self._tasks[name] = asyncio.create_task(question, name=f"guard-{name}")
        pending = [task for name, task in self._tasks.items() if name not in self.said]
        await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for name, task in self._tasks.items():
            if name not in self.said and task.done():
                self.said[name] = task.result()
                self._ended[name] = self._loop.time()


def _opinion(name: str, outcome: Outcome | None, began: float, seconds: float) -> Opinion:
    if isinstance(outcome, Verdict):
        return Opinion(name, outcome, None, began, seconds)
    return Opinion(name, None, NOT_NEEDED if outcome is None else outcome.kind.value, began, seconds)
