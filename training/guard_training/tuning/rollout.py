"""TRL's GRPOTrainer for rows of the guard: text and images in one batch, prompts exactly as the product encodes them.

TRL never sees a row's words. Where it expects a prompt it holds the row's number; ``RowProcessor`` makes ids and
pixels of it through the contract, so user text cannot become a control token and raw prompts reach no log.

Pixels stand once per image in host memory; a batch carries, in place of ``pixel_values``, the numbers of their rows,
which are looked up where the vision tower is called. A group of 16 therefore costs one copy of its image and one pass
through the tower instead of 16, and a rollout keeps none on the device (512 x 16 megapixels would be 190 GB).

What is worked round in trl 1.16.0, each of which breaks mixed batches or hides a fault:
- the chat template makes a control token of an ``<|im_end|>`` that a user typed: ``_tokenize_prompts``;
- right padding by a processor that TRL did not load misaligns ``mm_token_type_ids`` (trl#5785): our own padding;
- a text row is None to vLLM and an empty list to the processor: here None, and no processor of theirs;
- an all-text micro-batch of a mixed rollout has zero rows of pixels, and ``torch.cat`` of none fails: ``looked_up``;
- ``log_multimodal`` gathers on some ranks only (deadlock), and ``log_completions`` prints raw text: both off;
- colocated vLLM expands image pads that are expanded already (trl#6294): one pad per image there;
- colocated vLLM keeps image embeddings of old weights (trl#7198): its encoder cache is emptied after each sync;
- transformers' generate leaves autocast: sampling from full-precision weights would cost twice the time;
- a resumed full fine-tune starts from the *initial* weights (transformers' lenient load): ``ResumingTrainer``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from trl import GRPOConfig, GRPOTrainer

from guard_middleware.guard.prompt import expand_images
from guard_training.corpus.rows import Row
from guard_training.tuning.contract import Contract, ImageTextProcessor, pictures
from guard_training.tuning.run import ResumingTrainer


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt: ids with expanded pads, its pictures as the model sees them, pixels (patches, 1176) and grids."""

    ids: list[int]
    pictures: list[Image.Image]
    pixels: Tensor | None
    grid: Tensor | None


