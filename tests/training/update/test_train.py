"""SFT on lessons, with a guard of the real architecture that trains in seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from guard_middleware.guard.prompt import render
from guard_training.corpus.rows import Row
from guard_training.rowfile import OutputError
from guard_training.tuning import sft
from guard_training.tuning.settings import SftSettings, read_settings, recipe_path
from guard_training.update.corrections import Lesson, whole
from guard_training.update.lessons import write_lessons
from guard_training.update.train import LESSONS, chat_contract, read_stage, train_lessons, write_stage

QUIET = Console(quiet=True)


@pytest.fixture
def recipe(folder: Path) -> SftSettings:
    base = read_settings(SftSettings, recipe_path("sft-nano"))
    return replace(
        base, model=str(folder), reader=False, global_batch=2, batch_per_device=2, epochs=2, save_every=1, cutoff=900,
        max_pixels=28 * 28 * 9, learning_rate=1e-3,
    )  # fmt: skip


def prepare(folder: Path, recipe: SftSettings) -> None:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (60, 60), (9, 90, 9)).save(folder / "a.png")
    seen = [{"type": "image", "image": "a.png"}, {"type": "text", "content": "see"}]
    talk = [
        {"role": "system", "content": "A shop."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": seen},
    ]
    lessons: list[Row] = [
        Lesson("correction:1", "corrections", "see", "unharmful", image=folder / "a.png", rationale="Step 1: a shop.",
               messages=json.dumps(talk)),
        *(Row(f"r{n}", "made", f"bake bread {n}", "unharmful", rationale="Step 1: bread.") for n in range(3)),
    ]  # fmt: skip
    write_lessons(lessons, folder / LESSONS)
    write_stage(folder, recipe)


def test_a_conversation_is_encoded_as_the_gateway_would_send_it(folder: Path, tmp_path: Path) -> None:
    contract = chat_contract(str(folder), max_pixels=None)
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    lesson = Lesson("c", "corrections", "hello", "unharmful", messages=json.dumps(talk), rationale="Fine.")
    text = contract.tokenizer.decode(contract.encode(lesson).ids)
    assert "[system]\nBe brief.\n[user]\nhello" in text
    assert contract.encode(lesson).ids == contract.encoder.encode(render(whole(lesson))).ids
    row = Row("r", "made", "hello", "unharmful")
    assert "[user]" not in contract.tokenizer.decode(contract.encode(row).ids)


def test_the_stage_keeps_its_recipe(recipe: SftSettings, tmp_path: Path) -> None:
    write_stage(tmp_path, recipe)
    assert read_stage(tmp_path) == recipe


class _Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_a_killed_stage_goes_on_and_ends_with_the_weights_of_a_whole_one(
    recipe: SftSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path / "whole", recipe)
    made = train_lessons(tmp_path / "whole", console=QUIET, cpu=True)
    names = {file.name for file in made.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "guard.json", "config.json", "preprocessor_config.json"} <= names

    prepare(tmp_path / "killed", recipe)
    build = sft.build

    def kills(*arguments, **more):  # type: ignore[no-untyped-def]
        trainer = build(*arguments, **more)
        trainer.add_callback(_Kill())
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(sft, "build", kills)
        with pytest.raises(KeyboardInterrupt):
            train_lessons(tmp_path / "killed", console=QUIET, cpu=True)
    again = train_lessons(tmp_path / "killed", console=QUIET, cpu=True)
    first, second = (load_file(one / "model.safetensors") for one in (made, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    start = load_file(Path(recipe.model) / "model.safetensors")
    assert any(not torch.equal(first[name], start[name]) for name in first)
    # a finished stage is not trained again, and one with other lessons is refused
    assert train_lessons(tmp_path / "killed", console=QUIET, cpu=True) == again
    write_stage(tmp_path / "killed", replace(recipe, epochs=5))
    with pytest.raises(OutputError, match="epochs"):
        train_lessons(tmp_path / "killed", console=QUIET, cpu=True)
