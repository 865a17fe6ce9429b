from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from guard_middleware.worker.calibration import FILE, Scale, read
from guard_training.evaluation.outcomes import Outcome
from guard_training.update.calibration import LEAST, calibrated, calibration, scaled, temperature


@pytest.mark.parametrize("true", [0.5, 1.0, 2.5])
def test_the_temperature_is_found_that_the_scores_were_made_with(true: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 20_000)
    harmful = rng.random(20_000) < 1 / (1 + np.exp(-logits))
    scores = 1 / (1 + np.exp(-logits * true))
    assert temperature(harmful.tolist(), scores.tolist()) == pytest.approx(true, rel=0.1)


def test_scaling_keeps_the_order_and_the_ends() -> None:
    scores = np.array([0.0, 0.1, 0.5, 0.9, 1.0])
    for one in (0.1, 1.0, 9.0):
        found = scaled(scores, one)
        assert (np.diff(found) > 0).all()
        assert found[2] == pytest.approx(0.5)
        assert ((found >= 0) & (found <= 1)).all()


def _outcomes(count: int, scores: list[float]) -> list[Outcome]:
    return [
        Outcome(f"{n}", "s", "text", "harmful" if n % 2 else "unharmful", None, request_score=scores[n % len(scores)])
        for n in range(count)
    ]


def test_overconfident_scores_come_out_better_calibrated() -> None:
    # right in 3 of 4 cases, and sure of itself in all
    scores = [0.01, 0.99, 0.01, 0.99, 0.99, 0.01, 0.01, 0.99]
    outcomes = _outcomes(400, scores)
    found = calibration("r1", reason=outcomes, label=[])
    assert (found["method"], found["revision"]) == ("temperature", "r1")
    assert found["label"] == {"request": None, "response": None}
    assert found["reason"]["response"] is None
    request = found["reason"]["request"]
    assert request["temperature"] > 2
    assert request["rows"] == 400
    assert request["harmful"] == 200
    before, after = request["calibration_error"]
    assert after < before - 0.1
    assert request["brier"][1] < request["brier"][0]
    after_it = [one.request_score for one in calibrated(outcomes, found["reason"])]
    assert after_it == pytest.approx(scaled(np.array([one.request_score for one in outcomes]), request["temperature"]))
    assert calibrated(outcomes, found["label"]) == outcomes


def test_what_is_written_is_what_the_worker_reads(tmp_path: Path) -> None:
    found = calibration("r1", label=_outcomes(400, [0.01, 0.99, 0.99, 0.99]))
    (tmp_path / FILE).write_text(json.dumps(found))
    assert read(tmp_path, "r1").scales == {("label", "request"): Scale(found["label"]["request"]["temperature"])}


def test_scores_without_reasoning_are_brought_to_where_those_with_it_stand() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 400)
    reason = [replace(one, request_score=_chance(x)) for one, x in zip(_outcomes(400, [0.5]), logits, strict=True)]
    label = [replace(one, request_score=_chance(x + 0.7)) for one, x in zip(reason, logits, strict=True)]
    found = calibration("r1", reason=reason, label=label)
    assert found["label"]["request"]["shift"] == pytest.approx(-0.7, abs=1e-3)
    assert found["reason"]["request"]["shift"] == 0.0
    assert found["label"]["request"]["temperature"] == found["reason"]["request"]["temperature"]
    moved = [[one.request_score for one in calibrated(given, found[kind])] for kind, given in
             (("reason", reason), ("label", label))]  # fmt: skip
    assert moved[0] == pytest.approx(moved[1], abs=1e-3)


def _chance(logit: float) -> float:
    return float(1 / (1 + np.exp(-logit)))


@pytest.mark.parametrize(
    ("count", "scores"), [(2 * LEAST - 2, [0.1, 0.9]), (100, [0.5]), (0, [0.5])], ids=["few", "equal", "none"]
)
def test_without_rows_or_spread_nothing_is_claimed(count: int, scores: list[float]) -> None:
    assert calibration("r1", reason=_outcomes(count, scores))["reason"]["request"] is None
