"""``training/runs/reproduce.sh`` with a stand-in for guard-train: its order, its resume, and that the CLI takes it."""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import subprocess
from pathlib import Path

import pytest

from guard_training.corpus.rows import held_out
from guard_training.update.lessons import HELD_BACK

SCRIPT = Path("training/runs/reproduce.sh")
STEPS = [
    *("nano", "baseline", "calibrate", "evaluate", "corpus", "reject", "augment", "grpo", "calibrate", "evaluate"),
    *("evaluate", "evaluate", "evaluate", "publish"),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"id": f"r{n}", "source": "made", "prompt": "x", "image": "a.png" if n == 3 else None} for n in range(60)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for name in ("train", "train_benign_extra", "dev"):
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text))
    return folder


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """Writes its arguments down, a line each; fails where the file ``fail`` names its command. A check of rows finds no
    leak. Every evaluation finds the means in the file ``means``, without one that RL lost."""
    script = tmp_path / "guard-train"
    script.write_text(
        f'#!/bin/sh\nfor a in "$@"; do printf "%s\\t" "$a"; done >> {tmp_path}/log; echo >> {tmp_path}/log\n'
        f'grep -q "^$1$" {tmp_path}/fail 2>/dev/null && exit 1\n'
        f'means=$(cat {tmp_path}/means 2>/dev/null || echo \'{{"f1": {{"difference": -0.01}}}}\')\n'
        'test "$1" = corpus && cp "$4" "$8"\n'
        f'echo "{{\\"against\\": {{\\"means\\": $means}}}}" > {tmp_path}/out/rl.bank.json\nexit 0\n'
    )
    script.chmod(0o755)
    return script


