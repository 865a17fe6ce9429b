"""nano's model: Qwen2.5-VL's architecture at 3 to 12 million parameters, started from statistics of its own texts.

A random start spends most of a short run on learning which words belong together. So the embeddings start from the
singular vectors of the tokens' pointwise mutual information in the training texts, and from each token's log-odds of
harm there: the first layer's attention is nearly uniform at the start, so the mean of the words seen so far reaches
the later layers from the first step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    model: Qwen2_5_VLForConditionalGeneration,
    texts: Iterable[Sequence[int]],
    odds: Tensor,
    *,
    rank: int,
    odds_dims: int,
) -> None:
    """Writes the statistical start into the (tied) embeddings, in place: ``rank`` dimensions of singular vectors,
    ``odds_dims`` of log-odds, the rest stays random. Every part has about the scale of the random start times two."""
    weight = model.get_input_embeddings().weight
    vectors = _singular_vectors(texts, weight.shape[0], rank)
    scale = 2 * model.config.text_config.initializer_range
    known = odds.abs() > 0
    with torch.no_grad():
        weight[:, :rank] = torch.where(vectors.abs().sum(1, keepdim=True) > 0, vectors * scale, weight[:, :rank])
        column = (odds / odds[known].std()).clamp(-4, 4) * scale
        signs = torch.tensor([1.0, -1.0]).repeat(odds_dims)[:odds_dims]
        weight[: len(odds), rank : rank + odds_dims] += column[:, None] * signs


def _singular_vectors(texts: Iterable[Sequence[int]], size: int, rank: int, *, window: int = 6) -> Tensor:
    """Rows of unit variance from the positive pointwise mutual information of tokens at most ``window`` apart."""
    stream = torch.tensor([id for ids in texts for id in (*ids, -1)])
    counts = torch.zeros(0, dtype=torch.long), torch.zeros(0)
    for distance in range(1, window + 1):
        left, right = stream[:-distance], stream[distance:]
        kept = (left >= 0) & (right >= 0)
        pairs = torch.cat((left[kept] * size + right[kept], right[kept] * size + left[kept]))
        keys, found = torch.unique(torch.cat((counts[0], pairs)), return_inverse=True)
        values = torch.zeros(len(keys)).index_add_(
            0, found, torch.cat((counts[1], torch.full((len(pairs),), 1.0 / distance)))
        )
        counts = keys, values
    keys, values = counts
    rows, columns = keys // size, keys % size
    totals = torch.zeros(size).index_add_(0, rows, values)
    smooth = totals**0.75
    information = torch.log(values * smooth.sum() / (totals[rows] * smooth[columns])).clamp(min=0)
    kept = information > 0
    matrix = torch.sparse_coo_tensor(
        torch.stack((rows[kept], columns[kept])), information[kept], (size, size), check_invariants=True
    )
    torch.manual_seed(0)
    left, singular, _ = torch.svd_lowrank(matrix.coalesce(), q=rank, niter=3)
    vectors = left * singular.sqrt()
    return vectors / vectors.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
