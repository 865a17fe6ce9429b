"""A vision tower that reads by itself: nano's Qwen2.5-VL tower, with a head that spells out each image token.

Each image token has a head of ``SLOTS`` strips with one character or nothing each, so no language model is needed. Two
losses: cross-entropy per strip (dense: the renderer knows every glyph's place) and CTC along each row of tokens, which
forgives a glyph that is found one strip aside. ``curriculum`` trains it; ``TowerReader`` reads pictures with it.
"""

# ruff: noqa: S311 - the draws must repeat for a seed, not resist guessing
from __future__ import annotations

import difflib
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from guard_training.nano.glyphs import ALPHABET, KINDS, SLOTS, TOKEN, Labelled, Texts, decode, draw


@dataclass(frozen=True, slots=True)
class TowerShape:
    """Sizes; 1.4 million parameters. ``hidden`` is 32 times the number of heads."""

    hidden: int = 128
    intermediate: int = 256
    layers: int = 4
    out: int = 256


class ReadingTower(nn.Module):
    """The vision model of Qwen2.5-VL (``vision``, loadable as a model's ``visual``) and the strips' head."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        config = Qwen2_5_VLVisionConfig(
            depth=shape.layers,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_heads=shape.hidden // 32,
            patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2,
            window_size=112,
            out_hidden_size=shape.out,
            fullatt_block_indexes=list(range(1, shape.layers, 2)),
            tokens_per_second=2,
        )
        self.vision = Qwen2_5_VisionTransformerPretrainedModel(config).float()
        self.norm = nn.LayerNorm(shape.out)
        self.head = nn.Linear(shape.out, SLOTS * (len(ALPHABET) + 1))

    def forward(self, pixels: Tensor, grid: Tensor) -> Tensor:
        """Logits (image tokens, strips, 1 + characters); pixels and grid (images, 3) as the image processor gives."""
        tokens = self.vision(pixels, grid_thw=grid).pooler_output
        return self.head(self.norm(tokens)).view(-1, SLOTS, len(ALPHABET) + 1)


def processor() -> Qwen2VLImageProcessorPil:
    """Pixels as Qwen2.5-VL takes them, never resized: sides are multiples of 28 already."""
    size = {"shortest_edge": TOKEN**2, "longest_edge": 4096 * TOKEN**2}
    return Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2, size=size)


@dataclass(frozen=True, slots=True)
class Batch:
    """``labels`` (image tokens, strips); ``shapes`` are rows and columns of tokens of each image."""

    pixels: Tensor
    grid: Tensor
    labels: Tensor
    shapes: tuple[tuple[int, int], ...]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.pixels.to(device), self.grid.to(device), self.labels.to(device), self.shapes)


def to_batch(drawn: Sequence[Labelled], processor: Qwen2VLImageProcessorPil) -> Batch:
    """Images and labels as tensors."""
    made = processor(images=[one.image for one in drawn], return_tensors="pt")
    labels = np.concatenate([one.labels.reshape(-1, SLOTS) for one in drawn])
    shapes = tuple((one.labels.shape[0], one.labels.shape[1] // SLOTS) for one in drawn)
    return Batch(made["pixel_values"], made["image_grid_thw"], torch.from_numpy(labels), shapes)


def rows_of(values: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Values (image tokens, strips, ...) as one tensor (columns x strips, ...) per row of tokens of each image."""
    rows: list[Tensor] = []
    start = 0
    for height, width in shapes:
        block = values[start : start + height * width]
        rows += block.reshape(height, width * SLOTS, *values.shape[2:]).unbind(0)
        start += height * width
    return rows


def reading_loss(logits: Tensor, batch: Batch, *, ctc: float, blank_weight: float) -> Tensor:
    """Cross-entropy per strip, and CTC per character along the rows weighed by ``ctc``."""
    scores = functional.log_softmax(logits, dim=-1)
    weight = scores.new_ones(scores.shape[-1])
    weight[0] = blank_weight
    dense = functional.nll_loss(scores.flatten(0, 1), batch.labels.flatten(), weight)
    if not ctc:
        return dense
    rows, labels = rows_of(scores, batch.shapes), rows_of(batch.labels, batch.shapes)
    targets = [row[row > 0] for row in labels]
    aligned = functional.ctc_loss(
        nn.utils.rnn.pad_sequence(rows),
        torch.cat(targets),
        torch.tensor([len(row) for row in rows]),
        torch.tensor([len(target) for target in targets]),
        reduction="sum",
        zero_infinity=True,
    )
    return dense + ctc * aligned / max(sum(map(len, targets)), 1)


