"""``guard-gateway weights`` where no gateway runs, and what it says; tests/faults has it beside one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from guard_middleware import cli
from guard_middleware.weights import state
from guard_middleware.weights.directory import WeightsDirectory, now
from guard_middleware.weights.state import Golden
from tests.support.weights import revision


class Operator:
    """Runs commands on one directory; ``out`` and ``err`` are what the last one said."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder / "weights", capsys
        self.directory = WeightsDirectory(self.folder, "nano")
        self.config = folder / "guard.yaml"
        self.config.write_text(json.dumps({"worker": {"model": "nano", "weights": {"directory": str(self.folder)}}}))
        self.out = self.err = ""

    def __call__(self, *argv: str) -> int:
        status = cli.main(["weights", *argv, "--config", str(self.config)])
        self.out, self.err = self._capsys.readouterr()
        return status

    @property
    def state(self) -> state.State:
        return self.directory.read()


@pytest.fixture
def weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Operator:
    return Operator(tmp_path, capsys)


def test_what_is_staged_without_a_gateway_waits_for_one(weights: Operator) -> None:
    revision(weights.folder, "new")
    assert weights("stage", "new") == 0
    assert "it is loaded when one starts" in weights.out
    staged = weights.state.staged
    assert staged is not None
    assert (staged.phase, len(staged.revision.sums or "")) == ("new", 64)
    assert "@" in weights.state.history[-1].by


def test_a_revision_without_card_or_calibration_is_told(weights: Operator) -> None:
    from guard_training.update.revision import write_sums

    folder = revision(weights.folder, "new")
    (folder / "README.md").unlink()
    (folder / "calibration.json").unlink()
    write_sums(folder)
    assert weights("stage", "new") == 0
    assert "new has no card" in weights.err
    assert "new has no calibration" in weights.err


def test_files_that_do_not_match_are_staged_by_force_alone_and_that_is_recorded(weights: Operator) -> None:
    folder = revision(weights.folder, "new")
    (folder / "scripted.json").write_text("{}")
    assert weights("stage", "new") == 2
    assert "changed since SHA256SUMS" in weights.err
    assert weights.state.staged is None
    assert weights("stage", "new", "--force") == 0
    assert "whoever can write there" in weights.err
    staged = weights.state.staged
    assert staged is not None
    assert staged.revision.sums is None
    assert weights.state.history[-1].why.startswith("forced: ")


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["stage", "none"], "no revision none"),
        (["unstage"], "nothing is staged"),
        (["promote"], "start it"),
        (["promote", "--force"], "nothing is staged"),
        (["rollback"], "no previous weights"),
        (["list", "--guard", "large"], "no guard `large`"),
    ],
)
def test_what_cannot_be_done_says_why_and_changes_nothing(weights: Operator, argv: list[str], why: str) -> None:
    before = weights.state
    assert weights(*argv) == 2
    assert why in weights.err
    assert weights.state == before


def test_without_a_gateway_force_and_rollback_say_what_the_next_start_serves(weights: Operator) -> None:
    revision(weights.folder, "new")
    weights("stage", "new")
    assert weights("promote", "--force") == 0
    assert weights.out == "new serves from the next start on\n"
    assert "the decision log and the history" in weights.err
    assert "forced, untried" in weights.state.history[-1].why
    assert weights("rollback") == 0
    assert weights.out == "nano serves from the next start on\n"
    found = weights.state
    assert (found.active.model, found.previous and found.previous.name) == ("nano", "new")


def test_without_a_gateway_an_order_that_nobody_carries_out_can_be_taken_back(weights: Operator) -> None:
    revision(weights.folder, "new")
    weights("stage", "new")
    for change in (
        partial(state.ready, id=1, revision="r-new", golden=Golden(27)),
        partial(state.promote, by="ada"),
    ):
        weights.directory.update(partial(change, at=now()))
    assert weights("stage", "new") == 2
    assert weights("unstage") == 0
    assert (weights.state.staged, weights.state.order) == (None, None)
    assert weights("stage", "new") == 0


def test_list_shows_revisions_roles_the_trial_and_what_was_done(weights: Operator) -> None:
    folder = revision(weights.folder, "new")
    (folder / "lineage.json").write_text(json.dumps({"revision": "r-new", "made": "2026-11-20T08:00:00+00:00"}))
    revision(weights.folder, "spare")
    weights("stage", "new", "--force")
    change = partial(state.ready, id=1, revision="r-new", golden=Golden(27, ("bread",)), at=now())
    weights.directory.update(change)
    assert weights("list") == 0
    lines = [line.split() for line in weights.out.splitlines()]
    assert ["new", "r-new", "2026-11-20", "yes", "yes", "staged:", "ready"] in lines
    assert ["spare", "-", "-", "yes", "yes", "-"] in lines
    assert ["nano", "-", "-", "no", "no", "active"] in lines
    assert "golden set: 26 of 27, broken: bread" in weights.out
    assert "no gateway follows this directory" in weights.out


def test_list_for_a_script(weights: Operator) -> None:
    revision(weights.folder, "new")
    assert weights("list", "--json") == 0
    found: dict[str, Any] = json.loads(weights.out)
    assert found["followed"] is False
    assert [row["name"] for row in found["revisions"]] == ["new", "nano"]
    assert state.decode(found["state"]) == weights.state


def test_a_directory_is_enough_once_a_gateway_has_followed_it(weights: Operator, capsys: Any) -> None:
    where = ["--directory", str(weights.folder)]
    assert cli.main(["weights", "list", *where]) == 2
    assert "--config" in capsys.readouterr().err
    revision(weights.folder, "new")
    weights("stage", "new")
    assert cli.main(["weights", "unstage", *where]) == 0


def test_a_configuration_without_weights_says_what_to_write(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "guard.yaml").write_text("worker: {model: nano}")
    assert cli.main(["weights", "list", "--config", str(tmp_path / "guard.yaml")]) == 2
    assert "weights: {directory:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("worker", "why"),
    [
        ("url: http://127.0.0.1:1", "started elsewhere"),
        ("{socket: /tmp/a.sock, manage: false}", "started elsewhere"),
        ("socket: /tmp/a.sock", "needs its own"),
    ],
)
def test_weights_of_a_worker_that_is_not_ours_are_refused(tmp_path: Path, capsys: Any, worker: str, why: str) -> None:
    inner = worker.strip("{}")
    (tmp_path / "guard.yaml").write_text(f"worker: {{{inner}, weights: {{directory: {tmp_path}}}}}")
    assert cli.main(["weights", "list", "--config", str(tmp_path / "guard.yaml")]) == 2
    assert why in capsys.readouterr().err
