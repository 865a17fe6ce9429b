"""The real architecture without its weights: for dry runs on the meta device and rehearsals with random weights.

nano's tokenizer stands in for the architecture's own, whose control ids are made to agree with it: which ids a text
has does not change what a step costs. Refuses: a recipe that names no architecture.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from guard_training.tuning.contract import Contract, image_processor, load_contract
from guard_training.tuning.settings import RecipeError, recipe_path

_CONTROL = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
#: The area of the largest image where the recipe bounds none: what the worker shows the published weights.
_PIXELS = 1280 * 28 * 28


def architecture(name: str | None, contract: Contract) -> Qwen2_5_VLConfig:
    """The configuration in a ``config.json``, by path or by name in ``recipes/architectures``."""
    if name is None:
        raise RecipeError("the recipe names no architecture; set it to one of recipes/architectures, or train for real")
    path = Path(name)
    if not path.is_file():
        path = recipe_path("sft-3b").parent / "architectures" / f"{name}.json"
    if not path.is_file():
        raise RecipeError(f"no architecture {name}; give a config.json, or one of recipes/architectures")
    value = json.loads(path.read_text("utf-8"))
    tokenizer = contract.tokenizer
    value |= {key: tokenizer.convert_tokens_to_ids(token) for key, token in _CONTROL.items()}
    text = value["text_config"]
    text |= {"vocab_size": max(text["vocab_size"], len(tokenizer))}
    text |= {"eos_token_id": contract.encoder.im_end, "pad_token_id": tokenizer.pad_token_id}
    return Qwen2_5_VLConfig(**value)


def stand_in(name: str | None, max_pixels: int | None) -> tuple[Contract, Qwen2_5_VLConfig]:
    """nano's tokenizer with the architecture's image processor, and the configuration."""
    nano = load_contract("nano")
    config = architecture(name, nano)
    facts = replace(nano.facts, reader=False, max_pixels=max_pixels or _PIXELS)
    return replace(nano, facts=facts, images=image_processor(config.vision_config.to_dict(), facts)), config


def meta_model(config: Qwen2_5_VLConfig, dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    """The model without memory, in training mode, with an attention that keeps what fused kernels keep."""
    AttentionInterface.register("shapes", _shapes)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation("shapes")
    return model.train()


def tower(visual: Any, patches: Tensor) -> Tensor:
    """The vision tower part by part: its own forward reads values of the grid, which meta tensors do not have."""
    hidden = visual.patch_embed(patches)
    turns = torch.empty(len(hidden), hidden.shape[1] // visual.config.num_heads, device="meta")
    for block in visual.blocks:
        hidden = block(hidden, cu_seqlens=torch.tensor([0, len(hidden)]), position_embeddings=(turns, turns))
    merged: Tensor = visual.merger(hidden)
    return merged


class _Fused(torch.autograd.Function):
    """Attention by shape: keeps queries, keys, values and output for the backward pass, never the scores.

    The meta device's own attention is the plain one, whose scores (tokens x tokens x heads) no GPU kernel keeps.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _shapes(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _Fused.apply(query, key, value).transpose(1, 2), None
