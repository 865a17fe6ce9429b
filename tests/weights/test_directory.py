"""The weights directory: checksums as guard-train writes them, a state that is whole whatever is killed, its locks."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
from functools import partial
from pathlib import Path

import pytest

from guard_middleware.errors import ConfigError
from guard_middleware.weights import manifest, state
from guard_middleware.weights.directory import WeightsDirectory, now
from guard_middleware.weights.state import Refused, Revision, State
from tests.support.weights import revision


def staged(directory: WeightsDirectory, name: str = "new") -> State:
    change = partial(state.stage, revision=Revision(name, f"/w/{name}"), by="ada", at=now())
    return directory.update(change)


# -- checksums


def test_the_checksums_of_guard_train_are_read(tmp_path: Path) -> None:
    folder = revision(tmp_path, "new")
    (folder / "results").mkdir()
    (folder / "results" / "dev.json").write_text("{}")
    from guard_training.update.revision import check_sums, write_sums

    write_sums(folder)
    check_sums(folder)
    assert manifest.check(folder) == manifest.fingerprint(folder)


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("scripted.json", "{}", "scripted.json: changed since"),
        ("README.md", None, "README.md: missing"),
        ("model.py", "x", "model.py: not in SHA256SUMS"),
        ("sub/model.py", "x", r"sub/model.py: not in SHA256SUMS"),
        ("SHA256SUMS", None, "no SHA256SUMS"),
        ("SHA256SUMS", "\udcff\n", "SHA256SUMS: is no text"),
        ("SHA256SUMS", f"{'0' * 64}  ../x\n", "missing|not in"),
    ],
)
def test_a_folder_that_is_not_what_its_checksums_name_is_refused(
    tmp_path: Path, name: str, text: str | None, why: str
) -> None:
    folder = revision(tmp_path, "new")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink() if text is None else (folder / name).write_text(text, errors="surrogateescape")
    with pytest.raises(manifest.ManifestError, match=why):
        manifest.check(folder)


def test_other_checksums_are_another_fingerprint(tmp_path: Path) -> None:
    one, other = revision(tmp_path, "one"), revision(tmp_path, "other", phrase="x")
    assert manifest.check(one) != manifest.check(other)


# -- the state


def test_without_a_state_the_configured_model_serves(tmp_path: Path) -> None:
    directory = WeightsDirectory(tmp_path / "w", "nano")
    assert directory.read() == State(Revision("nano", "nano"))
    with pytest.raises(ConfigError, match="--config"):
        WeightsDirectory(tmp_path / "w").read()


def test_a_state_outlives_a_change_of_the_configuration(tmp_path: Path) -> None:
    staged(WeightsDirectory(tmp_path, "nano"))
    assert WeightsDirectory(tmp_path, "other").read().active.model == "nano"


def test_a_refused_change_changes_nothing(tmp_path: Path) -> None:
    directory = WeightsDirectory(tmp_path, "nano")
    staged(directory)
    before = (tmp_path / "state.json").read_bytes()
    with pytest.raises(Refused):
        directory.update(partial(state.promote, by="ada", at=now()))
    assert (tmp_path / "state.json").read_bytes() == before


def test_half_a_write_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = WeightsDirectory(tmp_path, "nano")
    staged(directory)
    before = directory.read()

    def full(_: int) -> None:
        raise OSError(28, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            staged(directory, "other")
    assert directory.read() == before
    assert staged(directory, "other").staged != before.staged


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 9}', '{"version": 1}'])
def test_what_is_no_state_says_where_and_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ConfigError, match=r"state\.json.*move it away"):
        WeightsDirectory(tmp_path, "nano").read()


def test_a_reader_sees_that_the_state_has_changed(tmp_path: Path) -> None:
    directory = WeightsDirectory(tmp_path, "nano")
    stamps = [directory.stamp()]
    for name in ("a", "b"):
        staged(directory, name)
        stamps.append(directory.stamp())
    assert len(set(stamps)) == 3
    assert directory.stamp() == stamps[-1]


def _stage_many(folder: Path, name: str) -> None:
    for number in range(20):
        staged(WeightsDirectory(folder, "nano"), f"{name}{number}")


def test_writers_in_several_processes_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_stage_many, args=(tmp_path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    found = WeightsDirectory(tmp_path, "nano").read()
    assert [entry.number for entry in found.history] == list(range(1, 41))


def test_one_follower_at_a_time(tmp_path: Path) -> None:
    directory = WeightsDirectory(tmp_path, "nano")
    assert not directory.followed()
    with directory.following():
        assert directory.followed()
        with pytest.raises(ConfigError, match="another gateway"), directory.following(seconds=0.1):
            pass
    assert not directory.followed()


def test_those_who_ask_whether_a_gateway_follows_do_not_take_each_other_for_one(tmp_path: Path) -> None:
    directory = WeightsDirectory(tmp_path, "nano")
    with directory._locked("gateway.lock", fcntl.LOCK_SH):  # as one who asks at this very moment
        assert not directory.followed()
        with pytest.raises(ConfigError, match="another gateway"), directory.following(seconds=0.1):
            pass


def test_a_revision_is_found_by_its_name_or_its_path(tmp_path: Path) -> None:
    directory = WeightsDirectory(tmp_path / "w", "nano")
    inside, outside = revision(tmp_path / "w", "new"), revision(tmp_path, "elsewhere")
    assert directory.find("new") == inside
    assert directory.find(str(outside)) == outside
    assert directory.revisions() == [inside]
    with pytest.raises(Refused, match=r"there are: new"):
        directory.find("old")


def test_a_directory_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"weights\.directory"):
        WeightsDirectory(tmp_path / "file" / "w", "nano")


def test_the_state_is_json_that_a_human_can_read(tmp_path: Path) -> None:
    staged(WeightsDirectory(tmp_path, "nano"))
    assert json.loads((tmp_path / "state.json").read_text())["staged"]["revision"]["name"] == "new"
