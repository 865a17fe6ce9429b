"""What a run of nano takes up again, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from guard_training.corpus.rows import CorpusError, Skipped
from guard_training.nano import pipeline, rows
from guard_training.nano.pipeline import train_nano
from guard_training.nano.recipe import Recipe, default_recipe, read_recipe
from guard_training.nano.rows import load_rows
from guard_training.rowfile import OutputError


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    bank = tmp_path / "bank"
    bank.mkdir()
    (bank / "benign_work.yaml").write_text("work: [please sort the list of cars]")
    for module in (pipeline, rows):
        monkeypatch.setattr(module, "default_bank", lambda: bank)
    lines = [
        {"id": str(n), "source": "locks", "prompt": f"how do I pick lock {n}", "prompt_label": "harmful"}
        for n in range(5)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{cut off\n")
    return tmp_path


@pytest.fixture
def recipe() -> Recipe:
    return dataclasses.replace(read_recipe(default_recipe()), files=["train.jsonl"], held_out=0.0, held_out_bank=0.0)


def test_a_bad_line_and_a_picture_that_is_not_there_are_named_and_the_others_are_used(
    data: Path, recipe: Recipe
) -> None:
    seen = {"id": "p", "source": "signs", "prompt": "?", "prompt_label": "harmful", "image": "missing.png"}
    with (data / "train.jsonl").open("a") as lines:
        lines.write(json.dumps(seen) + "\n")
    skipped = Skipped()
    found = load_rows(data, recipe, skipped)
    assert (len(found.prompts), found.pictures) == (6, [])
    bad, missing = skipped.reasons
    assert "train.jsonl:6" in bad
    assert "train.jsonl:7: p: its image missing.png cannot be read" in missing


def test_rows_that_an_evaluation_set_holds_are_left_out_pictures_too(data: Path, recipe: Recipe) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data / "mine.png")
    (data / "theirs.png").write_bytes((data / "mine.png").read_bytes())
    mine = {"id": "p", "source": "signs", "prompt": "what is this?", "prompt_label": "harmful", "image": "mine.png"}
    with (data / "train.jsonl").open("a") as lines:
        lines.write(json.dumps(mine) + "\n")
    theirs = [
        mine | {"id": "q", "prompt": "and this?", "image": "theirs.png"},
        mine | {"id": "r", "prompt": "Please: sort the list of cars!", "image": None},
    ]
    (data / "dev.jsonl").write_text("".join(json.dumps(line) + "\n" for line in theirs))
    skipped = Skipped()
    assert [row.id for row in load_rows(data, recipe, skipped).pictures] == ["p"]
    found = load_rows(data, recipe, skipped, [data / "dev.jsonl"])
    assert found.pictures == []
    assert {row.source for row in found.prompts} == {"locks"}  # the bank's only prompt is theirs too
    (data / "dev.jsonl").write_text("")
    with pytest.raises(CorpusError, match=r"dev\.jsonl: no row to compare with"):
        load_rows(data, recipe, skipped, [data / "dev.jsonl"])


@pytest.mark.parametrize("change", ["recipe", "data", "bank"])
def test_a_run_goes_on_with_the_same_recipe_data_and_bank_only(
    data: Path, recipe: Recipe, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Begun(Exception):
        pass

    def begun(*_: object) -> None:
        raise Begun

    monkeypatch.setattr(pipeline, "load_rows", begun)
    monkeypatch.setattr(pipeline, "definitions", lambda folder: ["a lock: what closes a door"])
    monkeypatch.setattr(pipeline, "lemmas", lambda folder: {"noun": ["lock"]})

    def run(recipe: Recipe) -> None:
        train_nano(data, data / "out", recipe, lambda image: "", rationales={}, skipped=Skipped())

    for _ in range(2):
        with pytest.raises(Begun):
            run(recipe)
    if change == "recipe":
        recipe = dataclasses.replace(recipe, batch=recipe.batch + 1)
    elif change == "data":
        (data / "train.jsonl").write_text("")
    else:
        (data / "bank" / "benign_work.yaml").write_text("work: [another]")
    with pytest.raises(OutputError, match="other settings"):
        run(recipe)
