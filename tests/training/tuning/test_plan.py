from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from guard_training.tuning.plan import Plan, longest, plan
from guard_training.tuning.settings import RecipeError, SftSettings, read_settings, recipe_path
from guard_training.tuning.standin import stand_in, tower

#: Published counts of parameters.
SIZES = {"sft-3b": 3_754_622_976, "sft-7b": 8_292_166_656}
LORA = "lora={rank: 16, scale: 32, dropout: 0.0, targets: [q_proj, v_proj]}"


def _plan(folder: Path, name: str, *changes: str, rows: int = 123_096, devices: int = 4) -> Plan:
    return plan(read_settings(SftSettings, recipe_path(name), changes), rows, devices, folder)


def _part(made: Plan, name: str) -> tuple[int, int]:
    part = next(part for part in made.parts if part.name.startswith(name))
    return part.whole, part.sharded


@pytest.mark.parametrize("name", list(SIZES))
def test_the_dry_run_builds_the_published_model_and_the_papers_schedule(name: str, tmp_path: Path) -> None:
    made = _plan(tmp_path, name)
    assert made.trainable + made.frozen == SIZES[name]
    assert (made.steps, made.accumulation) == (1926, 8)
    shapes = dict(made.shapes)
    assert shapes["tokens"] == (6, 2048)
    assert shapes["image tokens"][0] * 4 == shapes["image patches"][0]
    assert shapes["image tokens"][1] == shapes["hidden states"][2]
    assert _part(made, "weights (fp32)") == (4 * SIZES[name], SIZES[name])
    assert _part(made, "optimiser") == (8 * made.trainable, 2 * made.trainable)


def test_what_is_frozen_has_neither_gradients_nor_moments(tmp_path: Path) -> None:
    frozen = _plan(tmp_path, "sft-3b")
    tower_trained = _plan(tmp_path, "sft-3b", "freeze_vision=false", "freeze_projector=false")
    lora = _plan(tmp_path, "sft-3b", LORA)
    assert tower_trained.frozen == 0
    assert tower_trained.trainable == SIZES["sft-3b"]
    # rank 16 on queries (2048 -> 2048) and values (2048 -> 256) of 36 layers
    assert lora.trainable == 36 * 16 * (2048 + 2048 + 2048 + 256)
    assert lora.frozen == SIZES["sft-3b"]
    grads = [_part(made, "gradients")[0] for made in (lora, frozen, tower_trained)]
    assert grads == sorted(grads)
    assert _part(tower_trained, "activations") > _part(frozen, "activations")


def test_recomputing_keeps_one_hidden_state_per_layer(tmp_path: Path) -> None:
    with_it, without = (_plan(tmp_path, "sft-3b", f"gradient_checkpointing={on}") for on in ("true", "false"))
    layer_inputs = 36 * 6 * 2048 * 2048 * 2
    assert layer_inputs < _part(with_it, "activations")[0] < 5 * layer_inputs
    assert _part(without, "activations")[0] > 8 * _part(with_it, "activations")[0]


def test_activations_are_what_a_real_forward_pass_keeps(tmp_path: Path) -> None:
    """nano's sizes fit here for real: the bytes that autograd holds for the language model, by the same count."""
    recipe = read_settings(SftSettings, recipe_path("sft-nano"), ["batch_per_device=2", "global_batch=2"])
    made = plan(recipe, 10, 1, tmp_path)
    config = Qwen2_5_VLConfig(**json.loads(Path("training/recipes/architectures/qwen2.5-vl-nano.json").read_text()))
    model = Qwen2_5_VLForConditionalGeneration(config).float().train()
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in parameters:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model.language_model(input_ids=torch.zeros(2, 512, dtype=torch.long), use_cache=False)
    real = sum(storage.nbytes() for storage in kept.values())
    tile = 4 * 2 * dict(made.shapes)["logits of the answers"][0] * config.text_config.vocab_size
    assert _part(made, "activations")[0] - tile == pytest.approx(real, rel=0.15)


def test_the_tower_by_parts_has_the_shapes_of_the_tower() -> None:
    contract, config = stand_in("qwen2.5-vl-nano", 9 * 28 * 28)
    visual = Qwen2_5_VLForConditionalGeneration(config).model.visual
    patches = torch.randn(36, 3 * 2 * 14 * 14)
    with torch.no_grad():
        whole = visual(patches, grid_thw=torch.tensor([[1, 6, 6]])).pooler_output
        with torch.device("meta"):
            empty = Qwen2_5_VLForConditionalGeneration(config).model.visual
        assert tower(empty, patches.to("meta")).shape == whole.shape
    assert contract.facts.max_pixels == 9 * 28 * 28


def test_made_rows_fill_the_cutoff_and_every_second_has_the_largest_image(tmp_path: Path) -> None:
    recipe = read_settings(SftSettings, recipe_path("sft-3b"))
    contract, _ = stand_in(recipe.architecture, recipe.max_pixels)
    rows = longest(recipe, contract, 4, tmp_path)
    assert [row.tokens for row in rows] == [2048] * 4
    assert [bool(row.picture) for row in rows] == [True, False, True, False]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["architecture=null"], "names no architecture"),
        (["architecture=banana"], "no architecture banana"),
        (["cutoff=256"], "no room for the largest image; lower max_pixels"),
        (["batch_per_device=5"], "no multiple of 5 rows on 4 devices"),
    ],
)
def test_a_recipe_that_cannot_be_tried_says_why(tmp_path: Path, changes: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        _plan(tmp_path, "sft-3b", *changes)


def test_the_plan_prints_parts_and_their_sum(tmp_path: Path) -> None:
    made = _plan(tmp_path, "sft-3b")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(made.table())
    text = console.export_text()
    assert "optimiser (AdamW" in text
    whole = sum(part.whole for part in made.parts) / 2**30
    assert f"{whole:.1f}" in text
    assert "6 x 8 x 4 devices" in "\n".join(made.lines(read_settings(SftSettings, recipe_path("sft-3b"))))