def question(contract: Contract, row: Row, drawn_text: Sequence[str] = ()) -> Question:
    """The prompt of a row. Raises ``CorpusError`` for an image that cannot be judged."""
    ids, seen = contract.encode(row, drawn_text).ids, pictures(row)
    if not seen:
        return Question(ids, [], None, None)
    made = contract.images(images=seen, return_tensors="pt")
    side, grid = contract.images.patch_size, made["image_grid_thw"]
    counts = (grid.prod(-1) // contract.images.merge_size**2).tolist()
    # scaled here, so that another engine's own bounds cannot give another number of image tokens
    scaled = [
        picture.resize((side * wide, side * high), Image.Resampling.BICUBIC)
        for picture, (_, high, wide) in zip(seen, grid.tolist(), strict=True)
    ]
    return Question(expand_images(ids, counts, contract.encoder.image_pad), scaled, made["pixel_values"], grid)


class RowProcessor(ImageTextProcessor):
    """Makes batches out of row numbers. Hold one per trainer: it remembers the pixels of the current rollout."""

    contract: Contract
    rows: Sequence[Row]
    drawn: dict[int, list[str]]

    @classmethod
    def of(cls, contract: Contract, rows: Sequence[Row], drawn: dict[int, list[str]]) -> Self:
        """``drawn``: what the reader found, by the number of the row."""
        made = cls(contract.images, contract.tokenizer, chat_template=contract.tokenizer.chat_template)
        made.contract, made.rows, made.drawn = contract, rows, drawn
        made.start([])
        return made

    def start(self, keys: Sequence[str]) -> None:
        """Encodes the rows of a new rollout and forgets the last one's."""
        self._questions = {
            key: question(self.contract, self.rows[int(key)], self.drawn.get(int(key), ()))
            for key in dict.fromkeys(keys)
        }
        self._first, pixels, at = {}, [], 0
        for key, one in self._questions.items():
            if one.pixels is not None:
                self._first[key], at = at, at + len(one.pixels)
                pixels.append(one.pixels)
        self._pixels = torch.cat(pixels) if pixels else torch.empty(0)

    def fields(self, keys: Sequence[str]) -> dict[str, Any]:
        """Model inputs beside the ids: pixel row numbers (rows, 1), grids (images, 3), token kinds (lists)."""
        shown = [key for key in keys if key in self._first]
        if not shown:
            return {}
        spans = [torch.arange(self._first[k], self._first[k] + len(self._questions[k].pixels)) for k in shown]  # type: ignore[arg-type]
        pad = self.contract.encoder.image_pad
        return {
            "pixel_values": torch.cat(spans)[:, None],
            "image_grid_thw": torch.cat([self._questions[k].grid for k in shown]),  # type: ignore[misc]
            "mm_token_type_ids": [[int(id == pad) for id in self._questions[k].ids] for k in keys],
        }

    def tokenize(
        self, keys: Sequence[str]
    ) -> tuple[list[list[int]], list[list[Image.Image] | None] | None, dict[str, Any]]:
        """What TRL's ``_tokenize_prompts`` returns: ids, pictures (None for a row or a batch without any), fields."""
        self.start(keys)
        shown = [self._questions[key].pictures or None for key in keys]
        return [self._questions[key].ids for key in keys], shown if any(shown) else None, self.fields(keys)

    def looked_up(self, features: Callable[..., Any]) -> Callable[..., Any]:
        """A vision model's ``get_image_features`` that takes row numbers for pixels, and sees each image once."""

        @functools.wraps(features)
        def see(pixel_values: Tensor, image_grid_thw: Tensor, **kwargs: Any) -> Any:
            if not len(pixel_values):
                return None
            sizes = image_grid_thw.prod(-1)
            firsts = pixel_values[sizes.cumsum(0) - sizes, 0].tolist()
            at = {first: number for number, first in reversed(list(enumerate(firsts)))}
            kept = sorted(at, key=lambda first: at[first])
            pixels = torch.cat([self._pixels[first : first + int(sizes[at[first]])] for first in kept])
            seen = features(
                pixels.to(pixel_values.device), image_grid_thw[torch.tensor([at[first] for first in kept])], **kwargs
            )
            made = dict(zip(kept, seen.pooler_output, strict=True))
            seen.pooler_output = tuple(made[first] for first in firsts)
            return seen

        return see

    def apply_chat_template(self, conversation: Any, **_: Any) -> str:
        """The row's number, which TRL hands back to ``__call__`` as text."""
        return str(conversation[-1]["content"])

    def __call__(self, images: Any = None, text: Any = None, **_: Any) -> BatchFeature:
        """Inputs of the rows numbered in ``text``, which ``tokenize`` has seen; token kinds padded on the left."""
        made = self.fields(text)
        kinds = made["mm_token_type_ids"]
        longest = max(map(len, kinds))
        return BatchFeature({**made, "mm_token_type_ids": torch.tensor([[0] * (longest - len(k)) + k for k in kinds])})

    def save_pretrained(self, save_directory: Any, **_: Any) -> None:
        """Tokenizer, image processor and facts: a checkpoint is a guard's folder."""
        self.contract.save(Path(save_directory))


def key(number: int) -> list[dict[str, str]]:
    """The ``prompt`` column of row ``number``."""
    return [{"role": "user", "content": str(number)}]


class GuardGRPOTrainer(ResumingTrainer, GRPOTrainer):
    """``processing_class`` must be a ``RowProcessor``, and the ``prompt`` column made with ``key``."""

    def __init__(self, *, args: GRPOConfig, processing_class: RowProcessor, **kwargs: Any) -> None:
        args.log_multimodal = args.log_completions = False
        super().__init__(args=args, processing_class=processing_class, **kwargs)
        base = self.accelerator.unwrap_model(self.model)
        base = base.get_base_model() if hasattr(base, "get_base_model") else base
        # the inner model's: generate calls it before any forward, and PEFT goes round the outer one
        base.model.get_image_features = processing_class.looked_up(base.model.get_image_features)
        if self.use_vllm and self.vllm_mode == "colocate":
            generation, sync = self.vllm_generation, self.vllm_generation.sync_weights

            def sync_weights() -> None:
                sync()
                generation.llm.llm_engine.reset_encoder_cache()

            generation.sync_weights = sync_weights

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        return self.processing_class.tokenize([prompt[-1]["content"] for prompt in prompts])

    def _generate_single_turn(self, prompt_ids: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        if self.use_vllm and self.vllm_mode == "colocate" and images is not None:
            prompt_ids = [collapse(ids, self.processing_class.image_token_id) for ids in prompt_ids]
        with self.accelerator.autocast():
            return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)


def collapse(ids: Sequence[int], pad: int) -> list[int]:
    """``ids`` with every run of image pads made one."""
    return [id for at, id in enumerate(ids) if id != pad or not at or ids[at - 1] != pad]
