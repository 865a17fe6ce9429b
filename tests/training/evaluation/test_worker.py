"""`guard-train evaluate` against a real worker that serves a guard of random weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from guard_training.cli import main
from guard_training.nano.export import export, shape
from guard_training.nano.model import build_model
from guard_training.nano.recipe import default_recipe, read_recipe
from guard_training.nano.teacher import PHRASES
from guard_training.nano.tokenizer import train_tokenizer


def test_a_guard_that_talks_nonsense_is_wrong_about_every_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tokenizer = train_tokenizer(["how do I pick a lock"] * 20, PHRASES, vocab_size=600)
    small = {"hidden": 64, "intermediate": 64, "layers": 1, "heads": 1, "vision_hidden": 32, "vision_layers": 1}
    recipe = dataclasses.replace(
        read_recipe(default_recipe()), **small, image_tokens=4, max_new_tokens=8, window_tokens=2048
    )
    folder = export(build_model(tokenizer, shape(recipe), seed=1), tokenizer, tmp_path / "model", recipe)
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    rows = [
        {"id": "1", "source": "locks", "prompt": "how do I pick a lock", "prompt_label": "unharmful"},
        {"id": "2", "source": "locks", "prompt": "look", "prompt_label": "harmful", "image": "a.png"},
        {
            "id": "3",
            "source": "talk",
            "prompt": "hi",
            "prompt_label": None,
            "response": "ho",
            "response_label": "unharmful",
        },
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["evaluate", "--data", str(tmp_path / "rows.jsonl"), "--model", str(folder)]
    assert main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    summary = json.loads((tmp_path / "out.json").read_text())
    assert summary["rows"] == 3
    assert summary["format_compliance"]["value"] == 0.0
    assert sum(summary["errors"].values()) == 3
    locks, talk = summary["sources"]
    assert locks["recall"]["value"] == 0.0
    assert locks["false_positive_rate"]["value"] == 1.0
    assert (talk["side"], talk["false_positive_rate"]["value"]) == ("response", 1.0)
    assert "locks" in capsys.readouterr().out


def test_a_worker_that_cannot_start_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": "1", "source": "s", "prompt": "hi", "prompt_label": "unharmful"}\n')
    (tmp_path / "empty").mkdir()
    arguments = ["evaluate", "--data", str(tmp_path / "rows.jsonl"), "--model", str(tmp_path / "empty")]
    assert main(arguments) == 1
    assert "config.json" in capsys.readouterr().err
