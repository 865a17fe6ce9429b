"""``guard-train update`` as it is typed; one whole run with real training and real workers is slow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from guard_middleware.worker.weights import load
from guard_training.process import LAUNCH
from guard_training.update import pipeline
from tests.support.commands import call
from tests.tiny_model import make_folder


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def rows(prefix: str, count: int, words: str) -> list[dict[str, Any]]:
    return [
        {"id": f"{prefix}{n}", "source": "made", "prompt": f"{words} {n} {words[::-1]} {n * 7}",
         "prompt_label": "harmful" if n % 2 else "unharmful", "licence": "MIT"}
        for n in range(count)
    ]  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    talk = [{"role": "system", "content": "A shop."}, {"role": "user", "content": "kill the noise"}]
    corrections = [
        {"decision": "d1", "reviewer": "ana", "label": "unharmful", "content": "kill a process"},
        {"decision": "d2", "reviewer": "ana", "label": "unharmful", "content": {"messages": talk}},
        {"decision": "d3", "reviewer": "ana", "label": "safe", "content": "x"},
    ]
    return {
        "corrections": write(tmp_path / "c.jsonl", corrections),
        "replay": write(tmp_path / "train.jsonl", rows("r", 40, "bake a loaf of bread")),
        "evaluate": write(tmp_path / "dev.jsonl", rows("e", 6, "paint the fence")),
        "golden": write(tmp_path / "golden.jsonl", rows("g", 2, "open the window")),
    }


def typed(files: dict[str, Path], output: Path) -> list[object]:
    named = [part for name, path in files.items() for part in (f"--{name}", path)]
    return ["update", *named, "--output", output, "--cpu", "--replay-share", "0.5"]


def test_what_is_typed_becomes_the_plan(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def run(plan: pipeline.Plan, *, skipped: Any, **more: Any) -> Path:
        seen.append(plan)
        skipped("c.jsonl:3: bad")
        return tmp_path / "revision"

    monkeypatch.setattr(pipeline, "run", run)
    (tmp_path / "limits.md").write_text("- None.")
    call(
        *typed(files, tmp_path / "out"),
        *("--set", "epochs=2", "--set", "reader=false", "--rl", "grpo-nano", "--set-rl", "group=4"),
        *("--margin", "0.1", "--allow-chance", "--limit", "9", "--date", "2026-11-21", "--licence", "mit"),
        *("--limits", tmp_path / "limits.md", "--log", tmp_path / "log.jsonl"),
    )
    (plan,) = seen
    assert (plan.model, plan.sft.epochs, plan.rl.group, plan.replay_share) == ("nano", 2.0, 4, 0.5)
    assert (plan.margin, plan.allow_chance, plan.limit, plan.licence) == (0.1, True, 9, "mit")
    assert (plan.limits, plan.made, plan.logs) == ("- None.", "2026-11-21T00:00:00", (tmp_path / "log.jsonl",))
    assert [role for role, _ in plan.files()] == ["corrections", "decision log", "replay", "evaluation", "golden set"]
    said = capsys.readouterr().out
    assert "1 rows left out:\n  c.jsonl:3: bad" in said
    assert "revision" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["update"], "--corrections, --evaluate, --golden, --output"),
        (["--set", "banana=1"], "banana"),
        (["--replay-share", "1"], "--replay-share"),
        (["--model", "nowhere/none/at/all"], "no such folder"),
    ],
)
def test_mistakes_are_told_with_their_remedy(
    files: dict[str, Path], tmp_path: Path, arguments: list[str], words: str
) -> None:
    whole = arguments if arguments == ["update"] else [*typed(files, tmp_path / "out"), *arguments]
    if "--set" not in arguments and arguments != ["update"]:
        whole += ["--set", "reader=false"]
    with pytest.raises(ValueError, match=words):
        call(*whole)


@pytest.mark.slow
def test_a_whole_update_with_real_training_and_real_workers(
    files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The guard has random weights, so it reads nothing right before or after: nothing can be lost."""
    guard = make_folder(tmp_path / "guard")
    (guard / "guard.json").write_text('{"name": "small", "max_new_tokens": 8}')
    again = (
        *typed(files, tmp_path / "out"), "--model", guard, "--recipe", "sft-nano", "--launch", " ".join(LAUNCH),
        *("--set", "reader=false", "--set", "epochs=1", "--set", "global_batch=2", "--set", "batch_per_device=2"),
        *("--set", "cutoff=900", "--concurrency", "2"),
    )  # fmt: skip
    call(*again)
    said = capfd.readouterr().out
    assert "c.jsonl:3: not a usable correction: the label 'safe'" in said
    assert "4 rows, " in said
    made = tmp_path / "out" / "revision"
    lineage = json.loads((made / "lineage.json").read_text())
    assert lineage["lessons"]["sources"] == {"corrections": 2, "made": 2}
    assert load(made, name="x").facts.revision != load(guard, name="x").facts.revision
    call(*again)
    assert "is finished" in capfd.readouterr().out
    call("publish", made, "--output", tmp_path / "copy")
    assert "is whole" in capfd.readouterr().out