@torch.inference_mode()
def transcribe(
    tower: ReadingTower, processor: Qwen2VLImageProcessorPil, images: Sequence[Image.Image]
) -> list[list[tuple[str, float]]]:
    """Per image and row of tokens the text and its confidence (mean probability of its glyphs, 0 for no text)."""
    made = processor(images=list(images), return_tensors="pt")
    device = tower.head.weight.device
    chances = tower.eval()(made["pixel_values"].to(device), made["image_grid_thw"].to(device)).softmax(-1).cpu()
    shapes = [(int(height) // 2, int(width) // 2) for _, height, width in made["image_grid_thw"]]
    rows = iter(rows_of(chances, shapes))
    return [[_line(next(rows)) for _ in range(height)] for height, _ in shapes]


def _line(chances: Tensor) -> tuple[str, float]:
    best, codes = chances.max(-1)
    found = best[codes > 0]
    return decode(codes.tolist()).strip(), float(found.mean()) if len(found) else 0.0


def similarity(read: str, truth: str) -> float:
    """Share of characters in common, in order (difflib's ratio)."""
    return difflib.SequenceMatcher(None, read, truth, autojunk=False).ratio()


def edits(read: str, truth: str) -> int:
    """Characters to insert, delete or replace."""
    costs = list(range(len(truth) + 1))
    for n, got in enumerate(read, 1):
        diagonal, costs[0] = costs[0], n
        for m, wanted in enumerate(truth, 1):
            diagonal, costs[m] = costs[m], min(diagonal + (got != wanted), costs[m] + 1, costs[m - 1] + 1)
    return costs[-1]


def measure(
    tower: ReadingTower, texts: Texts, fonts: tuple[str, ...], count: int, seed: int = 99
) -> dict[str, dict[str, float]]:
    """Per kind: mean character similarity of the images' texts, and edits per true character."""
    made = processor()
    figures: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        rng = random.Random(f"{seed}/{kind}")
        drawn = [draw(kind, texts, fonts, rng) for _ in range(count)]
        found = [
            part for n in range(0, count, 8) for part in transcribe(tower, made, [d.image for d in drawn[n : n + 8]])
        ]
        pairs = [
            (
                "\n".join(filter(None, (text for text, _ in rows))),
                "\n".join(t.strip() for t in one.texts() if t.strip()),
            )
            for rows, one in zip(found, drawn, strict=True)
        ]
        figures[kind] = {
            "similarity": sum(similarity(read, truth) for read, truth in pairs) / count,
            "character_errors": sum(edits(*pair) for pair in pairs) / max(sum(len(truth) for _, truth in pairs), 1),
        }
    return figures


def pad(image: Image.Image) -> Image.Image:
    """The image with its corner's colour added to the right and below, up to multiples of 28 pixels."""
    width, height = (max(-(-side // TOKEN), 1) * TOKEN for side in image.size)
    sheet = Image.new("RGB", (width, height), image.getpixel((0, 0)))
    sheet.paste(image, (0, 0))
    return sheet


class TowerReader:
    """Reads like ``guard_middleware.guard.reader.Reader``, by the tower alone.

    Letters may be larger than those that it was trained on, so an image is read at several ``scales`` and the reading
    with the most glyphs times confidence counts. Lines below ``min_score`` are left out.
    """

    def __init__(
        self, tower: ReadingTower, *, scales: Sequence[float] = (1.0, 0.8, 0.64, 0.5), min_score: float = 0.5
    ) -> None:
        self._tower, self._scales, self._min_score, self._processor = tower, scales, min_score, processor()

    def read(self, image: bytes, timeout: float | None = None) -> str:
        """The lines from top to bottom; ``timeout`` is not kept (an image takes a fraction of a second)."""
        whole = Image.open(io.BytesIO(image)).convert("RGB")
        best, text = 0.0, ""
        for scale in self._scales:
            width, height = (max(1, round(side * scale)) for side in whole.size)
            shown = pad(whole.resize((width, height), Image.Resampling.LANCZOS))
            rows = transcribe(self._tower, self._processor, [shown])[0]
            kept = [(line, score) for line, score in rows if score >= self._min_score and any(map(str.isalnum, line))]
            confidence = sum(len(line) * (score - self._min_score) for line, score in kept)
            if confidence > best:
                best, text = confidence, "\n".join(line for line, _ in kept)
        return text
