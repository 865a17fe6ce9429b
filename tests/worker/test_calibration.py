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
from guard_middleware.worker.calibration import Calibration, read, scaled
from guard_middleware.worker.windows import Judgement

SIDE = {"temperature": 2.0, "rows": 90}
STATED = {"method": "temperature", "revision": "r1", "reason": {"request": SIDE, "response": None}, "label": {}}
SCORES = st.floats(0, 1)


def folder(path: Path, stated: Any) -> Path:
    (path / "calibration.json").write_text(stated if isinstance(stated, str) else json.dumps(stated), "utf-8")
    return path


@given(SCORES, SCORES, st.floats(0.05, 20))
def test_a_temperature_keeps_the_order_of_scores_and_the_side_of_one_half(a: float, b: float, by: float) -> None:
    assert (scaled(a, by) > 0.5) == (a > 0.5) or abs(a - 0.5) < 1e-9
    assert a >= b or scaled(a, by) <= scaled(b, by)
    assert 0.0 <= scaled(a, by) <= 1.0


def test_a_scaled_score_is_its_logit_divided_by_the_temperature() -> None:
    assert scaled(0.9, 1.0) == pytest.approx(0.9)
    assert scaled(0.9, 2.0) == pytest.approx(0.75)
    assert scaled(0.9, 0.5) == pytest.approx(81 / 82)
    assert math.isfinite(scaled(1.0, 0.05))


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