def reproduce(tmp_path: Path, data: Path, stand_in: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, data, tmp_path / "out"],
        env={"PATH": "/usr/bin:/bin", "GUARD_TRAIN": str(stand_in), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def commands(tmp_path: Path) -> list[list[str]]:
    return [line.rstrip("\t").split("\t") for line in (tmp_path / "log").read_text().splitlines()]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(exit_on_error=False)
    parts = made.add_subparsers()
    for name in sorted(set(STEPS)):
        importlib.import_module(f"guard_training.commands.{name}").add(parts)
    return made


@pytest.mark.parametrize(
    "environment", [{}, {"LIMIT": "5", "RL_SET": "epochs=2 seed=3", "WORDNET": "/w", "RECIPE": "tiny.yaml"}]
)
def test_every_command_is_one_that_the_command_line_takes(
    tmp_path: Path, data: Path, stand_in: Path, environment: dict[str, str]
) -> None:
    done = reproduce(tmp_path, data, stand_in, **environment)
    assert done.returncode == 0, done.stderr
    given = commands(tmp_path)
    assert [one[0] for one in given] == STEPS
    parsed = [parser().parse_args(one) for one in given]
    assert parsed[0].recipe.resolve() == Path(environment.get("RECIPE", "training/recipes/nano.yaml")).resolve()
    assert parsed[3].limit == (5 if environment else None)
    assert (parsed[5].keep, parsed[5].balance) == ("1..3", True)
    assert parsed[7].set == (["epochs=2", "seed=3"] if environment else [])
    assert parsed[9].against == parsed[3].outcomes
    assert parsed[11].against == parsed[10].outcomes
    for step in ("R-SFT", "RL", "revision", "all"):
        assert f"== {step}: " in done.stdout


def test_nothing_is_learnt_fitted_or_chosen_by_a_row_that_is_measured_on(
    tmp_path: Path, data: Path, stand_in: Path
) -> None:
    assert reproduce(tmp_path, data, stand_in).returncode == 0
    given = [parser().parse_args(one) for one in commands(tmp_path)]
    learning = [one for name, one in zip(STEPS, given, strict=True) if name in ("nano", "calibrate", "corpus")]
    assert [one.against for one in learning] == [[data / "dev.jsonl.gz"]] * 4
    assert given[4].output == given[5].rows
    assert given[10].data == given[11].data == tmp_path / "out/nano/held_out/bank.jsonl"


@pytest.mark.parametrize(
    ("means", "best"),
    [
        ({"f1": {"difference": 0.01}}, "rl"),
        ({"f1": {"difference": 0.0}, "false_positive_rate": {"difference": 0.01}}, "rl"),
        ({"f1": {"difference": 0.03}, "false_positive_rate": {"difference": 0.011}}, "nano"),
        ({"f1": {"difference": -0.001}}, "nano"),
        ({"recall": {"difference": 0.1}}, "nano"),
    ],
)
def test_rl_is_published_where_its_mean_f1_is_not_worse_at_about_as_few_false_positives(
    tmp_path: Path, data: Path, stand_in: Path, means: dict[str, object], best: str
) -> None:
    (tmp_path / "means").write_text(json.dumps(means))
    assert reproduce(tmp_path, data, stand_in).returncode == 0
    *_, first, second, _, _, held_out, published = (parser().parse_args(one) for one in commands(tmp_path))
    model = tmp_path / "out" / best / "model"
    assert first.output.parent == tmp_path / "out/rl/model"  # calibrated before it is measured
    assert held_out.data == tmp_path / "out/nano/held_out/held_out.jsonl"
    assert (held_out.model, published.revision) == (str(model), model)
    measured = second.json if best == "rl" else tmp_path / "out" / "nano.json"
    assert published.results == [measured, held_out.json]


def test_what_is_done_is_not_done_again_and_a_failure_stops(tmp_path: Path, data: Path, stand_in: Path) -> None:
    (tmp_path / "fail").write_text("augment\n")
    assert reproduce(tmp_path, data, stand_in).returncode == 1
    assert [one[0] for one in commands(tmp_path)] == STEPS[:7]
    (tmp_path / "fail").unlink()
    again = reproduce(tmp_path, data, stand_in)
    assert again.returncode == 0
    assert "== R-SFT: done before" in again.stdout
    assert [one[0] for one in commands(tmp_path)] == STEPS[:7] + STEPS[6:]


def test_a_folder_that_was_begun_with_other_values_is_refused(tmp_path: Path, data: Path, stand_in: Path) -> None:
    assert reproduce(tmp_path, data, stand_in).returncode == 0
    other = reproduce(tmp_path, data, stand_in, LIMIT="5")
    assert (other.returncode, len(commands(tmp_path))) == (2, len(STEPS))
    assert "begun with other values" in other.stderr


def test_a_revision_that_is_there_is_checked_and_not_made_again(tmp_path: Path, data: Path, stand_in: Path) -> None:
    (tmp_path / "out" / "revision").mkdir(parents=True)
    assert reproduce(tmp_path, data, stand_in).returncode == 0
    assert commands(tmp_path)[-1] == ["publish", str(tmp_path / "out" / "revision")]


def test_rl_looks_at_every_nth_row_of_text(tmp_path: Path, data: Path, stand_in: Path) -> None:
    """The fourth row has an image; two more are held back from training."""
    reproduce(tmp_path, data, stand_in, RL_EVERY="10")
    kept = [json.loads(line)["id"] for line in (tmp_path / "out" / "candidates.jsonl").read_text().splitlines()]
    trained = [f"r{n}" for n in range(60) if n != 3 and not held_out(f"r{n}", HELD_BACK)]
    assert len(trained) == 57
    assert kept == trained[::10]


def test_a_bad_line_of_the_training_file_ends_nothing(tmp_path: Path, data: Path, stand_in: Path) -> None:
    good = {"id": 7, "source": "made", "prompt": "x"}
    lines = [b"{cut off", b'"no row"', b'{"source": "no id"}', b"\xff", b"[" * 100_000, b"", json.dumps(good).encode()]
    (data / "train.jsonl.gz").write_bytes(gzip.compress(b"".join(line + b"\n" for line in lines)))
    done = reproduce(tmp_path, data, stand_in, RL_EVERY="1")
    assert done.returncode == 0, done.stderr
    assert not held_out("7", HELD_BACK)
    assert json.loads((tmp_path / "out" / "candidates.jsonl").read_text()) == good


@pytest.mark.parametrize("arguments", [[], ["nowhere", "out"]])
def test_without_data_it_says_how_it_is_used(arguments: list[str]) -> None:
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "training/runs/reproduce.sh DATA OUT" in done.stderr
    assert "RL_KEEP" in done.stderr
