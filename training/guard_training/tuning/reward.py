"""The length-aware safety reward of online RL (paper, equation 10). Pure functions.

    r = (-1 + r_safety) / min(l_norm, beta)^2,    l_norm = length / longest, at least ``floor``

A right completion earns 0 whatever its length; a wrong one is negative, and less so the longer it is, until ``beta``
of the longest: the guard is pushed to think longer where it errs, and never paid for length alone. beta = 1 is
GuardReasoner-VL, beta = 1/6 is Eco.

``r_safety`` is the format gate times the mean of what is right. The gate is the product's own strict parser, so that
the guard cannot be paid for an output that the gateway would refuse. A side without a label drops out of the mean,
and the weights of the other grow; the released code counts a missing label as unharmful instead, which pays half the
reward for leaving an unanswered request's ``Response: None`` alone. It also reads the *first* ``<result>`` and the
first sample's labels of a concatenated row; here the labels are those of the row itself, so a mixed row's are used.

``floor`` bounds the reward of a very short failure: without one an empty output is worth minus infinity, and after
the division by the group's standard deviation nothing else in the group would count. At 0.05 it is -400.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from guard_middleware.errors import GuardError
from guard_middleware.guard.parse import Parsed, parse
from guard_middleware.types import Label
from guard_training.tuning.settings import RecipeError

Unit = Literal["tokens", "characters", "none"]


@dataclass(frozen=True, slots=True)
class Shape:
    """How length enters. ``longest`` is in ``unit``; unit ``none`` is the ablation r = -1 + r_safety.

    The released code measures characters of 3072 (Eco: 500 of 3072).
    """

    unit: Unit = "tokens"
    longest: int = 1024
    beta: float = 1.0
    floor: float = 0.05

    def __post_init__(self) -> None:
        if self.longest < 1 or not 0 < self.floor <= self.beta <= 1:
            raise RecipeError("the reward needs longest >= 1 and 0 < floor <= beta <= 1")


@dataclass(frozen=True, slots=True)
class Truth:
    """A row's labels; None where it has none. ``answered`` is whether the prompt holds an answer to judge."""

    request: Label | None
    response: Label | None
    answered: bool

    def __post_init__(self) -> None:
        if self.response is not None and not self.answered:
            raise ValueError("a label for an answer that is not judged")
        if self.request is None and self.response is None:
            raise ValueError("a row without any label cannot be rewarded; leave it out")


def verdict(text: str, truth: Truth) -> Parsed | None:
    """What the product would read in a completion, or None where it would refuse it."""
    try:
        return parse(text, answered=truth.answered)
    except GuardError:
        return None


def safety(parsed: Parsed | None, truth: Truth) -> float:
    """r_safety: 0 for a broken format, else the share of the labelled sides that are right."""
    if parsed is None:
        return 0.0
    sides = [(parsed.request, truth.request), (parsed.response, truth.response)]
    labelled = [said == true for said, true in sides if true is not None]
    return sum(labelled) / len(labelled)


def reward(r_safety: float, length: float, shape: Shape) -> float:
    """r of equation 10. ``length`` is in ``shape.unit``; the result lies in [-1 / floor^2, 0]."""
    if shape.unit == "none":
        return r_safety - 1.0
    share = min(max(length / shape.longest, shape.floor), shape.beta)
    return (r_safety - 1.0) / share**2


def score(text: str, tokens: int, truth: Truth, shape: Shape) -> tuple[float, float, Parsed | None]:
    """(reward, r_safety, verdict) of one completion of ``tokens`` tokens, control tokens removed from ``text``."""
    parsed = verdict(text, truth)
    right = safety(parsed, truth)
    return reward(right, len(text) if shape.unit == "characters" else tokens, shape), right, parsed
