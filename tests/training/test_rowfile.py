"""What the commands that write files share."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from guard_training.nano.pool import make_stretches
from guard_training.rowfile import kept_json, write_json, write_whole


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


def test_what_is_no_plain_file_is_written_to_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", b"said")
    assert os.read(reader, 9) == b"said"
    os.close(reader)


def test_half_of_a_surrogate_pair_is_written_as_json_spells_it(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", {"é": "\ud800"})
    assert (tmp_path / "new" / "a.json").read_text() == '{\n "é": "\\ud800"\n}\n'
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"é": "\ud800"}
