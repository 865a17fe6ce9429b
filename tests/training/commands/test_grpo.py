from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from guard_training.tuning.settings import RecipeError
from tests.support.commands import call

QUIET = dict(identical_max=2, distinct_ratio=0, format_min=-1, length_ratio=99, truncated_max=2, gap_growth=9)


@pytest.fixture
def recipe(tmp_path: Path, folder: Path) -> Path:
    """grpo-nano's, with a guard, an architecture and lengths of seconds."""
    value = yaml.safe_load(Path("training/recipes/grpo-nano.yaml").read_text())
    value |= dict(model=str(folder), architecture=str(folder / "config.json"), reader=False, rollout_prompts=2,
                  update_prompts=1, group=2, batch_per_device=2, max_new_tokens=5, prompt_tokens=700, alarms=QUIET,
                  max_pixels=28 * 28 * 9)  # fmt: skip
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(value))
    return file


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    Image.new("RGB", (60, 60), (200, 9, 9)).save(tmp_path / "a.png")
    lines = [
        {"id": f"r{n}", "source": "made", "prompt": f"bake bread {n}", "image": "a.png" if n == 2 else None,
         "prompt_label": "harmful" if n % 2 else "unharmful"}
        for n in range(4)
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*map(json.dumps, lines), '{"id": "broken"}']) + "\n")
    return file


def test_a_run_writes_a_guard_and_names_the_rows_it_left_out(
    recipe: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("grpo", "--rows", rows, "--recipe", recipe, "--output", tmp_path / "out", "--cpu")
    said = " ".join(capsys.readouterr().out.split())
    assert "1 rows left out: rows.jsonl:5:" in said
    assert "CPU: 4 steps" in said
    assert "peak memory" in said
    made = {file.name for file in (tmp_path / "out" / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "guard.json"} <= made
    assert list((tmp_path / "out" / "runs").rglob("events.out.tfevents*"))
    call("grpo", "--rows", rows, "--recipe", recipe, "--output", tmp_path / "out", "--cpu")
    assert "is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_share_a_rollout_of_both_modalities(recipe: Path, rows: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--no-python", str(Path(sys.executable).parent / "guard-train"), "grpo", "--rows", str(rows)]
    command += ["--recipe", str(recipe), "--set", "batch_per_device=1", "--set", "reader=true"]
    command += ["--output", str(tmp_path / "out"), "--cpu"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (tmp_path / "out" / "completions" / "step-000000.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert len({json.loads(line)["id"] for line in lines}) == 2
    assert done.stdout.count("peak memory") == 1
    # one process reads the image, the other what it wrote down
    assert done.stdout.count("reading rows") == 1
    assert len((tmp_path / "out" / "drawn.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "out" / "model" / "guard.json").is_file()


@pytest.mark.parametrize("name", ["grpo-3b", "grpo-3b-eco", "grpo-7b"])
def test_a_dry_run_checks_the_real_architecture_without_weights(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("grpo", "--recipe", name, "--dry-run", "--output", tmp_path / "out")
    said = capsys.readouterr().out
    assert "46 updates" in said
    assert "8192 completions per rollout" in " ".join(said.split())
    assert ("3.75 B" if "3b" in name else "8.29 B") in said
    assert "0.191 at first" in said
    assert not (tmp_path / "out").exists()


def test_a_dry_run_names_the_rows_it_left_out(
    recipe: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("grpo", "--rows", rows, "--recipe", recipe, "--dry-run", "--output", tmp_path / "out")
    said = " ".join(capsys.readouterr().out.split())
    assert "1 rows left out: rows.jsonl:5:" in said


def test_a_rehearsal_does_two_updates_and_prints_seconds_and_memory(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("grpo", "--recipe", recipe, "--rehearse", "--output", tmp_path / "out")
    said = " ".join(capsys.readouterr().out.split())
    first, second = (float(x) for x in said.split(" took ")[1].split(" s ")[0].split(", "))
    assert first > 0
    assert second > 0
    assert math.isfinite(float(said.split("peak memory ")[1].split()[0]))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ([], ValueError, "--rows"),
        (["--set", "reward.beta=0.01"], RecipeError, "floor <= beta"),
        (["--set", "banana=1"], RecipeError, "banana"),
        (["--recipe", "grpo-nano", "--dry-run"], RecipeError, "names no architecture"),
    ],
)
def test_mistakes_are_told_with_their_remedy(
    arguments: list[str], error: type[Exception], words: str, recipe: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        call("grpo", "--recipe", recipe, "--output", tmp_path / "out", *arguments)
