"""The guard on transformers: CPU in fp32, CUDA in bf16, greedy decoding of one batch at a time.

The decode loop is written out here because three things are needed of every step that ``generate()`` makes awkward: a
row whose caller has gone leaves the batch (with its cache), the probability of a label is read where the label is
written, and a row ends at ``</result>``. A prompt that is not to be thought about is read together with the words
before its first label, so that such a verdict is one prefill, and one step more where there is an answer. A token of a
4 M-parameter model takes 2.0 ms on one CPU thread (2.5 ms with ``generate()``, 2.8 ms with its static cache), so the
cache is the dynamic one.

No torchvision: pixels come from the Pillow image processor, image pads are expanded here, positions (mrope) are
computed by the model's own ``get_rope_index``. Images are shown at ``facts.max_pixels`` at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging as transformers_logging

from guard_middleware.errors import ConfigError, GuardError, GuardErrorKind
from guard_middleware.guard.parse import END_RESULT, END_THINK
from guard_middleware.guard.prompt import PromptEncoder, expand_images
from guard_middleware.worker.brief import Brief, Words
from guard_middleware.worker.engine import Generation, GuardPrompt
from guard_middleware.worker.form import Filling, Form
from guard_middleware.worker.pictures import decoded, picture_tokens
from guard_middleware.worker.tokens import read_tokenizer
from guard_middleware.worker.weights import ModelFacts, Weights

#: Tokens within which a tag ends, whatever the tokenizer: every byte of it may be a token.
_TAIL = len(END_RESULT) + 4


@dataclass(slots=True)
class _Row:
    """One prompt in the making; ``thought`` is the number of tokens up to ``</think>``.

    ``written`` begins with ``given`` ids that the prefill read; ``pending`` are those that the model has yet to read.
    """

    index: int
    prompt: GuardPrompt
    ids: list[int]
    filling: Filling | Brief | None = None
    written: list[int] = field(default_factory=list)
    given: int = 0
    decoded: int = 0
    pending: list[int] = field(default_factory=list)
    thought: int | None = None
    label: Literal["request", "response"] | None = None
    scores: dict[str, float] = field(default_factory=dict)
    finish: Literal["stop", "length"] | None = None


class TransformersEngine:
    """``BatchEngine`` on transformers; loads at once. ``device`` None takes CUDA where there is one."""

    def __init__(self, weights: Weights, *, device: str | None = None, max_batch: int = 8) -> None:
        transformers_logging.disable_progress_bar()
        self._weights, self.max_batch = weights, max_batch
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            self._tokenizer, self._encoder = read_tokenizer(weights.folder)
            # bf16 is ten times slower than fp32 on CPUs without bf16 units.
            dtype = torch.float32 if self._device.type == "cpu" else torch.bfloat16
            self._model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                weights.folder, dtype=dtype, local_files_only=True
            )
        except Exception as error:
            raise ConfigError(f"the model cannot be loaded: {error}", path=str(weights.folder)) from error
        self._model.to(self._device).eval()
        vision = self._model.config.vision_config
        self._factor = vision.patch_size * vision.spatial_merge_size
        self._processor = Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            size={"shortest_edge": self.facts.min_pixels, "longest_edge": self.facts.max_pixels},
        )
        self._harmful, self._unharmful = (self._encoder.plain(f" {label}")[0] for label in ("harmful", "unharmful"))
        if self._harmful == self._unharmful:
            raise ConfigError("the labels begin with the same token", path=str(weights.folder))
        self._form = Form(self.facts.form, self._tokenizer) if self.facts.form else None
        self._words = Words(self._tokenizer)
        eos = self._model.generation_config.eos_token_id
        self._ends = {self._encoder.im_end, *(eos if isinstance(eos, list) else [eos] if eos is not None else [])}

    @property
    def facts(self) -> ModelFacts:
        return self._weights.facts

    @property
    def encoder(self) -> PromptEncoder:
        return self._encoder

    def image_tokens(self, image: bytes) -> int:
        """Prompt tokens that an image costs, from its header alone; raises ``GuardError(media)``."""
        return picture_tokens(image, self._factor, self.facts)

    @torch.inference_mode()
    def generate_batch(
        self, prompts: Sequence[GuardPrompt], cancelled: Callable[[int], bool]
    ) -> list[Generation | GuardError]:
        """One outcome per prompt, in order; see ``BatchEngine``."""
        outcomes: list[Generation | GuardError | None] = [None] * len(prompts)
        rows: list[_Row] = []
        pixels: list[Any] = []
        for index, prompt in enumerate(prompts):
            try:
                row, images = self._prepare(index, prompt)
            except GuardError as error:
                outcomes[index] = error
            else:
                rows.append(row)
                pixels += images
        if rows:
            for row in self._decode(rows, pixels, cancelled):
                outcomes[row.index] = self._generation(row)
        gone = GuardError(GuardErrorKind.TIMEOUT, "nobody waits for this verdict any more")
        return [gone if outcome is None else outcome for outcome in outcomes]

    def _prepare(self, index: int, prompt: GuardPrompt) -> tuple[_Row, list[Any]]:
        images, counts = [], []
        for data in prompt.images:
            counts.append(self.image_tokens(data))
            images.append(self._processor(images=[decoded(data)], return_tensors="pt"))
        ids = expand_images(prompt.ids, counts, self._encoder.image_pad)
        if len(ids) > self.facts.max_input_tokens:
            raise GuardError(GuardErrorKind.TOO_LONG, f"a prompt of {len(ids)} tokens")
        row = _Row(index, prompt, ids, self._filling(prompt, ids))
        if row.filling is not None and not prompt.think:
            row.written = row.filling.run_on()
            row.given = len(row.written)
        return row, images

    def _filling(self, prompt: GuardPrompt, ids: list[int]) -> Filling | Brief | None:
        if self._form is None:
            return None if prompt.think else Brief(self._words, prompt.answered)
        if not prompt.think and not self._form.judges_without_reasoning:
            raise GuardError(
                GuardErrorKind.UNSUPPORTED, f"{self.facts.name} has no form without reasoning: use mode reason"
            )
        judged = ids[len(self._encoder.opening) : -len(self._encoder.closing)]
        return self._form.start(judged, answered=prompt.answered, think=prompt.think)

    def _decode(self, rows: list[_Row], pixels: list[Any], cancelled: Callable[[int], bool]) -> list[_Row]:
        """Runs rows to their ends; returns those that were not cancelled."""
        cache = DynamicCache(config=self._model.config.get_text_config())
        hidden, mask, position = self._prefill(rows, pixels, cache)
        alive, done = list(rows), []
        while True:
            logits = self._model.lm_head(hidden[:, -1])
            for row, scores in zip(alive, logits, strict=True):
                if not row.pending:
                    self._write(row, scores)
            keep = [n for n, row in enumerate(alive) if row.finish is None and not cancelled(row.index)]
            done += [row for row in alive if row.finish is not None]
            if not keep:
                return done
            if len(keep) < len(alive):
                alive = [alive[n] for n in keep]
                chosen = torch.tensor(keep, device=self._device)
                cache.batch_select_indices(chosen)
                position = position[chosen]
                mask = None if mask is None else mask[chosen]
            width = min(len(row.pending) for row in alive)
            if mask is not None:
                mask = torch.cat((mask, mask.new_ones(len(alive), width)), dim=1)
            positions = position.view(-1, 1) + torch.arange(width, device=self._device)
            hidden = self._model.model.language_model(
                input_ids=torch.tensor([row.pending[:width] for row in alive], device=self._device),
                attention_mask=mask,
                position_ids=positions.expand(3, -1, -1),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            position = position + width
            for row in alive:
                del row.pending[:width]

    def _prefill(
        self, rows: list[_Row], pixels: list[Any], cache: DynamicCache
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Fills the cache; returns hidden states, the mask of a padded batch (padding on the left), next positions."""
        reads = [row.ids + row.written for row in rows]
        longest = max(map(len, reads))
        pads = [longest - len(read) for read in reads]
        ids = torch.tensor(
            [[self._encoder.im_end] * pad + read for read, pad in zip(reads, pads, strict=True)], device=self._device
        )
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=self._device)
        kinds = (ids == self._encoder.image_pad).int()
        inputs: dict[str, Any] = {}
        if pixels:
            inputs["image_grid_thw"] = torch.cat([item["image_grid_thw"] for item in pixels]).to(self._device)
            values = torch.cat([item["pixel_values"] for item in pixels])
            inputs["pixel_values"] = values.to(self._device, self._model.dtype)
        positions, _ = self._model.model.get_rope_index(
            ids, mm_token_type_ids=kinds, image_grid_thw=inputs.get("image_grid_thw"), attention_mask=mask
        )
        padded = mask if any(pads) else None
        hidden = self._model.model(
            input_ids=ids,
            attention_mask=padded,
            position_ids=positions,
            past_key_values=cache,
            mm_token_type_ids=kinds,
            use_cache=True,
            **inputs,
        ).last_hidden_state
        return hidden, padded, positions.amax(dim=(0, 2)) + 1

    def _write(self, row: _Row, logits: torch.Tensor) -> None:
        """One more token of a row, and what follows it without a choice."""
        token = row.filling.choose(logits) if row.filling else int(logits.argmax())
        row.pending, row.decoded = [token], row.decoded + 1
        if row.prompt.think:
            self._advance(row, token, logits)
            return
        assert row.filling is not None
        row.pending += row.filling.run_on()
        row.written += row.pending
        row.scores = row.filling.scores
        if row.filling.complete:
            row.finish = "stop"

    def _advance(self, row: _Row, token: int, logits: torch.Tensor) -> None:
        if row.filling is not None:
            row.scores = row.filling.scores
        elif row.label is not None and row.label not in row.scores:
            margin = logits[self._harmful].float() - logits[self._unharmful].float()
            row.scores[row.label] = float(torch.sigmoid(margin))
        row.written.append(token)
        row.label = None
        if token in self._ends:
            row.finish = "stop"
            return
        # After the reasoning its last words are out of sight: they may quote the tag that ends the output.
        tail = self._tokenizer.decode(row.written[max(row.thought or 0, len(row.written) - _TAIL) :])
        if row.thought is None:
            if END_THINK in tail:
                row.thought = len(row.written)
        elif tail.endswith("Request:"):
            row.label = "request"
        elif tail.endswith("Response:"):
            row.label = "response"
        elif END_RESULT in tail:
            row.finish = "stop"
        if row.filling is not None and row.filling.complete:
            row.finish = "stop"
        if row.finish is None and len(row.written) >= row.prompt.max_new_tokens:
            row.finish = "length"

    def _generation(self, row: _Row) -> Generation:
        assert row.finish is not None
        return Generation(
            text=self._tokenizer.decode(row.written),
            prompt_tokens=len(row.ids) + row.given,
            completion_tokens=row.decoded,
            reasoning_tokens=row.decoded if row.thought is None and row.prompt.think else row.thought or 0,
            request_score=row.scores.get("request"),
            response_score=row.scores.get("response") if row.prompt.answered else None,
            finish=row.finish,
        )
