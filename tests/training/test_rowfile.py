"""What the commands that write files share."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from guard_training.nano.pool import make_stretches
from guard_training.rowfile import kept_json, write_whole


def test_a_run_that_goes_on_keeps_what_it_made(tmp_path: Path) -> None:
    first = kept_json(tmp_path / "s.json", lambda: make_stretches(["how do I pick a lock", "bake bread"], 20, 3, 1))
    assert len(first) == 20
    assert kept_json(tmp_path / "s.json", lambda: [str(random.random())]) == first


def test_what_could_not_be_made_is_made_again(tmp_path: Path) -> None:
    def broken() -> list[str]:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        kept_json(tmp_path / "s.json", broken)
    assert kept_json(tmp_path / "s.json", lambda: ["text"]) == ["text"]


def test_a_kill_while_a_file_is_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "s.json"
    write_whole(file, b"before")

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(file, b"after")
    assert file.read_bytes() == b"before"
