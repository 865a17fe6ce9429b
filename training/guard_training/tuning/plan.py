"""A run of SFT before it starts: steps, shapes and memory, from the real architecture on the meta device; and a
rehearsal of real steps with random weights.

Activations are counted, not guessed: autograd reports every tensor that the forward pass keeps. Not in the estimate:
the CUDA context, fragmentation, buffers of the collectives. So take it as a lower bound, within about a fifth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from transformers import Qwen2_5_VLForConditionalGeneration

from guard_training.corpus.rows import Row
from guard_training.tuning.contract import Contract
from guard_training.tuning.run import Bar, Meter, adapters, freeze
from guard_training.tuning.settings import RecipeError, SftSettings
from guard_training.tuning.sft import Collator, Example, arguments, build, encode_row, to_dataset
from guard_training.tuning.standin import meta_model, stand_in, tower

#: Reasoning of the paper's corpus: 5.13 steps of 159 characters (Table 6), about this many tokens.
_ANSWER = 200
#: Columns of the vocabulary for which TRL's fused head holds logits at a time.
_TILE = 32768
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes on one device, whole (one device, DDP) and sharded (FSDP, ZeRO-3)."""

    name: str
    whole: int
    sharded: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will be. ``shapes`` are those of one micro-batch of the longest rows."""

    devices: int
    rows: int
    steps: int
    accumulation: int
    trainable: int
    frozen: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    parts: tuple[Part, ...]

    def table(self) -> Table:
        table = Table(title=f"memory of one device in GiB, {self.devices} devices")
        for column in ("part", "one device or DDP", "FSDP or ZeRO-3"):
            table.add_column(column, justify="left" if column == "part" else "right")
        for part in (*self.parts, Part("sum", sum(p.whole for p in self.parts), sum(p.sharded for p in self.parts))):
            table.add_row(part.name, f"{part.whole / _GIB:.1f}", f"{part.sharded / _GIB:.1f}")
        return table

    def lines(self, recipe: SftSettings) -> list[str]:
        """For the console, above the table."""
        total = self.trainable + self.frozen
        return [
            f"{total:,} parameters: {self.trainable:,} trainable, {self.frozen:,} frozen",
            f"{self.rows:,} rows x {recipe.epochs:g} epochs in {self.steps:,} steps of {recipe.global_batch} rows: "
            f"{recipe.batch_per_device} x {self.accumulation} x {self.devices} devices",
            f"learning rate {recipe.learning_rate:g}, {recipe.scheduler}, {recipe.warmup_steps} steps of warm-up",
            *(f"{name}: {' x '.join(map(str, shape))}" for name, shape in self.shapes),
        ]


def longest(recipe: SftSettings, contract: Contract, count: int, folder: Path) -> list[Example]:
    """Made rows that fill the cutoff; every second with an image as large as the recipe allows."""
    side = math.isqrt(contract.facts.max_pixels)
    picture = folder / "largest.png"
    Image.effect_noise((side, side), 64).convert("RGB").save(picture)
    made = []
    for image in (picture, None):
        row = Row("made", "made", " the", "unharmful", image=image, rationale=" the" * _ANSWER)
        room = recipe.cutoff - encode_row(contract, row, 2**31).tokens
        if room < 0:
            raise RecipeError(f"cutoff {recipe.cutoff} has no room for the largest image; lower max_pixels")
        made.append(encode_row(contract, replace(row, prompt=" the" * (1 + room)), recipe.cutoff))
    return [made[number % 2] for number in range(count)]


def plan(recipe: SftSettings, rows: int, devices: int, folder: Path) -> Plan:
    """Builds the model of the recipe without memory and checks one micro-batch's shapes. Raises ``RecipeError``."""
    contract, config = stand_in(recipe.architecture, recipe.max_pixels)
    accumulation = recipe.accumulation(devices)
    model = meta_model(config, torch.bfloat16 if recipe.precision == "bf16" else torch.float32)
    freeze(model, vision=recipe.freeze_vision, projector=recipe.freeze_projector)
    trained: Any = model
    if recipe.lora:
        from peft import get_peft_model

        trained = get_peft_model(model, adapters(recipe.lora), autocast_adapter_dtype=False)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    trainable = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in trained.parameters()) - trainable

    dataset = to_dataset(longest(recipe, contract, recipe.batch_per_device, folder))
    batch = Collator(contract)([dataset[number] for number in range(len(dataset))])
    shapes, kept = _forward(model, batch)
    held = trainable + frozen
    # the largest unit that is gathered at a time: the embeddings, or one decoder layer
    unit = max(model.get_input_embeddings().weight.numel(), *map(_size, model.model.language_model.layers))
    cast = 2 if recipe.precision == "bf16" else 0
    parts = (
        Part("weights (fp32)", 4 * held, 4 * held // devices),
        Part("weights in use (bf16 copies, gathered shards)", cast * held, (cast or 4) * unit),
        Part("gradients (fp32)", 4 * trainable, 4 * trainable // devices),
        Part("optimiser (AdamW, two moments in fp32)", 8 * trainable, 8 * trainable // devices),
        Part("activations", kept, kept),
    )
    steps = math.ceil(rows / recipe.global_batch) * recipe.epochs
    return Plan(devices, rows, math.ceil(steps), accumulation, trainable, frozen, shapes, parts)


def _size(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def _forward(model: Any, batch: dict[str, Any]) -> tuple[tuple[tuple[str, tuple[int, ...]], ...], int]:
    """Shapes of a forward pass, and the bytes that a training step keeps at its peak."""
    config = model.config.get_text_config()
    language, pads = model.model.language_model, int(batch["mm_token_type_ids"].sum())
    patches = torch.empty_like(batch["pixel_values"], device="meta", dtype=model.dtype)
    seen, tower_bytes = _kept(model, lambda: tower(model.model.visual, patches))
    if tuple(seen.shape) != (pads, config.hidden_size):
        raise RecipeError(f"the vision tower gives {tuple(seen.shape)} for {pads} image tokens of {config.hidden_size}")
    ids = batch["input_ids"].to("meta")
    places = batch["mm_token_type_ids"].bool().unsqueeze(-1).to("meta")

    def embed() -> Any:
        words = model.get_input_embeddings()(ids)
        return words.masked_scatter(places.expand_as(words), seen.to(words.dtype))

    hidden, kept = _kept(model, lambda: language(inputs_embeds=embed(), use_cache=False).last_hidden_state)
    labelled = int((batch["labels"] != -100).sum())
    logits = model.lm_head(hidden[:, :-1].reshape(-1, hidden.shape[-1])[:labelled])
    if logits.shape != (labelled, config.vocab_size):
        raise RecipeError(f"the head gives {tuple(logits.shape)} for a vocabulary of {config.vocab_size}")
    # what one decoder layer keeps when it runs again in the backward pass
    again = _kept(model, lambda: _one_layer(language, hidden.detach().requires_grad_()))[1]
    tile = 4 * 2 * labelled * min(config.vocab_size, _TILE)
    shapes = (
        ("tokens", tuple(ids.shape)),
        ("image patches", tuple(patches.shape)),
        ("image tokens", tuple(seen.shape)),
        ("hidden states", tuple(hidden.shape)),
        ("logits of the answers", tuple(logits.shape)),
    )
    return shapes, tower_bytes + kept + (again if language.gradient_checkpointing else 0) + tile


def _one_layer(language: Any, hidden: Any) -> Any:
    """The language model with its first layer only, nothing recomputed."""
    layers, checkpointing = language.layers, language.layers[0].gradient_checkpointing
    layers[0].gradient_checkpointing = False
    language.layers = layers[:1]
    try:
        return language(inputs_embeds=hidden, use_cache=False).last_hidden_state
    finally:
        language.layers, layers[0].gradient_checkpointing = layers, checkpointing


def _kept(model: Any, forward: Callable[[], Any]) -> tuple[Any, int]:
    """What ``forward`` returns, and the bytes that autograd keeps of it, parameters aside."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    return output, sum(storage.nbytes() for storage in kept.values())


def rehearse(recipe: SftSettings, steps: int, *, cpu: bool) -> str:
    """Real steps with random weights of the recipe's architecture, on rows that fill the cutoff; says what they cost.

    Batch, lengths and images are the recipe's, so a step costs what it will cost. Checkpoints are not written.
    """
    contract, config = stand_in(recipe.architecture, recipe.max_pixels)
    torch.manual_seed(recipe.seed)
    with torch.device("cpu" if cpu else "cuda"):
        model = Qwen2_5_VLForConditionalGeneration(config).float()
    with TemporaryDirectory() as folder:
        args = arguments(recipe, Path(folder), cpu=cpu)
        args.max_steps, args.logging_steps, args.save_strategy, args.report_to = steps, 1, "no", []
        trainer = build(
            recipe, contract, longest(recipe, contract, recipe.global_batch * steps, Path(folder)), args, model=model
        )
        meter = Meter()
        trainer.add_callback(meter)
        with Bar().over(trainer):
            trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return (
        f"{recipe.architecture} with random weights, steps of {recipe.global_batch} rows of {recipe.cutoff} tokens; "
        f"{meter.summary()}; loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last"
    )
