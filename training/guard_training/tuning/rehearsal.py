"""A recipe tried before its weights are at hand: the real architecture, random, at the recipe's real lengths.

``on_meta`` builds TRL's whole configuration and runs the model on the meta device, where tensors have shapes and no
memory: a minute on a laptop for 3B. ``with_weights`` does real updates, on the GPU where there is one, and measures
seconds and memory. Both use nano's tokenizer, with which the architecture's control ids are made to agree: which ids
a text has does not change what a step costs.

Refuses: a recipe that names no architecture.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from guard_training.corpus.rows import Row
from guard_training.tuning.clipping import bound
from guard_training.tuning.contract import Contract, image_processor, load_contract
from guard_training.tuning.grpo import Chosen, GrpoSettings, arguments, build, peak_memory
from guard_training.tuning.rollout import question
from guard_training.tuning.settings import RecipeError, recipe_path

_CONTROL = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}  # fmt: skip
_PIXELS = 1280 * 28 * 28


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will be. Memory is bytes before activations, and before any sharding."""

    updates: int
    accumulation: int
    completions_per_rollout: int
    bounds: tuple[float, float, float]
    parameters: int
    trained: int
    prompt_tokens: int
    image_tokens: int
    scored: tuple[int, int]

    @property
    def memory(self) -> int:
        """fp32 weights, and for those that are trained a gradient and AdamW's two moments."""
        return 4 * self.parameters + 12 * self.trained

    def lines(self) -> list[str]:
        """For the console."""
        first, middle, last = self.bounds
        return [
            f"{self.updates} updates of {self.accumulation} micro-batches; {self.completions_per_rollout} completions "
            "per rollout",
            f"clip bound {first:.3f} at first, {middle:.3f} half-way, {last:.3f} at the end",
            f"{self.parameters / 1e9:.2f} B parameters, {self.trained / 1e9:.2f} B of them trained; "
            f"weights, gradients and optimiser {self.memory / 2**30:.1f} GiB over all shards, without activations",
            f"longest prompt {self.prompt_tokens} tokens, {self.image_tokens} of them one image; a micro-batch scores "
            f"{self.scored[0]} completions of {self.scored[1]} tokens",
        ]


def architecture(recipe: GrpoSettings, contract: Contract) -> Qwen2_5_VLConfig:
    """The recipe's ``architecture``, its control ids those of the contract's tokenizer."""
    if recipe.architecture is None:
        raise RecipeError("the recipe names no architecture; set it to one of recipes/architectures, or train for real")
    named = Path(recipe.architecture)
    path = named if named.is_file() else recipe_path("grpo-3b").parent / "architectures" / f"{named}.json"
    if not path.is_file():
        raise RecipeError(f"no architecture {recipe.architecture}; give a config.json")
    value = json.loads(path.read_text("utf-8"))
    tokenizer = contract.tokenizer
    value |= {name: tokenizer.convert_tokens_to_ids(token) for name, token in _CONTROL.items()}
    text = value["text_config"]
    text |= {"vocab_size": max(text["vocab_size"], len(tokenizer))}
    text |= {"eos_token_id": contract.encoder.im_end, "pad_token_id": tokenizer.pad_token_id}
    return Qwen2_5_VLConfig(**value)


def stand_in(recipe: GrpoSettings) -> tuple[Contract, Qwen2_5_VLConfig]:
    """nano's tokenizer with the architecture's image processor, and the configuration."""
    nano = load_contract("nano")
    config = architecture(recipe, nano)
    facts = replace(nano.facts, reader=False, max_pixels=recipe.max_pixels or _PIXELS)
    return replace(nano, facts=facts, images=image_processor(config.vision_config.to_dict(), facts)), config


