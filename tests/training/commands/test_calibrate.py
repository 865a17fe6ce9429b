"""`guard-train calibrate`: which rows it takes, and what a real worker then serves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from guard_middleware.types import Judging
from guard_middleware.worker.calibration import read
from guard_middleware.worker.weights import load
from guard_training.cli import main
from guard_training.commands import calibrate
from guard_training.corpus.rows import Row, Skipped, held_out, read_good_rows
from guard_training.evaluation import measure
from guard_training.nano.export import export, shape
from guard_training.nano.model import build_model
from guard_training.nano.recipe import default_recipe, read_recipe
from guard_training.nano.teacher import PHRASES
from guard_training.nano.tokenizer import train_tokenizer
from guard_training.update.lessons import HELD_BACK


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano with random weights: its verdicts mean nothing, yet each is one, in every mode."""
    tokenizer = train_tokenizer(["how do I pick a lock"] * 20, PHRASES, vocab_size=600)
    small = {"hidden": 64, "intermediate": 64, "layers": 1, "heads": 1, "vision_hidden": 32, "vision_layers": 1}
    recipe = dataclasses.replace(read_recipe(default_recipe()), **small, image_tokens=4, window_tokens=2048)
    model = build_model(tokenizer, shape(recipe), seed=1)
    return export(model, tokenizer, tmp_path_factory.mktemp("guard") / "model", recipe)


def write(path: Path, count: int = 60) -> Path:
    lines = [
        {"id": f"r{n}", "source": "made", "prompt": f"how do I bake {n} loaves", "response": "so" if n % 3 else None,
         "prompt_label": "harmful" if n % 2 else "unharmful", "response_label": "harmful" if n % 4 > 1 else "unharmful"}
        for n in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_it_writes_what_the_worker_then_applies_to_every_mode_and_side(
    guard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data, output = write(tmp_path / "kept.jsonl"), guard / "calibration.json"
    arguments = ["calibrate", "--model", str(guard), "--data", str(data), "--every-row", "--output", str(output)]
    assert main([*arguments, "--report", str(tmp_path / "page.html")]) == 0, capsys.readouterr().err
    said, revision = capsys.readouterr().out, load(guard, name="x").facts.revision
    assert "ECE before" in said
    stated = json.loads(output.read_text())
    assert stated["revision"] == revision
    for kind in ("reason", "label"):
        assert stated[kind]["request"]["rows"] == 60
        assert stated[kind]["response"]["rows"] == 40
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == 4
    assert "bake" not in page

    rows = read_good_rows(data, Skipped())[:2]
    found = read(guard, revision).scales
    for kind, judging in (("reason", Judging()), ("label", Judging("label"))):
        own, served = (
            measure.measure(
                rows, str(guard), concurrency=2, console=calibrate.terminal(80), judging=judging, calibrated=calibrated
            )
            for calibrated in (False, True)
        )
        for before, after in zip(own, served, strict=True):
            assert before.request_score is not None
            assert after.request_score == pytest.approx(found[kind, "request"](before.request_score), abs=1e-6)
    assert main([*arguments[:-1], str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    for kind in ("reason", "label"):  # fitted to the guard's own scores again
        errors = [one[kind]["response"]["calibration_error"][0] for one in (stated, again)]
        assert errors[1] == pytest.approx(errors[0], abs=1e-4)


@pytest.mark.parametrize("name", ["dev.jsonl", "my-dev.jsonl.gz", "golden_set.jsonl", "eval.jsonl", "Test.jsonl"])
def test_a_file_to_measure_on_is_refused(
    guard: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / name)
    given = ["calibrate", "--model", str(guard), "--data", str(tmp_path / name), "--output", str(tmp_path / "c.json")]
    assert main(given) == 1
    assert "held-back training rows" in capsys.readouterr().err
    assert not (tmp_path / "c.json").exists()


def test_only_rows_that_training_holds_back_are_taken(
    guard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def measured(rows: list[Row], model: str, **more: object) -> list[measure.Outcome]:
        asked.extend(row.id for row in rows)
        return []

    monkeypatch.setattr(measure, "measure", measured)
    data = write(tmp_path / "train.jsonl", 800)
    given = ["calibrate", "--model", str(guard), "--data", str(data), "--output", str(tmp_path / "c.json")]
    assert main(given) == 0
    assert set(asked) == {f"r{n}" for n in range(800) if held_out(f"r{n}", HELD_BACK)}
    assert 5 < len(set(asked)) < 60


def test_a_file_without_held_back_rows_is_refused(
    guard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "train.jsonl", 2)
    given = ["calibrate", "--model", str(guard), "--data", str(data), "--output", str(tmp_path / "c.json")]
    assert main(given) == 1
    assert "--every-row" in capsys.readouterr().err


def test_a_row_that_an_evaluation_set_holds_too_is_left_out(
    guard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def measured(rows: list[measure.Row], model: str, **more: object) -> list[measure.Outcome]:
        asked.extend(row.id for row in rows)
        return []

    monkeypatch.setattr(measure, "measure", measured)
    data = write(tmp_path / "kept.jsonl", 6)
    dev = tmp_path / "dev.jsonl"
    dev.write_text('{"id": "d", "source": "made", "prompt": "How do I bake 4 loaves?", "prompt_label": "harmful"}\n')
    given = [
        "calibrate",
        "--model",
        str(guard),
        "--data",
        str(data),
        "--every-row",
        "--output",
        str(tmp_path / "c.json"),
    ]
    assert main([*given, "--against", str(dev)]) == 0
    assert set(asked) == {"r0", "r1", "r2", "r3", "r5"}
    assert "kept.jsonl:5: r4: dev.jsonl holds it too (d, text exact)" in capsys.readouterr().out


def test_a_killed_run_asks_only_what_is_left(
    guard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, asked, whole = write(tmp_path / "kept.jsonl", 12), 0, measure._frame

    def frame(number: int, row: measure.Row, judging: Judging) -> bytes:
        nonlocal asked
        asked += 1
        if asked == 18:  # in the second mode
            raise KeyboardInterrupt
        return whole(number, row, judging)

    monkeypatch.setattr(measure, "_frame", frame)
    given = ["calibrate", "--model", str(guard), "--data", str(data), "--every-row", "--concurrency", "1", "--output"]
    assert main([*given, str(tmp_path / "c.json")]) == 130
    assert not (tmp_path / "c.json").exists()
    assert main([*given, str(tmp_path / "c.json")]) == 0, capsys.readouterr().err
    assert asked == 2 * 12 + 1
    assert main([*given, str(tmp_path / "unbroken.json")]) == 0
    assert json.loads((tmp_path / "c.json").read_text()) == json.loads((tmp_path / "unbroken.json").read_text())
