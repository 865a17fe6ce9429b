"""A recipe tried before its weights are at hand: the real architecture, random, at the recipe's real lengths.

``on_meta`` builds TRL's whole configuration and runs the model on the meta device, where tensors have shapes and no
memory: seconds on a laptop for 3B. ``with_weights`` does real updates, on the GPU where there is one, and measures
seconds and memory. Both use nano's tokenizer (see ``standin``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from guard_training.corpus.rows import Row
from guard_training.tuning.clipping import bound
from guard_training.tuning.contract import Contract
from guard_training.tuning.grpo import Chosen, GrpoSettings, arguments, build
from guard_training.tuning.rollout import question
from guard_training.tuning.run import freeze, peak_memory
from guard_training.tuning.settings import RecipeError
from guard_training.tuning.standin import meta_model, stand_in, tower


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
    contract, config = stand_in(recipe.architecture, recipe.max_pixels)
    args = arguments(recipe, output, rows, cpu=not torch.cuda.is_available())
    model = meta_model(config, torch.float32)
    freeze(model, vision=recipe.freeze_vision, projector=recipe.freeze_vision)
    with TemporaryDirectory() as folder:
        prompt = question(contract, longest_rows(recipe, contract, 2, Path(folder))[1])
    assert prompt.pixels is not None
    images = tower(model.model.visual, torch.empty_like(prompt.pixels, device="meta"))
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


def with_weights(recipe: GrpoSettings, output: Path) -> dict[str, Any]:
    """Two real updates (one rollout) with random weights; gives seconds of each, peak memory and the device.

    The rollout is as small as the group allows; micro-batches, lengths and images are the recipe's.
    """
    contract, config = stand_in(recipe.architecture, recipe.max_pixels)
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
