from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from guard_training.evaluation.outcomes import Outcome
from guard_training.tuning import ablation
from guard_training.tuning.ablation import BEFORE, FULL, VARIANTS, folder_of, plot, run, sheet, write
from guard_training.tuning.grpo import GrpoSettings
from guard_training.tuning.settings import RecipeError, read_settings, recipe_path


@pytest.fixture
def recipe() -> GrpoSettings:
    return read_settings(GrpoSettings, recipe_path("grpo-nano"))


def _outcomes(right: int) -> list[Outcome]:
    """Forty rows of two sources, of which ``right`` are judged right; the last has no form."""
    out = []
    for n in range(40):
        label = "harmful" if n % 3 else "unharmful"
        said = label if n < right else "unharmful" if label == "harmful" else "harmful"
        error = "unparseable" if n == 39 else None
        out.append(
            Outcome(f"r{n}", "made" if n % 2 else "other", "text", label, None, None if error else said, error=error,
                    reasoning_tokens=None if error else 10 + n, revision="1")  # type: ignore[arg-type]
        )  # fmt: skip
    return out


class _Sweep:
    """Trains by writing down the recipe, and asks by how much of it is left."""

    def __init__(self, notes: dict[str, str] | None = None) -> None:
        self.recipes: dict[str, GrpoSettings] = {}
        self.asked: list[str] = []
        self._notes = notes or {}

    def train(self, recipe: GrpoSettings, folder: Path) -> str | None:
        self.recipes[folder.name] = recipe
        note = self._notes.get(folder.name)
        if note and note.startswith("raise "):
            raise RecipeError(note)
        made = folder / ("checkpoint-2" if note else "model")
        made.mkdir(parents=True)
        (made / "trainer_state.json").write_text("{}")
        return note

    def ask(self, model: str, folder: Path) -> list[Outcome]:
        self.asked.append(model)
        return _outcomes(20 if folder.name == "before-RL" else 38 if folder.name == FULL else 30)


def _text(results: Any) -> str:
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(sheet(results).rich())
    console.file.close()
    return console.export_text()


def test_each_variant_changes_one_thing(recipe: GrpoSettings) -> None:
    changed = {
        name: {f for f in recipe.__slots__ if getattr(change(recipe), f) != getattr(recipe, f)}
        for name, change in VARIANTS.items()
    }
    assert changed == {
        "full": set(),
        "no augmentation": {"mixed_rows"},
        "no dynamic clipping": {"dynamic_clipping"},
        "no length reward": {"reward"},
        "eco": {"reward"},
        "text only": {"rows"},
        "image only": {"rows"},
    }
    assert VARIANTS["no length reward"](recipe).reward.unit == "none"
    assert VARIANTS["eco"](recipe).reward == replace(recipe.reward, beta=1 / 6)


def test_variants_are_trained_measured_and_compared_row_by_row(recipe: GrpoSettings, tmp_path: Path) -> None:
    sweep = _Sweep()
    results = run(recipe, "nano", tmp_path, [FULL, "text only"], train=sweep.train, ask=sweep.ask)
    assert [one.variant for one in results] == [BEFORE, FULL, "text only"]
    assert sweep.recipes["text-only"] == replace(recipe, rows="text")
    assert sweep.asked == ["nano", str(tmp_path / "full" / "model"), str(tmp_path / "text-only" / "model")]
    values = [one.summary["means"]["f1"]["value"] for one in results if one.summary]
    assert values[0] < values[2] < values[1]
    assert results[1].difference is None
    assert results[2].difference is not None
    difference = results[2].difference["f1"]
    assert difference["difference"] == pytest.approx(values[2] - values[1])
    assert difference["interval"][0] < difference["difference"] < difference["interval"][1] < 0


def test_a_variant_that_fails_is_told_and_the_others_go_on(recipe: GrpoSettings, tmp_path: Path) -> None:
    sweep = _Sweep(
        {
            "image-only": "raise 3 usable rows are fewer than one rollout",
            "no-length-reward": "stopped by an alarm: format_drift",
            "text-only": "killed (see log.txt)",
        }
    )
    results = run(recipe, "nano", tmp_path, list(VARIANTS), train=sweep.train, ask=sweep.ask)
    found = {one.variant: one for one in results}
    assert found["image only"].summary is None
    assert found["text only"].summary is None
    assert found["no length reward"].summary is not None
    assert str(tmp_path / "no-length-reward" / "checkpoint-2") in sweep.asked
    text = _text(results)
    assert "not trained: raise 3 usable rows" in text
    assert "no length reward (stopped by an alarm)" in text
    assert "no augmentation, text only, image only: fewer rows" in text


def test_the_files_hold_every_variant_and_its_figures(recipe: GrpoSettings, tmp_path: Path) -> None:
    sweep = _Sweep({"image-only": "raise too few"})
    results = run(recipe, "nano", tmp_path, list(VARIANTS), train=sweep.train, ask=sweep.ask)
    files = write(results, recipe, tmp_path)
    assert [file.name for file in files] == ["ablations.json", "ablations.svg", "ablations.png"]
    value = json.loads(files[0].read_text())
    assert [one["variant"] for one in value["variants"]] == [BEFORE, *VARIANTS]
    assert value["recipe"]["group"] == 16
    assert files[1].read_text().count("<g id=") > 20
    assert files[2].read_bytes().startswith(b"\x89PNG")
    labels = [label.get_text() for label in plot(results).axes[0].get_yticklabels()]
    assert labels == [BEFORE, *(name for name in VARIANTS if name != "image only")]


def test_whether_a_variant_is_finished_is_asked_of_its_training(recipe: GrpoSettings, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "guard.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(asdict(recipe), sort_keys=False))
    launch = ["/bin/sh", "-c", 'echo "guard-train: begun with other settings" >&2; exit 1']
    assert ablation.trainer(tmp_path / "rows.jsonl", "nano", launch)(recipe, tmp_path) == "begun with other settings"


def test_training_runs_in_a_process_of_its_own_and_its_reason_comes_back(recipe: GrpoSettings, tmp_path: Path) -> None:
    launch = ["/bin/sh", "-c", 'echo "guard-train: $1 is not there" >&2; exit 1', "sh"]
    train = ablation.trainer(tmp_path / "rows.jsonl", "nano", launch)
    assert train(recipe, folder_of(tmp_path, "text only")) == "grpo is not there"
    assert read_settings(GrpoSettings, tmp_path / "text-only" / "recipe.yaml") == recipe
    # what an earlier run said is no reason of this one
    silent = ablation.trainer(tmp_path, "nano", ["/bin/false"])
    assert silent(recipe, folder_of(tmp_path, "text only")) == "no word (see log.txt)"
    assert ablation.trainer(tmp_path, "nano", ["/bin/true"])(recipe, tmp_path / "x") is None
    with pytest.raises(KeyboardInterrupt):
        ablation.trainer(tmp_path, "nano", ["/bin/sh", "-c", "exit 130"])(recipe, tmp_path / "y")
