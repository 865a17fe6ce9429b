"""Temperature scaling of a guard's scores (Guo et al. 2017, section 4.2), on rows it was not trained on.

A calibrated score is sigmoid((logit(score) + shift) / temperature): the order of scores, and so every curve, stays as
it is. Scores without reasoning are first shifted to where those with it stand, so that the two agree on what harm is.
``calibration`` makes what ``guard_middleware.worker.calibration`` reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from guard_middleware.types import REASON, Judging
from guard_middleware.worker.calibration import METHOD, Scale
from guard_middleware.worker.weights import ModelFacts
from guard_training.evaluation import curves
from guard_training.evaluation.metrics import scored
from guard_training.evaluation.outcomes import SIDES, Outcome, Side
from guard_training.evaluation.stats import Array

#: Rows of each class that a temperature needs.
LEAST = 15
_CLIP = 1e-6
#: Temperatures that are tried, evenly in their logarithm.
_TEMPERATURES = np.geomspace(0.05, 20.0, 401)


def kinds(facts: ModelFacts) -> dict[str, Judging]:
    """How a guard is asked for each kind of verdict that it gives; one that was taught a form gives those of it."""
    found = {"reason": REASON}
    if facts.form is None or "label_answered" in facts.form:
        found["label"] = Judging("label")
    return found


def scaled(scores: Array, temperature: float, shift: float = 0.0) -> Array:
    """Calibrated scores."""
    out: Array = 1 / (1 + np.exp(-(_logit(scores) + shift) / temperature))
    return out


def temperature(harmful: Sequence[bool], scores: Sequence[float]) -> float:
    """The temperature of the lowest log-loss, each class weighing one half: how many of a row set are harmful is
    the collector's choice."""
    truth, given = np.asarray(harmful, dtype=bool), np.asarray(scores, dtype=np.float64)
    weight = np.where(truth, 0.5 / truth.sum(), 0.5 / (~truth).sum())

    def loss(one: float) -> float:
        called = np.clip(scaled(given, one), _CLIP, 1 - _CLIP)
        return float(-(weight * np.log(np.where(truth, called, 1 - called))).sum())

    return float(min(_TEMPERATURES, key=loss))


def calibration(revision: str, **kinds: Sequence[Outcome]) -> dict[str, Any]:
    """The content of ``calibration.json`` for the weights ``revision``, from outcomes with the guard's own scores, by
    kind (``reason``, ``label``).

    For each side ``{temperature, rows, harmful, calibration_error, brier}``, the last two before and after (after: each
    half of the rows by a temperature fitted to the other half); None where there are too few rows of a class, or all
    scores are equal.
    """
    shifts = _shifts(kinds["reason"], kinds["label"]) if {"reason", "label"} <= set(kinds) else {}
    found = {
        kind: {
            side: _side(*scored(outcomes, side)[:2], shifts.get(side, 0.0) if kind == "label" else 0.0)
            for side in SIDES
        }
        for kind, outcomes in kinds.items()
    }
    return {"method": METHOD, "revision": revision, **found}


def _shifts(reason: Sequence[Outcome], label: Sequence[Outcome]) -> dict[Side, float]:
    """By how much the logit with reasoning is above that without, as the median over the rows that have both."""
    thought, found = {one.id: one for one in reason}, dict[Side, float]()
    for side in SIDES:
        pairs = [(thought[one.id].score(side), one.score(side)) for one in label if one.id in thought]
        both = np.array([pair for pair in pairs if None not in pair], dtype=np.float64)
        if len(both) >= 2 * LEAST:
            logits = _logit(both)
            found[side] = round(float(np.median(logits[:, 0] - logits[:, 1])), 4)
    return found


def _logit(scores: Array) -> Array:
    kept = np.clip(scores, _CLIP, 1 - _CLIP)
    out: Array = np.log(kept / (1 - kept))
    return out


def calibrated(outcomes: Sequence[Outcome], sides: Mapping[str, Any]) -> list[Outcome]:
    """Outcomes with the scores that the worker gives once it reads ``sides`` of their kind."""

    def score(one: Outcome, side: Side) -> float | None:
        given, fitted = one.score(side), sides[side]
        return given if given is None or fitted is None else Scale(fitted["temperature"], fitted["shift"])(given)

    return [
        dataclasses.replace(one, request_score=score(one, "request"), response_score=score(one, "response"))
        for one in outcomes
    ]


def _side(harmful: Sequence[bool], scores: Sequence[float], shift: float) -> dict[str, Any] | None:
    count = sum(harmful)
    if min(count, len(harmful) - count) < LEAST or len(set(scores)) < 2:
        return None
    given = np.asarray(scores, dtype=np.float64)
    found = round(temperature(harmful, scaled(given, 1.0, shift).tolist()), 4)
    after = _crossed(np.asarray(harmful, dtype=bool), given, shift).tolist()
    return {
        "temperature": found,
        "shift": shift,
        "rows": len(harmful),
        "harmful": count,
        "calibration_error": [_error(harmful, scores), _error(harmful, after)],
        "brier": [curves.brier(harmful, scores), curves.brier(harmful, after)],
    }


def _crossed(truth: Array, scores: Array, shift: float) -> Array:
    """Each half of the rows with the temperature of the other half, so that no row is measured by its own fit."""
    rng = np.random.default_rng(0)
    half = np.empty(len(truth), dtype=int)
    for label in (False, True):
        half[truth == label] = rng.permutation(np.sum(truth == label)) % 2
    out = np.empty_like(scores)
    for mine in (0, 1):
        others = half != mine
        fitted = temperature(truth[others].tolist(), scaled(scores[others], 1.0, shift).tolist())
        out[~others] = scaled(scores[~others], fitted, shift)
    return out


def _error(harmful: Sequence[bool], scores: Sequence[float]) -> float | None:
    return curves.calibration_error(curves.reliability(harmful, scores))
