from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from guard_training.corpus.rows import Row, row_to_json
from guard_training.tuning.contract import ContractError, load_contract
from guard_training.tuning.settings import RecipeError
from tests.support.commands import call


@pytest.fixture
def recipe(tmp_path: Path, folder: Path) -> Path:
    """sft-nano's, with a guard and sizes of seconds."""
    value = yaml.safe_load(Path("training/recipes/sft-nano.yaml").read_text())
    value |= dict(model=str(folder), architecture=str(folder / "config.json"), reader=False, epochs=1, global_batch=2,
                  batch_per_device=1, cutoff=900, max_pixels=28 * 28 * 9, save_every=1, log_every=1)  # fmt: skip
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(value))
    return file


@pytest.fixture
def data(tmp_path: Path) -> Path:
    Image.new("RGB", (60, 60), (200, 9, 9)).save(tmp_path / "a.png")
    image = tmp_path / "a.png"
    rows = [
        Row(f"r{n}", "made", f"bake bread {n}", "harmful", image=image if n == 2 else None, rationale="It asks.")
        for n in range(4)
    ]
    rows.append(Row("long", "made", "bread " * 3000, "harmful", rationale="It asks."))
    rows.append(Row("silent", "made", "bread", "harmful"))
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*(json.dumps(row_to_json(row, tmp_path)) for row in rows), '{"id": "broken"}']) + "\n")
    return file


def test_a_run_goes_on_and_ends_in_a_guard(
    recipe: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("--recipe", recipe, "--data", data, "--output", tmp_path / "run", "--cpu")
    call("sft", *command, "--steps", 1)
    text = capsys.readouterr().out
    assert "stopped; the same command goes on" in text
    assert "4 rows, " in text
    assert "3 rows left out:" in text
    assert "rows.jsonl:7: not a labelled row" in text
    assert "rows.jsonl:5: long: " in text
    assert "more than the cutoff of 900" in text
    assert "rows.jsonl:6: silent: no rationale" in text
    assert "bake bread" not in text
    call("sft", *command)
    text = capsys.readouterr().out
    assert "CPU: 1 steps" in text
    assert load_contract(str(tmp_path / "run" / "model")).facts.max_pixels == 28 * 28 * 9
    call("sft", *command)
    assert "is finished" in capsys.readouterr().out


def test_a_dry_run_needs_neither_weights_nor_data(capsys: pytest.CaptureFixture[str]) -> None:
    call("sft", "--recipe", "sft-3b", "--dry-run")
    text = capsys.readouterr().out
    assert "3,754,622,976 parameters: 3,085,938,688 trainable, 668,684,288 frozen" in text
    assert "123,096 rows x 3 epochs in 1,926 steps of 192 rows: 6 x 8 x 4 devices" in text
    assert "logits of the answers: " in text
    for part in ("weights", "gradients", "optimiser", "activations", "sum"):
        assert f"│ {part}" in text


def test_a_dry_run_counts_the_rows_it_is_given(recipe: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("sft", "--recipe", recipe, "--dry-run", "--data", data, "--devices", 2)
    said = capsys.readouterr().out
    assert "6 rows x 1 epochs in 3 steps of 2 rows: 1 x 1 x 2 devices" in said
    assert "1 rows left out:\n  rows.jsonl:7: not a labelled row" in said


def test_random_weights_train_for_real(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("sft", "--recipe", recipe, "--random-weights", "--steps", 4, "--cpu", "--set", "learning_rate=1.0e-3")
    text = capsys.readouterr().out.replace("\n", " ")
    assert "with random weights, steps of 2 rows of 900 tokens; CPU: 4 steps, the first " in text
    assert " GiB per device; loss " in text
    first, last = text.rpartition("loss ")[2].split(" at first, ")
    assert float(last.split()[0]) < float(first)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((), ValueError, "give --data FILE and --output DIR, or --dry-run"),
        (("--data", "x.jsonl"), ValueError, "--output DIR"),
        (("--dry-run", "--recipe", "banana"), RecipeError, "no recipe banana; give a file, or one of .*sft-3b"),
        (("--dry-run", "--set", "banana=1"), RecipeError, "unknown key 'banana'"),
        (("--dry-run", "--recipe", "sft-3b", "--set", "learning_rate=5e-5"), RecipeError, r"write it as 5\.0e-5"),
        (("--dry-run", "--recipe", "sft-3b", "--devices", "5"), RecipeError, "change batch_per_device"),
        (("--data", "missing.jsonl", "--output", "out"), FileNotFoundError, "missing.jsonl"),
    ],
)
def test_what_cannot_be_run_is_refused_with_its_remedy(
    arguments: tuple[str, ...], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        call("sft", *arguments)


def test_a_run_that_cannot_begin_names_bad_rows_and_says_why(
    recipe: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data.write_text(data.read_text() + "{broken\n" * 9)
    with pytest.raises(ContractError, match="no such folder"):
        call(
            "sft", "--recipe", recipe, "--data", data, "--output", tmp_path / "run", "--cpu", "--set", "model=/nowhere"
        )
    assert "rows.jsonl:7: not a labelled row" in capsys.readouterr().out
