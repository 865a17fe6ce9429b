"""Writes a guard's folder: what a worker serves, and what AutoProcessor and vLLM expect to find."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from guard_training.corpus.rows import Row, rows_to_jsonl
from guard_training.nano.model import Shape, image_processor
from guard_training.nano.pictures import typographic
from guard_training.nano.recipe import Recipe
from guard_training.nano.render import HELD_OUT_FONTS
from guard_training.nano.teacher import form
from guard_training.rowfile import write_whole


def shape(recipe: Recipe) -> Shape:
    """The sizes of the recipe's model."""
    return Shape(
        hidden=recipe.hidden,
        intermediate=recipe.intermediate,
        layers=recipe.layers,
        heads=recipe.heads,
        vision_hidden=recipe.vision_hidden,
        vision_layers=recipe.vision_layers,
        image_tokens=recipe.image_tokens,
    )


def export(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path, recipe: Recipe
) -> Path:
    """Weights (fp16, half the download; workers on a CPU compute in fp32), tokenizer, image processor and
    ``guard.json``, in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor(shape(recipe)).save_pretrained(folder)
    area = 28 * 28
    facts: dict[str, Any] = {
        "name": recipe.name,
        "reader": True,
        "window_tokens": recipe.window_tokens,
        "window_overlap": recipe.window_overlap,
        "max_windows": recipe.max_windows,
        "max_new_tokens": recipe.max_new_tokens,
        "min_pixels": 4 * area,
        "max_pixels": recipe.image_tokens * area,
        "form": form(),
    }
    (folder / "guard.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def write_held_out(rows: Sequence[Row], folder: Path, recipe: Recipe) -> Path:
    """What training never saw: ``held_out.jsonl``, typographic pictures of held-out rows in held-out fonts, with its
    images beside it, and ``bank.jsonl``, the bank's rows, harmful and harmless ones of the same words."""
    drawn = typographic(
        rows,
        count=recipe.held_out_images,
        fonts=HELD_OUT_FONTS,
        folder=folder / "images",
        seed=recipe.seed + 1,
        source="typographic_held_out",
    )
    file = folder / "held_out.jsonl"
    write_whole(file, rows_to_jsonl(drawn, folder).encode())
    bank = [row for row in rows if row.source.startswith("bank_")]
    write_whole(folder / "bank.jsonl", rows_to_jsonl(bank, folder).encode())
    return file
