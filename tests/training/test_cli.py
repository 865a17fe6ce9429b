"""What `guard-train` says where a command cannot go on."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from guard_training.cli import main
from tests.support.commands import parse


@pytest.mark.parametrize(
    "words",
    [
        "sft --dry-run --steps 0",
        "sft --dry-run --devices 0",
        "nano --data d --output o --stop-after 0",
        "synthesize --rows r --output o --teacher t --image-tokens 0",
        "synthesize --rows r --output o --teacher t --expected-tokens -1",
        *(f"tower --output o {option} 0" for option in ("--steps", "--patches", "--measured", "--limit")),
    ],
)
def test_a_number_of_nothing_is_a_wrong_command_line(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(*words.split())
    assert "is not at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["update", "publish revision"])
def test_a_date_is_checked_before_anything_is_done(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(*command.split(), "--date", "2026-11-21").date == "2026-11-21T00:00:00"
    made = datetime.fromisoformat(parse(*command.split()).date)
    assert abs(datetime.now(UTC) - made) < timedelta(minutes=1)
    with pytest.raises(SystemExit, match="2"):
        parse(*command.split(), "--date", "today")
    assert "--date: today: write it as 2026-11-21" in capsys.readouterr().err


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
