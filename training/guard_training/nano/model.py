"""nano's model: Qwen2.5-VL's architecture at 3 to 12 million parameters, started from what its words mean.

A random start spends most of a short run on learning which words belong together. So the embeddings start from the
principal components of a sentence encoder's vectors of the tokens' texts, and from each token's log-odds of harm in
the training texts: the first layer's attention is nearly uniform at the start, so the mean of the words seen so far
reaches the later layers from the first step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model. ``hidden`` is 64 times ``heads`` (a head size that vLLM's CPU backend knows).

    Key-value heads are half of the heads.
    """

    hidden: int = 256
    intermediate: int = 512
    layers: int = 4
    heads: int = 4
    vision_hidden: int = 128
    vision_layers: int = 2
    image_tokens: int = 16


def build_model(tokenizer: PreTrainedTokenizerFast, shape: Shape, *, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """The model at random; deterministic for a seed."""
    if shape.hidden != 64 * shape.heads:
        raise ValueError("hidden must be 64 times heads")
    id = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": max(shape.heads // 2, 1),
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "bos_token_id": id("<|endoftext|>"),
            "eos_token_id": id("<|im_end|>"),
            "pad_token_id": id("<|endoftext|>"),
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": shape.vision_layers,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": 2 * shape.vision_hidden,
            "num_heads": max(shape.vision_hidden // 32, 1),
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "out_hidden_size": shape.hidden,
            "fullatt_block_indexes": [shape.vision_layers - 1],
            "tokens_per_second": 2,
        },
        image_token_id=id("<|image_pad|>"),
        video_token_id=id("<|video_pad|>"),
        vision_start_token_id=id("<|vision_start|>"),
        vision_end_token_id=id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    model.generation_config.update(
        do_sample=False, eos_token_id=id("<|im_end|>"), pad_token_id=id("<|endoftext|>"), bos_token_id=None
    )
    return model


def image_processor(shape: Shape) -> Qwen2VLImageProcessorPil:
    """Images are scaled to at most ``image_tokens`` tokens of 28 x 28 pixels."""
    area = 28 * 28
    size = {"shortest_edge": 4 * area, "longest_edge": shape.image_tokens * area}
    return Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2, size=size)


def start_embeddings(
    model: Qwen2_5_VLForConditionalGeneration, words: Tensor, odds: Tensor, *, rank: int, odds_dims: int
) -> None:
    """Writes the start into the (tied) embeddings, in place: ``rank`` principal components of ``words`` (ids, any
    width; a zero row is unknown), ``odds_dims`` of log-odds (ids,), the rest stays random. Every part has about the
    scale of the random start times two."""
    weight = model.get_input_embeddings().weight
    scale = 2 * model.config.text_config.initializer_range
    known = words.abs().sum(1) > 0
    centred = words[known] - words[known].mean(0)
    torch.manual_seed(0)
    _, _, axes = torch.pca_lowrank(centred, q=rank, center=False)
    vectors = centred @ axes
    with torch.no_grad():
        weight[: len(words), :rank][known] = vectors / vectors.square().mean().sqrt() * scale
        seen = odds.abs() > 0
        column = (odds / odds[seen].std()).clamp(-4, 4) * scale
        signs = torch.tensor([1.0, -1.0]).repeat(odds_dims)[:odds_dims]
        weight[: len(odds), rank : rank + odds_dims] += column[:, None] * signs


def start_attention(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Lets the first layers pass on the mean of the words: their values copy a share of the dimensions each, and their
    outputs write it back to the same dimensions, in place. Without it the mean has to squeeze through matrices of
    small random numbers, and what the words mean arrives hundreds of steps later than what they are worth."""
    config = model.config.get_text_config()
    head = config.hidden_size // config.num_attention_heads
    width = config.num_key_value_heads * head
    shared = config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        for number, layer in enumerate(model.model.language_model.layers[: config.hidden_size // width]):
            copied = torch.arange(width)
            layer.self_attn.v_proj.weight[copied, number * width + copied] += 1.0
            for query in range(config.num_attention_heads):
                from_, to = query * head, number * width + (query // shared) * head
                # Weakly, or the first share would dwarf the second in the next layer's norm.
                layer.self_attn.o_proj.weight[to : to + head, from_ : from_ + head] += 0.1 * torch.eye(head) / shared
