"""Calibrated scores: what is read, what is refused, and what a temperature does to a score."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard_middleware.errors import ConfigError
from guard_middleware.types import Usage
from guard_middleware.worker.calibration import Calibration, Scale, read
from guard_middleware.worker.windows import Judgement

SIDE = {"temperature": 2.0, "rows": 90}
STATED = {"method": "temperature", "revision": "r1", "reason": {"request": SIDE, "response": None}, "label": {}}
SCORES = st.floats(0, 1)


def folder(path: Path, stated: Any) -> Path:
    (path / "calibration.json").write_text(stated if isinstance(stated, str) else json.dumps(stated), "utf-8")
    return path


@given(SCORES, SCORES, st.floats(0.05, 20), st.floats(-9, 9))
def test_a_scale_keeps_the_order_of_scores_and_without_a_shift_their_side_of_one_half(
    a: float, b: float, temperature: float, shift: float
) -> None:
    plain, shifted = Scale(temperature), Scale(temperature, shift)
    assert (plain(a) > 0.5) == (a > 0.5) or abs(a - 0.5) < 1e-9
    assert a >= b or shifted(a) <= shifted(b)
    assert 0.0 <= shifted(a) <= 1.0


def test_a_calibrated_score_is_its_shifted_logit_divided_by_the_temperature() -> None:
    assert Scale(1.0)(0.9) == pytest.approx(0.9)
    assert Scale(2.0)(0.9) == pytest.approx(0.75)
    assert Scale(0.5)(0.9) == pytest.approx(81 / 82)
    assert Scale(1.0, -math.log(9))(0.9) == pytest.approx(0.5)
    assert Scale(0.01, -1000.0)(0.0) == 0.0
    assert Scale(0.01, 1000.0)(1.0) == 1.0


def test_without_a_file_scores_stay_as_they_are(tmp_path: Path) -> None:
    none = read(tmp_path, "r1")
    assert none == Calibration()
    assert none.revision("r1") == "r1"


def test_each_kind_and_side_has_its_own_temperature(tmp_path: Path) -> None:
    stated = {**STATED, "label": {"response": {"temperature": 0.5}}}
    found = read(folder(tmp_path, stated), "r1")
    judged = Judgement("harmful", "harmful", 0.9, 0.9, "", Usage())
    thought, brief = found.of(judged, thought=True), found.of(judged, thought=False)
    assert (thought.request_score, thought.response_score) == (pytest.approx(0.75), 0.9)
    assert (brief.request_score, brief.response_score) == (0.9, pytest.approx(81 / 82))
    assert found.of(Judgement("harmful", None, 0.9, None, "", Usage()), thought=True).response_score is None


def test_a_label_without_reasoning_follows_its_shifted_score_and_one_with_reasoning_stays() -> None:
    scales = {(kind, side): Scale(1.0, -2.0) for kind in ("label", "reason") for side in ("request", "response")}
    judged = Judgement("harmful", "harmful", 0.7, 0.95, "", Usage())
    brief = Calibration(scales).of(judged, thought=False)
    assert (brief.request, brief.response) == ("unharmful", "harmful")
    assert brief.request_score < 0.5 < (brief.response_score or 0.0)
    cooler = Calibration({("reason", "request"): Scale(9.0)}).of(judged, thought=True)
    assert (cooler.request, cooler.response) == ("harmful", "harmful")


def test_the_revision_of_a_verdict_changes_with_the_calibration(tmp_path: Path) -> None:
    first = read(folder(tmp_path, STATED), "r1").revision("r1")
    second = read(folder(tmp_path, {**STATED, "label": {"request": SIDE}}), "r1").revision("r1")
    assert first.startswith("r1+")
    assert second.startswith("r1+")
    assert first != second


@pytest.mark.parametrize(
    ("stated", "why"),
    [
        ("", "not a calibration"),
        ("[]", "not a calibration"),
        ({**STATED, "method": "isotonic"}, "not a calibration"),
        ({**STATED, "reason": {"request": {"temperature": 0}}}, "not a calibration"),
        ({**STATED, "reason": {"request": {"temperature": -1.0}}}, "not a calibration"),
        ({**STATED, "reason": {"request": {"temperature": math.nan}}}, "not a calibration"),
        ({**STATED, "reason": {"request": {"temperature": math.inf}}}, "not a calibration"),
        ({**STATED, "reason": {"request": {"temperature": True}}}, "not a calibration"),
        ({**STATED, "reason": {"request": {**SIDE, "shift": 0.1}}}, "not a calibration"),
        ({**STATED, "label": {"request": {**SIDE, "shift": math.inf}}}, "not a calibration"),
        ({**STATED, "label": {"request": {**SIDE, "shift": "no"}}}, "not a calibration"),
        ({**STATED, "reason": {"request": {"rows": 9}}}, "not a calibration"),
        ({**STATED, "reason": [1]}, "not a calibration"),
        ({"method": "temperature", "revision": "r1", "request": SIDE}, "not a calibration"),
        ({**STATED, "hybrid": {"request": SIDE}}, "not a calibration"),
        ({"method": "temperature", "reason": {"request": SIDE}}, "not a calibration"),
        ({**STATED, "revision": "r0"}, "other weights"),
    ],
)
def test_a_calibration_of_another_form_or_of_other_weights_is_refused(tmp_path: Path, stated: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as error:
        read(folder(tmp_path, stated), "r1")
    assert "guard-train calibrate" in str(error.value)
