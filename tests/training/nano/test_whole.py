"""The whole making of nano, small: from rows to a folder that a worker serves, unbroken and killed in both stages."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from guard_middleware.worker.weights import load
from guard_training.corpus.rows import Skipped, read_good_rows
from guard_training.nano import pipeline, rows
from guard_training.nano.pipeline import train_nano
from guard_training.nano.recipe import Recipe, default_recipe, read_recipe
from guard_training.nano.trainer import GuardSFTTrainer

pytestmark = pytest.mark.slow

_DEEDS = ("pick a lock", "cut a chain", "open a safe", "copy a key", "break a seal", "lift a gate")
_TASKS = ("bake bread", "draw a map", "sing a song", "mend a bike", "plant a tree", "sort my books")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def lines() -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = []
        for source, label, deeds in (("advbench", "harmful", _DEEDS), ("clinc150", "unharmful", _TASKS)):
            for number, deed in enumerate(deeds):
                for way in ("how do I {} at night", "tell me how to {} please", "I want to {} today"):
                    row = {"source": source, "prompt": way.format(deed), "prompt_label": label}
                    out.append({"id": f"{source}/{number}/{way[0]}", **row})
                row = {
                    "source": "chat",
                    "prompt": f"may I {deed}",
                    "response": f"no, never {deed}",
                    "prompt_label": None,
                }
                out.append({"id": f"chat/{source}/{number}", **row, "response_label": label})
        return out

    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines()))
    bank = tmp_path / "bank"
    bank.mkdir()
    (bank / "benign_work.yaml").write_text(f"work: {json.dumps([f'please {task} with my aunt' for task in _TASKS])}")
    (bank / "answers_a.yaml").write_text("t:\n  - {prompt: may I go, harmful: go and fall, unharmful: go with care}\n")
    for module in (pipeline, rows):
        monkeypatch.setattr(module, "default_bank", lambda: bank)
    words = tmp_path / "wordnet"
    words.mkdir()
    for name in ("data.noun", "data.verb", "data.adj", "data.adv"):
        (words / name).write_text("00001740 03 n 03 lock 0 bolt 1 bread 0 000 | a thing\n", encoding="latin-1")
    return tmp_path


@pytest.fixture
def recipe() -> Recipe:
    whole = read_recipe(default_recipe())
    stage = {**whole.stages[0], "cases": 48, "batch": 4, "warmup": 0}
    return dataclasses.replace(
        whole, files=["train.jsonl"], held_out=0.0, held_out_bank=0.5, cases=48, batch=4, warmup=0, save_every=4,
        stages=[stage], stretches=20, variants=20, answers=20, definitions=4, images=4, held_out_images=2,
        vocabulary=700, hidden=64, intermediate=64, layers=1, heads=1, vision_hidden=32, vision_layers=1,
        image_tokens=4, embedding_rank=32, odds_dims=4, odds_steps=5,
    )  # fmt: skip


def _train(data: Path, recipe: Recipe, folder: str) -> Path:
    return train_nano(
        data, data / folder, recipe, lambda image: "drawn", rationales={}, skipped=Skipped(), wordnet=data / "wordnet"
    )


def test_a_run_killed_in_either_stage_ends_in_the_weights_of_an_unbroken_one(
    data: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = _train(data, recipe, "unbroken")
    assert load(unbroken, name="small").facts.window_tokens == recipe.window_tokens
    held_out = read_good_rows(data / "unbroken" / "held_out" / "bank.jsonl", Skipped())
    assert {row.source for row in held_out} <= {"bank_benign_work", "bank_answers"}
    assert 0 < len(held_out) < 8

    step, steps = GuardSFTTrainer.training_step, 0

    def killed(self: GuardSFTTrainer, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps in (7, 16):
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(GuardSFTTrainer, "training_step", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            _train(data, recipe, "broken")
    broken = _train(data, recipe, "broken")
    assert (broken / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()
