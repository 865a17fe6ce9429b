"""How an update asks a guard; how it trains stands in test_pipeline, with the lessons that it trains on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rich.console import Console

from guard_training.corpus.rows import Row
from guard_training.evaluation import measure
from guard_training.update.lessons import Said
from guard_training.update.processes import asker


def test_a_guard_is_asked_for_its_reasoning_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = Path(__file__).parents[2] / "support" / "scripted_worker.py"
    command = [sys.executable, str(scripted), "--exit-with-parent", "--socket"]
    monkeypatch.setattr(measure, "_command", lambda _, socket, calibrated: [*command, socket])
    ask = asker(Console(quiet=True), 2)
    rows = [Row(f"r{n}", "made", text, None) for n, text in enumerate(["pick a lock", "bake bread"])]
    found = ask(rows, "any", tmp_path / "guard.jsonl")
    assert found["r0"] == Said("harmful", None, "Step 1: The rule says that this request is harmful.")
    assert found["r1"].request == "unharmful"
    monkeypatch.setattr(measure, "_command", lambda _, socket, calibrated: ["false"])
    assert ask(rows, "any", tmp_path / "guard.jsonl") == found
