"""A process that `guard-train` started ends with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guard_training import process
from guard_training.process import TERMINATED, run_child

_PARENT = """
import sys
from guard_training.process import ended_by_sigterm, run_child
with ended_by_sigterm():
    run_child([sys.executable, "-c", sys.argv[1]])
"""
_CHILD = "import os, pathlib, time; pathlib.Path({file!r}).write_text(str(os.getpid())); time.sleep(600)"


def _until(happened: object) -> None:
    deadline = time.monotonic() + 30
    while not happened() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.02)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_sigterm_ends_what_was_started_too(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", _PARENT, _CHILD.format(file=str(file))]) as parent:
        _until(lambda: file.exists() and file.read_text())
        child = int(file.read_text())
        assert _lives(child)
        parent.terminate()
        assert parent.wait(30) == TERMINATED
    assert not _lives(child)


def test_a_child_that_does_not_listen_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pid"
    deaf = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {_CHILD.format(file=str(file))}"

    def broken_off(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        monkeypatch.undo()
        monkeypatch.setattr(process, "GRACE_SECONDS", 0.2)
        _until(lambda: file.exists() and file.read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", broken_off)
    with pytest.raises(KeyboardInterrupt):
        run_child([sys.executable, "-c", deaf])
    assert not _lives(int(file.read_text()))


@pytest.mark.parametrize("status", [0, 1, 143])
def test_the_exit_status_is_the_childs(status: int) -> None:
    assert run_child([sys.executable, "-c", f"raise SystemExit({status})"]) == status


def test_a_child_stopped_by_ctrl_c_stops_the_parent() -> None:
    with pytest.raises(KeyboardInterrupt):
        run_child([sys.executable, "-c", "raise SystemExit(130)"])
