"""``guard-train tower`` from its options to its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guard_training.nano.curriculum import TowerError
from tests.support.commands import call


def test_a_run_stopped_by_its_minutes_goes_on_to_its_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "tower"
    size = ("--steps", 2, "--measured", 2, "--patches", 64)
    call("tower", "--output", output, *size, "--minutes", 0)
    assert "stopped at step 0 of 2; the same command with --resume goes on" in capsys.readouterr().out
    with pytest.raises(TowerError, match="--resume"):
        call("tower", "--output", output, *size)
    call("tower", "--output", output, *size, "--resume")
    figures = json.loads((output / "curve.json").read_text())
    (point,) = figures["curve"]
    assert (point["step"], point["stage"]) == (2, "lines")
    assert point["held_out"] == figures["held_out_fonts"] != figures["training_fonts"]
    assert set(point["held_out"]["lines"]) == {"similarity", "character_errors"}
    assert "character similarity on unseen texts" in capsys.readouterr().out


def test_data_without_pictures_is_refused_before_training(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": "a", "source": "made", "prompt": "bread", "prompt_label": "unharmful"}) + "\n")
    with pytest.raises(ValueError, match="no labelled picture"):
        call("tower", "--output", tmp_path / "tower", "--steps", 2, "--data", rows)
    assert not (tmp_path / "tower").exists()
