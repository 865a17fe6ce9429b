"""The guard's contract for Hugging Face trainers: the same ids, images and output form as the worker serves.

Prompts go through ``guard_middleware.guard.prompt`` (text of a row can never become a control token, images stand
where the published weights expect them), completions through ``guard_middleware.guard.parse.completion`` (what the
strict parser reads back). Nothing here needs torchvision: it breaks ``AutoProcessor`` on a CPU build of torch, so
tokenizer and Pillow image processor are loaded one by one; ``ImageTextProcessor`` joins them for trainers that insist.

Refuses: what ``guard_middleware.worker.weights`` refuses, a row whose request has no label, and a rationale that
holds a tag of the output form.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerFast, ProcessorMixin, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from guard_middleware.errors import ConfigError
from guard_middleware.guard.parse import completion
from guard_middleware.guard.prompt import Encoded, PromptEncoder, expand_images, render
from guard_middleware.worker.weights import ModelFacts, resolve
from guard_training.corpus.conversation import conversation
from guard_training.corpus.rows import CorpusError, Row


class ContractError(ValueError):
    """A model that is no guard of this kind; the message says what to give instead."""


@dataclass(frozen=True, slots=True)
class Contract:
    """What every trainer needs of one guard. ``folder`` holds its weights; make it with ``load_contract``."""

    folder: Path
    facts: ModelFacts
    tokenizer: PreTrainedTokenizerFast
    images: Qwen2VLImageProcessorPil
    encoder: PromptEncoder

    def encode(self, row: Row, drawn_text: Sequence[str] = ()) -> Encoded:
        """The prompt of a row, up to ``<|im_start|>assistant\\n``, with one pad per image (see ``expand``).

        ``drawn_text``: what the reader found in the row's image, for a guard that is served with it (``facts.reader``).
        """
        return self.encoder.encode(render(conversation(row), drawn_text))

    def encode_target(self, text: str) -> list[int]:
        """Ids of what the guard should write, and the end of its turn. A quoted control token stays text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [*ids, self.encoder.im_end]

    def image_tokens(self, picture: Image.Image) -> int:
        """Prompt tokens that an image costs after scaling to the guard's pixel bounds."""
        factor = self.images.patch_size * self.images.merge_size
        bounds = self.images.size["shortest_edge"], self.images.size["longest_edge"]
        high, wide = smart_resize(picture.height, picture.width, factor, *bounds)
        return int(high * wide // factor**2)

    def expand(self, ids: Sequence[int], pictures: Sequence[Image.Image]) -> list[int]:
        """``ids`` with each image pad repeated as the model wants it."""
        return expand_images(ids, [self.image_tokens(picture) for picture in pictures], self.encoder.image_pad)

    def save(self, folder: Path) -> None:
        """Tokenizer, image processor and serving facts, beside weights that a trainer saved there."""
        self.tokenizer.save_pretrained(folder)
        self.images.save_pretrained(folder)
        stated = self.folder / "guard.json"
        facts: dict[str, Any] = json.loads(stated.read_text("utf-8")) if stated.is_file() else {}
        facts |= {"min_pixels": self.images.size["shortest_edge"], "max_pixels": self.images.size["longest_edge"]}
        (folder / "guard.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_contract(model: str, *, max_pixels: int | None = None) -> Contract:
    """The contract of ``nano``, a folder or a hub id. ``max_pixels`` (area) bounds images tighter than the guard's own.

    Raises ``ContractError``.
    """
    try:
        weights = resolve(model)
        tokenizer = AutoTokenizer.from_pretrained(weights.folder, local_files_only=True)
        encoder = PromptEncoder(tokenizer)
    except (ConfigError, OSError, ValueError) as error:
        raise ContractError(f"{model}: {error}") from None
    facts = weights.facts
    if max_pixels is not None:
        facts = replace(facts, max_pixels=min(max_pixels, facts.max_pixels))
    vision = json.loads((weights.folder / "config.json").read_text("utf-8")).get("vision_config", {})
    return Contract(weights.folder, facts, tokenizer, image_processor(vision, facts), encoder)


def image_processor(vision: dict[str, Any], facts: ModelFacts) -> Qwen2VLImageProcessorPil:
    """The Pillow image processor for a ``vision_config``, within the facts' pixel bounds."""
    return Qwen2VLImageProcessorPil(
        patch_size=vision.get("patch_size", 14),
        merge_size=vision.get("spatial_merge_size", 2),
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        size={"shortest_edge": facts.min_pixels, "longest_edge": facts.max_pixels},
    )


def load_model(
    folder: Path, *, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> Qwen2_5_VLForConditionalGeneration:
    """The weights in a folder, for training: no key-value cache kept. ``kwargs`` go to ``from_pretrained``."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, local_files_only=True, **kwargs)
    model.config.use_cache = model.config.text_config.use_cache = False
    return model


def open_image(data: bytes) -> Image.Image:
    """A blob's picture as the worker decodes it."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def pictures(row: Row) -> list[Image.Image]:
    """The pictures of a row, in the order of the prompt's pads. Raises ``CorpusError``."""
    blobs = conversation(row).blobs()
    try:
        return [open_image(blob.data) for blob in blobs]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CorpusError(f"{row.name}: its image cannot be decoded ({type(error).__name__})") from None


def target(row: Row, rationale: str) -> str:
    """What the guard should write for a row: reasoning, then the verdict; ``Response: None`` where no answer is judged.

    Raises ``CorpusError`` for a row without a request label (the strict form has no place for one) and for a rationale
    that holds a tag of the form.
    """
    if row.request is None:
        raise CorpusError(f"{row.name}: the request has no label; let `guard-train synthesize` decide it")
    if not rationale.strip():
        raise CorpusError(f"{row.name}: no rationale; write one with `guard-train synthesize`")
    try:
        return completion(rationale, row.request, row.response_label if row.response else None)
    except ValueError as error:
        raise CorpusError(f"{row.name}: {error}") from None


class ImageTextProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without video, which alone needs torchvision. Save the parts, not this class:
    ``AutoProcessor`` cannot load a folder that names it."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **_: Any) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        self.video_processor = None
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)
