"""What `guard-train` says where a command cannot go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from guard_training.cli import main


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_file_that_cannot_be_read_is_told_in_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    if kind == "folder":
        rows.mkdir()
    assert main(["augment", "--rows", str(rows), "--output", str(tmp_path / "out.jsonl")]) == 1
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert told.startswith("guard-train: ")
    assert "rows.jsonl" in told


def test_a_guard_that_is_not_there_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "1", "source": "s", "prompt": "hi", "prompt_label": "unharmful"}\n')
    given = [
        "calibrate",
        "--model",
        "nowhere",
        "--data",
        str(rows),
        "--every-row",
        "--output",
        str(tmp_path / "c.json"),
    ]
    assert main(given) == 1
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert told.startswith("guard-train: nowhere")


def test_an_output_in_the_place_of_a_file_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, blocked = tmp_path / "rows.jsonl", tmp_path / "file"
    rows.write_text('{"id": "1", "source": "s", "prompt": "hi", "prompt_label": "unharmful"}\n')
    blocked.write_text("")
    assert main(["augment", "--rows", str(rows), "--output", str(blocked / "out.jsonl")]) == 1
    assert "guard-train: " in capsys.readouterr().err
