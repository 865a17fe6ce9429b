"""Samples from a guard, as often as asked: on transformers, or on vLLM behind the same protocol.

Prompts are token ids with one image pad per image (the product's own encoding); pixels go beside them. Every row has
its own seed, so a run that was killed and goes on draws what it would have drawn. On transformers that holds to the
last bit as long as the batches are the same, since rows of a batch share their padding.

vLLM is imported when its sampler is made. It expands the image pads itself: expanded ids would be expanded twice,
without a word (trl#6294).
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from guard_training.tuning.contract import Contract, load_model


class SamplingError(ValueError):
    """An engine that cannot be had here; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """The paper's settings (section 4.1): four samples at temperature 1.0 and top-p 0.95."""

    k: int = 4
    temperature: float = 1.0
    top_p: float = 0.95
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.k < 1 or self.temperature <= 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise ValueError("needs k and tokens of 1 or more, a temperature above 0, and a top-p above 0 and up to 1")


@dataclass(frozen=True, slots=True)
class Prompt:
    """``ids`` hold one pad per picture. ``seed`` is this row's own (see ``row_seed``)."""

    ids: Sequence[int]
    pictures: tuple[Image.Image, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One output without control tokens. ``tokens`` counts the end of the turn, which ``ended`` says is there."""

    text: str
    tokens: int
    ended: bool


class Sampler(Protocol):
    """``k`` samples for each prompt, in order; all prompts at once."""

    def sample(self, prompts: Sequence[Prompt]) -> list[list[Sample]]: ...


def row_seed(seed: int, id: str) -> int:
    """A row's own seed (31 bits), by the digest of the run's seed and the row's id."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{id}".encode()).digest()[:4], "big") >> 1


class DrawnNucleus(LogitsProcessor):
    """Nucleus sampling that takes its chance from outside: leaves one token possible, so greedy search samples.

    ``draws`` [sequences, steps] are uniform in [0, 1); the generator is the caller's, one per row, where ``generate``
    has a single one for the whole batch.
    """

    def __init__(self, draws: Tensor, *, start: int, temperature: float, top_p: float) -> None:
        self._draws, self._start = draws, start
        self._temperature, self._top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        odds, order = (scores.float() / self._temperature).softmax(-1).sort(-1, descending=True)
        before = odds.cumsum(-1) - odds
        mass = (odds * (before < self._top_p)).cumsum(-1)
        point = self._draws[:, input_ids.shape[1] - self._start, None] * mass[:, -1:]
        # The point may round up to the whole mass: the last token of the nucleus is then the one.
        last = (before < self._top_p).sum(-1, keepdim=True) - 1
        place = torch.minimum(torch.searchsorted(mass, point, right=True), last)
        return torch.full_like(scores, -torch.inf).scatter(1, order.gather(1, place), 0.0)


class TransformersSampler:
    """Samples with ``generate``; CUDA in bf16 where there is one, else the CPU in fp32. Loads the model at once."""

    def __init__(self, contract: Contract, sampling: Sampling, *, device: str | None = None) -> None:
        self._contract, self._sampling = contract, sampling
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.float32 if self._device.type == "cpu" else torch.bfloat16
        self._model = load_model(contract.folder, dtype=dtype).to(self._device).eval()
        eos = self._model.generation_config.eos_token_id
        self._ends = sorted({contract.encoder.im_end, *(eos if isinstance(eos, list) else [eos] if eos else [])})
        # The published weights come with a repetition penalty, which would change what is sampled.
        self._model.generation_config = GenerationConfig(
            do_sample=False, use_cache=True, eos_token_id=self._ends, pad_token_id=contract.encoder.im_end
        )

    @torch.inference_mode()
    def sample(self, prompts: Sequence[Prompt]) -> list[list[Sample]]:
        k, steps = self._sampling.k, self._sampling.max_new_tokens
        inputs = self._inputs(prompts)
        start = inputs["input_ids"].shape[1]
        draws = torch.cat([torch.rand((k, steps), generator=_generator(prompt.seed)) for prompt in prompts])
        chooser = DrawnNucleus(
            draws.to(self._device), start=start, temperature=self._sampling.temperature, top_p=self._sampling.top_p
        )
        try:
            written = self._model.generate(**inputs, max_new_tokens=steps, logits_processor=[chooser])
        except torch.OutOfMemoryError:
            at_once = k * len(prompts)
            raise SamplingError(
                f"the GPU has no room for {at_once} samples of up to {start + steps} tokens: lower --batch"
            ) from None
        samples = [self._sample(ids) for ids in written[:, start:].tolist()]
        return [samples[n : n + k] for n in range(0, len(samples), k)]

    def _inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Left-padded, every prompt ``k`` times."""
        k, encoder = self._sampling.k, self._contract.encoder
        rows = [self._contract.expand(prompt.ids, prompt.pictures) for prompt in prompts]
        longest = max(map(len, rows))
        padded = [[encoder.im_end] * (longest - len(row)) + row for row in rows for _ in range(k)]
        masks = [[0] * (longest - len(row)) + [1] * len(row) for row in rows for _ in range(k)]
        ids = torch.tensor(padded)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.tensor(masks),
            "mm_token_type_ids": (ids == encoder.image_pad).int(),
        }
        pixels = [
            values
            for prompt in prompts
            if prompt.pictures
            for values in [self._contract.images(images=list(prompt.pictures), return_tensors="pt")] * k
        ]
        if pixels:
            inputs["pixel_values"] = torch.cat([values["pixel_values"] for values in pixels]).to(self._model.dtype)
            inputs["image_grid_thw"] = torch.cat([values["image_grid_thw"] for values in pixels])
        return {name: value.to(self._device) for name, value in inputs.items()}

    def _sample(self, ids: list[int]) -> Sample:
        end = next((n for n, id in enumerate(ids) if id in self._ends), None)
        kept = ids if end is None else ids[: end + 1]
        return Sample(self._contract.tokenizer.decode(kept, skip_special_tokens=True), len(kept), end is not None)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class VllmSampler:
    """Samples with vLLM's offline engine. ``options`` go to ``vllm.LLM`` (tensor_parallel_size, ...).

    Raises ``SamplingError`` where vLLM is not installed.
    """

    def __init__(self, contract: Contract, sampling: Sampling, **options: Any) -> None:
        try:
            vllm: Any = importlib.import_module("vllm")
        except ImportError:
            raise SamplingError(
                "vLLM is not installed: `pip install 'vllm>=0.32,<0.33'`, or use --engine transformers"
            ) from None
        self._vllm, self._sampling = vllm, sampling
        bounds = {"shortest_edge": contract.facts.min_pixels, "longest_edge": contract.facts.max_pixels}
        self._engine = vllm.LLM(
            **{
                "model": str(contract.folder),
                "max_model_len": contract.facts.max_input_tokens + sampling.max_new_tokens,
                "limit_mm_per_prompt": {"image": 4, "video": 0},
                "mm_processor_kwargs": {"size": bounds},
                **options,
            }
        )

    def sample(self, prompts: Sequence[Prompt]) -> list[list[Sample]]:
        sampling = self._sampling
        requests, settings = [], []
        for prompt in prompts:
            request: dict[str, Any] = {"prompt_token_ids": list(prompt.ids)}
            if prompt.pictures:
                request["multi_modal_data"] = {"image": list(prompt.pictures)}
            requests.append(request)
            settings.append(
                self._vllm.SamplingParams(
                    n=sampling.k,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_new_tokens,
                    # Neither of the model's own generation config: they would change what is sampled.
                    top_k=0,
                    repetition_penalty=1.0,
                    seed=prompt.seed,
                )
            )
        return [
            [Sample(one.text, len(one.token_ids), one.finish_reason == "stop") for one in answer.outputs]
            for answer in self._engine.generate(requests, settings, use_tqdm=False)
        ]