def longest_rows(recipe: GrpoSettings, contract: Contract, count: int, folder: Path) -> list[Row]:
    """Made rows as long as the recipe allows; every second with an image as large as it allows."""
    side = math.isqrt(contract.facts.max_pixels)
    Image.effect_noise((side, side), 64).convert("RGB").save(folder / "largest.png")
    rows = []
    for number in range(count):
        image = folder / "largest.png" if number % 2 else None
        short = Row(str(number), "made", "", "harmful" if number % 3 else "unharmful", image=image)
        room = recipe.prompt_tokens - len(question(contract, short).ids)
        rows.append(replace(short, prompt=" the" * max(room - 1, 1)))
    return rows


def on_meta(recipe: GrpoSettings, rows: int, output: Path) -> Plan:
    """Builds the configuration of a run over so many rows and checks one micro-batch's shapes, without memory."""
    contract, config = stand_in(recipe)
    args = arguments(recipe, output, rows, cpu=not torch.cuda.is_available())
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    if recipe.freeze_vision:
        model.model.visual.requires_grad_(False)
    with TemporaryDirectory() as folder:
        prompt = question(contract, longest_rows(recipe, contract, 2, Path(folder))[1])
    assert prompt.pixels is not None
    images = _tower(model.model.visual, torch.empty_like(prompt.pixels, device="meta"))
    pads = prompt.ids.count(contract.encoder.image_pad)
    if tuple(images.shape) != (pads, config.text_config.hidden_size):
        raise RecipeError(f"the tower gives {tuple(images.shape)} for {pads} image tokens")
    ids = torch.zeros(recipe.batch_per_device, len(prompt.ids) + recipe.max_new_tokens, dtype=torch.long, device="meta")
    hidden = model.model.language_model(inputs_embeds=model.get_input_embeddings()(ids)).last_hidden_state
    scored = model.lm_head(hidden[:, -recipe.max_new_tokens - 1 : -1]).shape
    total = recipe.rollouts_for(rows)
    middle = (1 + total) // 2
    return Plan(
        updates=args.max_steps,
        accumulation=args.gradient_accumulation_steps,
        completions_per_rollout=args.generation_batch_size,
        bounds=tuple(bound(s, total, epsilon=recipe.epsilon, floor=recipe.clip_floor) for s in (1, middle, total)),  # type: ignore[arg-type]
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        prompt_tokens=len(prompt.ids),
        image_tokens=pads,
        scored=(scored[0], scored[1]),
    )


def _tower(visual: Any, patches: Tensor) -> Tensor:
    """The vision tower part by part: its own forward reads values of the grid, which meta tensors do not have."""
    hidden = visual.patch_embed(patches)
    turns = torch.empty(len(hidden), hidden.shape[1] // visual.config.num_heads, device="meta")
    for block in visual.blocks:
        hidden = block(hidden, cu_seqlens=torch.tensor([0, len(hidden)]), position_embeddings=(turns, turns))
    merged: Tensor = visual.merger(hidden)
    return merged


def with_weights(recipe: GrpoSettings, output: Path) -> dict[str, Any]:
    """Two real updates (one rollout) with random weights; gives seconds of each, peak memory and the device.

    The rollout is as small as the group allows; micro-batches, lengths and images are the recipe's.
    """
    contract, config = stand_in(recipe)
    cpu = not torch.cuda.is_available()
    step = recipe.batch_per_device * PartialState(cpu=cpu).num_processes
    prompts = math.lcm(step, recipe.group) // recipe.group
    small = replace(
        recipe, rollouts="transformers", rollout_prompts=2 * prompts, update_prompts=prompts, dynamic_clipping=True
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.update(eos_token_id=contract.encoder.im_end, pad_token_id=contract.tokenizer.pad_token_id)
    with TemporaryDirectory() as folder:
        rows = longest_rows(small, contract, small.rollout_prompts, Path(folder))
        args = arguments(small, output, len(rows), cpu=cpu)
        args.save_strategy = "no"
        trainer, _ = build(small, contract, Chosen(rows, {}), args, model=model)
        trainer.train()
    return {
        "device": "CPU" if cpu else torch.cuda.get_device_name(),
        "seconds": trainer.meter.seconds,
        "peak_bytes": peak_memory(),
        "completions_per_update": small.update_prompts * small.group,
    }
