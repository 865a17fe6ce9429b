"""The guard on vLLM: its own asynchronous engine, in the worker's process.

A prompt goes in as token ids beside its pictures, so that no text becomes a control token. A verdict is at most three
requests to the engine, each of which finds what came before it in the prefix cache:

1. the reasoning, decoded freely up to and including the ``<result>`` that the model itself writes;
2. the request's label: the fixed words before it are read as prompt, and one token is decoded, *harmful* or
   *unharmful* and nothing else, with the probability of either;
3. the answer's label likewise, where there is an answer.

So whatever reaches ``<result>`` is parseable, fixed words cost no decoding step, and a reasoning that is cut off
(``max_new_tokens``), ends otherwise, or quotes a tag, is left as it is: an error for whoever reads it. vLLM's
``thinking_token_budget`` is not used, since it forces ``</think>`` and thereby a verdict upon a guard that has not
made up its mind, nor its structured outputs, since reasoning that quotes ``</think>`` would set off the grammar.
A prompt that is not to be thought about begins with an empty reasoning, at step 2. A guard with a form
(``worker.form``) fills it in within one request; see ``vllm_form``.

Refuses: engine arguments that the worker itself sets (``ConfigError``); more than ``MAX_IMAGES`` pictures or more
tokens than the model reads (``GuardError(too_long)``); control tokens that the model writes (``unparseable``).
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import functools
import hashlib
import importlib.metadata
import io
import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image
from tokenizers import Tokenizer

from guard_middleware.errors import ConfigError, GuardError, GuardErrorKind
from guard_middleware.guard.parse import END_RESULT, END_THINK, RESULT, THINK
from guard_middleware.guard.prompt import PromptEncoder
from guard_middleware.worker.engine import Generation, GuardPrompt
from guard_middleware.worker.form import Form
from guard_middleware.worker.pictures import picture_tokens
from guard_middleware.worker.weights import ModelFacts, Weights

# Before vLLM is imported. Its log lines go to the worker's own log, not to stdout, which is the supervisor's; and a
# process with threads and an event loop is not one to fork.
os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

from vllm import SamplingParams, TokensPrompt
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerBase

logger = logging.getLogger(__name__)

LEAST_VERSION = (0, 31)
#: pictures of one prompt; more is ``too_long`` (tests/worker/test_engine_vllm.py). A gateway passes 20 at most
MAX_IMAGES = 32
#: tokens within which a tag ends, whatever the tokenizer: every byte of it may be a token
_TAIL = len(END_THINK) + 4
#: arguments that the engine sets, and what an operator gives instead
_OWNED = {
    "model": "--model",
    "max_num_seqs": "--max-batch",
    "max_model_len": "max_input_tokens and max_new_tokens in guard.json",
    "tokenizer": "the model's folder",
    "skip_tokenizer_init": "nothing",
    "scheduling_policy": "nothing: it is by priority",
    "logits_processors": "form in guard.json",
    "logprobs_mode": "nothing",
    "limit_mm_per_prompt": "nothing",
    "mm_processor_kwargs": "min_pixels and max_pixels in guard.json",
    "reasoning_parser": "nothing",
    "reasoning_config": "nothing",
}
_REQUEST, _RESPONSE, _NO_RESPONSE = "Answers:\nRequest:", "\nResponse:", "\nResponse: None\n"
_REASONED = re.compile(rf"\s*{THINK}((?!</?think>|<result>).)*{END_THINK}\s*{RESULT}\s*", re.DOTALL)

Label = Literal["harmful", "unharmful"]


@dataclass(slots=True)
class _Writing:
    """One output in the making. ``cut`` when the budget ended it."""

    ids: list[int] = field(default_factory=list)
    reasoned: int | None = None  # tokens up to </think>
    scores: dict[str, float] = field(default_factory=dict)
    cut: bool = False
    prompt_tokens: int = 0
    queue_seconds: float = 0.0


class VllmEngine:
    """``Engine`` on vLLM; starts its processes at once, which takes half a minute or more. Call it off the loop.

    ``max_batch`` is how many requests run at once. ``args`` are any of vLLM's engine arguments, by field name
    (``tensor_parallel_size``, ``data_parallel_size``, ``gpu_memory_utilization``, ...); raises ``ConfigError``.
    """

    def __init__(self, weights: Weights, *, max_batch: int = 256, args: Mapping[str, Any] | None = None) -> None:
        _check_version()
        self._weights, self.max_batch = weights, max_batch
        self._tokenizer = Tokenizer.from_file(str(weights.folder / "tokenizer.json"))
        self._encoder = PromptEncoder(_FileTokenizer(self._tokenizer))
        added = self._tokenizer.get_added_tokens_decoder()
        self._control = frozenset(id for id, token in added.items() if token.special) - {self._encoder.im_end}
        config = json.loads((weights.folder / "config.json").read_text("utf-8"))
        vision = config["vision_config"]
        self._factor = vision["patch_size"] * vision["spatial_merge_size"]
        facts = weights.facts
        self._limit = min(
            facts.max_input_tokens + facts.max_new_tokens,
            config.get("text_config", config)["max_position_embeddings"],
        )
        self._labels: dict[Label, list[int]] = {
            "harmful": self._encoder.plain(" harmful"),
            "unharmful": self._encoder.plain(" unharmful"),
        }
        self._first = [ids[0] for ids in self._labels.values()]
        if self._first[0] == self._first[1]:
            raise ConfigError("the labels begin with the same token", path=str(weights.folder))
        self._verdict_tokens = len(self._words(f"{_REQUEST} unharmful{_RESPONSE} unharmful\n{END_RESULT}"))
        self._form = Form(facts.form, self._tokenizer) if facts.form else None
        self._stats: dict[int, _Stats] = {}
        self._llm = self._start(args or {})

    def _start(self, args: Mapping[str, Any]) -> AsyncLLM:
        facts = self._weights.facts
        known = {f.name for f in dataclasses.fields(AsyncEngineArgs)}
        for name in args:
            if name in _OWNED:
                raise ConfigError(
                    "the worker sets this one itself", path=f"--vllm-arg {name}", remedy=f"use {_OWNED[name]}"
                )
            if name not in known:
                near = difflib.get_close_matches(name, known, 3)
                raise ConfigError(
                    "vLLM has no such engine argument",
                    path=f"--vllm-arg {name}",
                    remedy=f"did you mean {' or '.join(near)}?" if near else "see vLLM's engine arguments",
                )
        ours: dict[str, Any] = {
            "model": str(self._weights.folder),
            "max_num_seqs": self.max_batch,
            "max_model_len": self._limit,
            "scheduling_policy": "priority",
            "limit_mm_per_prompt": {"image": MAX_IMAGES, "video": 0},
            "mm_processor_kwargs": {"min_pixels": facts.min_pixels, "max_pixels": facts.max_pixels},
        }
        defaults: dict[str, Any] = {
            "served_model_name": facts.name,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "dtype": "float32" if current_platform.is_cpu() else "bfloat16",
        }
        if self._form is not None:
            # The processor that fills forms is written for the first model runner.
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
            ours["logits_processors"] = ["guard_middleware.worker.vllm_form:FormProcessor"]
        try:
            return AsyncLLM.from_engine_args(
                AsyncEngineArgs(**{**defaults, **args, **ours}), stat_loggers=[self._stat_logger]
            )
        except Exception as error:
            raise ConfigError(f"vLLM cannot start: {error}", path=str(self._weights.folder)) from error

    @property
    def facts(self) -> ModelFacts:
        return self._weights.facts

    @property
    def encoder(self) -> PromptEncoder:
        return self._encoder

    @property
    def dead(self) -> bool:
        return bool(self._llm.errored)

    def image_tokens(self, image: bytes) -> int:
        """Prompt tokens that an image costs, from its header alone; raises ``GuardError(media)``."""
        return picture_tokens(image, self._factor, self.facts)

    def gauges(self) -> Mapping[str, float]:
        """vLLM's own figures, summed over its data-parallel ranks (hit rates: averaged)."""
        return _summed(list(self._stats.values()))

    async def close(self) -> None:
        """Ends vLLM's processes."""
        await asyncio.to_thread(self._llm.shutdown)

    async def generate(self, id: str, prompt: GuardPrompt, priority: int = 0) -> Generation:
        """See ``Engine``."""
        pictures = await self._pictures(prompt)
        if self._form is not None:
            writing = await self._fill(id, prompt, pictures, priority)
        else:
            writing = await self._write(id, prompt, pictures, priority)
        if not self._control.isdisjoint(writing.ids):
            raise GuardError(GuardErrorKind.UNPARSEABLE, "the guard wrote a control token")
        return Generation(
            text=self._tokenizer.decode(writing.ids),
            prompt_tokens=writing.prompt_tokens,
            completion_tokens=len(writing.ids),
            reasoning_tokens=len(writing.ids) if writing.reasoned is None else writing.reasoned,
            request_score=writing.scores.get("request"),
            response_score=writing.scores.get("response") if prompt.answered else None,
            finish="length" if writing.cut else "stop",
            queue_seconds=writing.queue_seconds,
        )

    # -- reasoning, then labels

    async def _write(self, id: str, prompt: GuardPrompt, pictures: _Pictures, priority: int) -> _Writing:
        ask = functools.partial(self._ask, prompt, pictures)
        writing = _Writing()
        if prompt.think:
            params = _greedy(
                max_tokens=max(1, prompt.max_new_tokens - self._verdict_tokens),
                stop=[RESULT],
                include_stop_str_in_output=True,
            )
            output = await ask(id, writing, params, 2 * priority)
            writing.reasoned = self._thought(writing.ids)
            writing.cut = output.finish_reason == "length"
            text = self._tokenizer.decode(writing.ids)
            if writing.cut or not _REASONED.fullmatch(text) or not self._control.isdisjoint(writing.ids):
                return writing
            writing.ids += self._words(_REQUEST if text.endswith("\n") else f"\n{_REQUEST}")
        else:
            writing.ids += self._words(f"{THINK}\n\n{END_THINK}")
            writing.reasoned = len(writing.ids)
            writing.ids += self._words(f"\n{RESULT}\n{_REQUEST}")
        # What has begun goes before anything of its class that has not: its place in the cache is warm.
        label = functools.partial(self._label, ask, writing, 2 * priority - 1)
        await label(f"{id}-request", "request")
        if prompt.answered:
            writing.ids += self._words(_RESPONSE)
            await label(f"{id}-response", "response")
            writing.ids += self._words(f"\n{END_RESULT}")
        else:
            writing.ids += self._words(f"{_NO_RESPONSE}{END_RESULT}")
        return writing

    async def _label(self, ask: Any, writing: _Writing, priority: int, id: str, name: str) -> None:
        params = _greedy(max_tokens=1, allowed_token_ids=self._first, logprob_token_ids=self._first, detokenize=False)
        output = await ask(id, writing, params, priority)
        found = output.logprobs[0]
        harmful, unharmful = (found[id].logprob for id in self._first)
        writing.scores[name] = 1 / (1 + math.exp(min(700.0, unharmful - harmful)))
        written: Label = "harmful" if writing.ids.pop() == self._first[0] else "unharmful"
        writing.ids += self._labels[written]

    def _words(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _thought(self, ids: Sequence[int]) -> int | None:
        """The number of tokens up to ``</think>``."""
        return next(
            (n for n in range(1, len(ids) + 1) if END_THINK in self._tokenizer.decode(ids[max(0, n - _TAIL) : n])), None
        )

    # -- a form

    async def _fill(self, id: str, prompt: GuardPrompt, pictures: _Pictures, priority: int) -> _Writing:
        assert self._form is not None
        writing = _Writing()
        filling = self._form.start((), answered=prompt.answered, think=prompt.think)
        deciding = sorted({id for slot in filling.slots if slot.decides for id in filling.open_to(slot)})
        params = _greedy(
            max_tokens=prompt.max_new_tokens + 1,  # the end of the output, which is no part of it
            logprob_token_ids=deciding,
            detokenize=False,
            extra_args={"guard_form": [prompt.answered, prompt.think]},
        )
        output = await self._ask(prompt, pictures, id, writing, params, 2 * priority)
        for token, found in zip(writing.ids, output.logprobs, strict=True):
            if filling.complete:
                break
            filling.take(token, {id: one.logprob for id, one in found.items()})
        if filling.complete and writing.ids[-1] == self._encoder.im_end:
            writing.ids.pop()
        writing.cut = not filling.complete or len(writing.ids) > prompt.max_new_tokens
        writing.scores, writing.reasoned = dict(filling.scores), self._thought(writing.ids)
        return writing

    # -- vLLM

    async def _ask(
        self,
        prompt: GuardPrompt,
        pictures: _Pictures,
        id: str,
        writing: _Writing,
        params: SamplingParams,
        priority: int,
    ) -> Any:
        """One request to vLLM after what is written so far, which it adds to; returns its ``CompletionOutput``."""
        ask = TokensPrompt(prompt_token_ids=[*prompt.ids, *writing.ids])
        if pictures.images:
            ask["multi_modal_data"] = {"image": list(pictures.images)}
            ask["multi_modal_uuids"] = {"image": list(pictures.names)}
        answer: RequestOutput | None = None
        try:
            (rendered,) = await self._llm.renderer.render_cmpl_async([ask])
            async with aclosing(self._llm.generate(rendered, params, id, priority=priority)) as outputs:
                async for output in outputs:
                    answer = output
        except EngineDeadError:
            raise GuardError(GuardErrorKind.UNAVAILABLE, "vLLM's engine has died") from None
        if answer is None or not answer.finished or answer.outputs[0].finish_reason not in ("stop", "length"):
            raise GuardError(GuardErrorKind.INTERNAL, "vLLM gave up the request")
        read = len(answer.prompt_token_ids or ()) - len(writing.ids)
        if read != len(prompt.ids) + pictures.extra_tokens:
            raise GuardError(GuardErrorKind.INTERNAL, "vLLM shows the guard other images than were planned")
        writing.prompt_tokens = read
        if answer.metrics is not None:
            writing.queue_seconds += max(0.0, answer.metrics.scheduled_ts - answer.metrics.queued_ts)
        writing.ids += answer.outputs[0].token_ids
        return answer.outputs[0]

    async def _pictures(self, prompt: GuardPrompt) -> _Pictures:
        counts = [self.image_tokens(image) for image in prompt.images]
        length = len(prompt.ids) + sum(counts) - len(counts)
        if len(counts) > MAX_IMAGES:
            raise GuardError(GuardErrorKind.TOO_LONG, f"{len(counts)} images where {MAX_IMAGES} may be read")
        if length > self.facts.max_input_tokens or length + self._verdict_tokens >= self._limit:
            raise GuardError(GuardErrorKind.TOO_LONG, f"a prompt of {length} tokens")
        if not counts:
            return _Pictures((), (), 0)
        images = await asyncio.to_thread(lambda: tuple(map(_decoded, prompt.images)))
        names = tuple(hashlib.sha256(image).hexdigest() for image in prompt.images)
        return _Pictures(images, names, sum(counts) - len(counts))

    def _stat_logger(self, config: Any, engine_index: int = 0) -> StatLoggerBase:
        self._stats[engine_index] = stats = _Stats(config, engine_index)
        return stats


@dataclass(frozen=True, slots=True)
class _FileTokenizer:
    backend_tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class _Pictures:
    """``names`` identify the images' bytes in vLLM's caches; ``extra_tokens`` is what they add to one pad each."""

    images: tuple[Image.Image, ...]
    names: tuple[str, ...]
    extra_tokens: int


class _Stats(StatLoggerBase):
    """Keeps vLLM's latest figures of one rank."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.now = {"running": 0.0, "waiting": 0.0, "kv_cache_usage": 0.0}
        self.total = {
            "preemptions": 0.0,
            "prefix_tokens": 0.0,
            "prefix_hit_tokens": 0.0,
            "images": 0.0,
            "image_hits": 0.0,
        }

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            self.now = {
                "running": scheduler_stats.num_running_reqs,
                "waiting": scheduler_stats.num_waiting_reqs,
                "kv_cache_usage": scheduler_stats.kv_cache_usage,
            }
            self.total["prefix_tokens"] += scheduler_stats.prefix_cache_stats.queries
            self.total["prefix_hit_tokens"] += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            self.total["preemptions"] += iteration_stats.num_preempted_reqs
        if mm_cache_stats is not None:
            self.total["images"] += mm_cache_stats.queries
            self.total["image_hits"] += mm_cache_stats.hits

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def _summed(ranks: Sequence[_Stats]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for rank in ranks:
        for name, value in (*rank.now.items(), *rank.total.items()):
            share = value / len(ranks) if name == "kv_cache_usage" else value
            figures[f"vllm_{name}"] = figures.get(f"vllm_{name}", 0.0) + share
    return figures


def _greedy(**options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, output_kind=RequestOutputKind.FINAL_ONLY, **options)


def _decoded(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise GuardError(GuardErrorKind.MEDIA, "an image that cannot be decoded") from error


def _check_version() -> None:
    found = importlib.metadata.version("vllm")
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise ConfigError(f"vLLM {found} is too old", path="--engine", remedy=f"pip install 'vllm>={least}'")
