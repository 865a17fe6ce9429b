from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from guard_middleware.worker.weights import load
from guard_training.corpus.rows import Row
from guard_training.evaluation.metrics import summarise
from guard_training.evaluation.outcomes import Outcome, blank
from guard_training.update import hub, processes, revision
from tests.support.commands import call
from tests.tiny_model import make_folder


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("guard") / "small")


@pytest.fixture
def results(guard: Path, tmp_path: Path) -> Path:
    name = load(guard, name="small").facts.revision
    outcomes = [Outcome(f"{n}", "locks", "text", "harmful", None, request="harmful") for n in range(5)]
    file = tmp_path / "dev.json"
    file.write_text(json.dumps({"data": "dev.jsonl", "limit": 5, **summarise(outcomes, model="s", revision=name)}))
    return file


def rows(path: Path, count: int, start: int = 0) -> Path:
    lines = [
        {"id": f"r{n}", "source": "made", "licence": "MIT", "prompt": f"bake {n}",
         "prompt_label": "harmful" if n % 2 else "unharmful"}
        for n in range(start, start + count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"id": "broken"}]))
    return path


def test_a_bare_guard_becomes_a_revision_that_can_be_copied_and_pushed(
    guard: Path, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(rows: Sequence[Row], model: str, **more: Any) -> list[Outcome]:
        out = []
        for number, row in enumerate(rows):
            one = blank(row, revision="x")
            score = 0.99 if (row.request == "harmful") != (number % 5 == 0) else 0.01
            out.append(Outcome(one.id, one.source, one.modality, row.request, None, request_score=score))
        return out

    monkeypatch.setattr(processes, "measure", measured)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epochs: 3\n")
    call(
        "publish",
        *(guard, "--results", results, "--recipe", recipe, "--data", rows(tmp_path / "train.jsonl", 6)),
        *("--calibration", rows(tmp_path / "kept.jsonl", 60), "--licence", "mit", "--date", "2026-11-21"),
        *("--output", tmp_path / "revision"),
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "2 rows left out: train.jsonl:7:" in said
    assert "is whole" in said
    text = (tmp_path / "revision" / "README.md").read_text()
    assert "license: mit" in text
    assert "| made | MIT | 6 | 3 |" in text
    calibration = json.loads((tmp_path / "revision" / "calibration.json").read_text())
    # the six rows of --data are not calibrated on
    assert calibration["reason"]["request"]["rows"] == 54
    assert calibration["reason"]["request"]["temperature"] > 1
    assert calibration["label"]["request"]["rows"] == 54
    pushed: list[Any] = []
    monkeypatch.setattr(hub, "push", lambda *given, **more: pushed.append((given, more)) or "https://hub/a/b")
    call("publish", tmp_path / "revision", "--output", tmp_path / "copy", "--to-hub", "a/b", "--private")
    assert "https://hub/a/b" in capsys.readouterr().out
    assert pushed[0][0][:2] == (tmp_path / "revision", "a/b")
    assert pushed[0][1] == {"private": True}
    revision.verify(tmp_path / "copy")
    call("publish", tmp_path / "revision", "--output", tmp_path / "copy")
    (tmp_path / "copy" / "SHA256SUMS").write_text("")
    with pytest.raises(ValueError, match="exists and is another"):
        call("publish", tmp_path / "revision", "--output", tmp_path / "copy")


def test_a_push_that_failed_is_tried_again_by_the_same_command(
    guard: Path, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (guard, "--results", results, "--licence", "mit", "--output", tmp_path / "revision", "--to-hub", "a/b")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="no token"):
        call("publish", *given)
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "revision").iterdir()}
    monkeypatch.setattr(hub, "push", lambda *given, **more: "https://hub/a/b")
    call("publish", *given)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "revision").iterdir()} == made
    with pytest.raises(ValueError, match="exists; delete it"):
        call("publish", *given, "--limits", results)


def test_a_copy_that_was_cut_off_is_made_whole(
    guard: Path, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("publish", guard, "--results", results, "--output", tmp_path / "revision")
    copied: list[str] = []

    def cut(source: str, place: str) -> None:
        copied.append(place)
        if len(copied) == 3:
            raise KeyboardInterrupt
        Path(place).write_bytes(Path(source).read_bytes())

    monkeypatch.setattr("shutil.copy2", cut)
    with pytest.raises(KeyboardInterrupt):
        call("publish", tmp_path / "revision", "--output", tmp_path / "copy")
    monkeypatch.undo()
    assert not (tmp_path / "copy").exists()
    call("publish", tmp_path / "revision", "--output", tmp_path / "copy")
    revision.verify(tmp_path / "copy")


def test_nothing_is_pushed_of_a_folder_that_is_no_whole_revision(guard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "push", lambda *given, **more: pytest.fail("pushed"))
    with pytest.raises(ValueError, match="SHA256SUMS"):
        call("publish", guard, "--to-hub", "a/b")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--results", "{results}"], "--output DIR"),
        (["--results", "{other}", "--output", "{out}"], "no results of"),
        (["--results", "{stale}", "--output", "{out}"], "of revision 0"),
    ],
)
def test_mistakes_are_told_with_their_remedy(
    guard: Path, results: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "other.json").write_text("{}")
    stale = {**json.loads(results.read_text()), "revision": "0"}
    (tmp_path / "stale.json").write_text(json.dumps(stale))
    names = {"results": results, "out": tmp_path / "out", **{n: tmp_path / f"{n}.json" for n in ("other", "stale")}}
    with pytest.raises(ValueError, match=words):
        call("publish", guard, *(one.format(**names) for one in arguments))
    assert not (tmp_path / "out").exists()
