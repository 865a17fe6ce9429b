from __future__ import annotations

from pathlib import Path

import pytest

from guard_training.cli import main
from guard_training.nano.recipe import Recipe, default_recipe, read_recipe, stages
from guard_training.tuning.settings import RecipeError, settings


def test_a_wrong_input_ends_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("seed: 1\nsede: 2\n")
    arguments = ["nano", "--data", str(tmp_path), "--output", str(tmp_path), "--recipe", str(tmp_path / "bad.yaml")]
    assert main(arguments) == 1
    assert "unknown key 'sede'" in capsys.readouterr().err


def test_the_recipe_of_nano_is_whole_and_strict() -> None:
    whole = read_recipe(default_recipe())
    assert sum(whole.kind_shares.values()) == pytest.approx(1.0)
    assert [stage.seed for stage in stages(whole)] == [whole.seed + n for n in range(len(stages(whole)))]
    assert all(sum(stage.kind_shares.values()) == pytest.approx(1.0) for stage in stages(whole))
    values = {name: getattr(whole, name) for name in whole.__slots__}
    with pytest.raises(RecipeError, match="batch must be a valid integer"):
        settings(Recipe, {**values, "batch": "many"})
    values.pop("layers")
    with pytest.raises(RecipeError, match="layers is missing"):
        settings(Recipe, values)
