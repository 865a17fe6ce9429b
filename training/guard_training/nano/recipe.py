"""Every constant of a training run, read from a YAML file.

Refuses: an unknown key, a missing one, and a value of another type; the message names the key.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guard_training.tuning.settings import read_settings, recipe_path, settings


@dataclass(frozen=True, slots=True)
class Recipe:
    """See ``recipes/nano.yaml`` for what each constant does."""

    seed: int
    name: str
    files: list[str]
    held_out: float
    exclude: list[str]
    cases: int
    power: float
    harmful_share: float
    source_shares: dict[str, float]
    kind_shares: dict[str, float]
    pool_shares: dict[str, float]
    brief_share: float
    stretches: int
    stretch_words: int
    variants: int
    variant_words: int
    answers: int
    definitions: int
    head_penalty: float
    head_sharpness: float
    lexicon_share: float
    label_share: float
    embedding_weight: float
    prompt_words: int
    images: int
    held_out_images: int
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vision_hidden: int
    vision_layers: int
    image_tokens: int
    embedding_rank: int
    odds_dims: int
    odds_steps: int
    odds_penalty: float
    batch: int
    learning_rate: float
    weight_decay: float
    warmup: int
    save_every: int
    stages: list[dict[str, Any]]
    token_weights: dict[str, float]
    held_out_bank: float
    false_positives: float
    window_tokens: int
    window_overlap: int
    max_windows: int
    max_new_tokens: int


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file; raises ``RecipeError``."""
    return read_settings(Recipe, path)


def stages(first: Recipe) -> list[Recipe]:
    """The stages of a run: the recipe itself, then the recipe with what each of ``stages`` says and its own draws."""
    values = {name: getattr(first, name) for name in first.__slots__}
    later = [
        settings(Recipe, {**values, **changed, "seed": first.seed + number}, f"stage {number + 1}")
        for number, changed in enumerate(first.stages, 1)
    ]
    return [first, *later]


def default_recipe() -> Path:
    """The recipe of nano: in the repository, or in the installed package."""
    return recipe_path("nano")
