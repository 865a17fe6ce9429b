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
A prompt that is not to be thought about begins with an empty reasoning, at step 2, and there the model may also
prefer another token to both labels, which is left to the parser (``worker.brief``). A guard with a form
(``worker.form``) fills it in within one request (``vllm_form``).

Refuses: engine arguments that the worker itself sets (``ConfigError``, by ``vllm_options``); more than ``MAX_IMAGES``
pictures or more tokens than the model reads (``GuardError(too_long)``); control tokens that the model writes
(``unparseable``).
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from PIL import Image

from guard_middleware.errors import ConfigError, GuardError, GuardErrorKind
from guard_middleware.guard.parse import END_RESULT, END_THINK, RESULT, THINK
from guard_middleware.guard.prompt import PromptEncoder
from guard_middleware.worker.brief import Brief, Words
from guard_middleware.worker.engine import Generation, GuardPrompt
from guard_middleware.worker.form import Filling, Form
from guard_middleware.worker.pictures import picture_tokens
from guard_middleware.worker.tokens import read_tokenizer
from guard_middleware.worker.vllm_options import MAX_IMAGES, check_stated, engine_arguments
from guard_middleware.worker.weights import ModelFacts, Weights

# Before vLLM is imported. Its log lines go to the worker's own log, not to stdout, which is the supervisor's; and a
# process with threads and an event loop is not one to fork.
os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

import vllm
from vllm import SamplingParams, TokensPrompt
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from guard_middleware.worker.vllm_pictures import Pictures
from guard_middleware.worker.vllm_stats import Stats, summed

LEAST_VERSION = (0, 32)
#: tokens within which a tag ends, whatever the tokenizer: every byte of it may be a token
_TAIL = len(END_THINK) + 4
#: the extra argument of a request that fills in a form: [answered]
FORM = "guard_form"
_REQUEST = "Answers:\nRequest:"
_REASONED = re.compile(rf"\s*{THINK}((?!</?think>|<result>).)*{END_THINK}\s*{RESULT}\s*", re.DOTALL)


@dataclass(slots=True)
class _Writing:
    """One output in the making.

    ``ids`` is all of it, of which ``given`` were there before anything was asked and ``decoded`` are the model's;
    ``thought`` is the number of tokens up to ``</think>``; ``cut`` when the budget ended it.
    """

    ids: list[int] = field(default_factory=list)
    given: int = 0
    decoded: int = 0
    asked: int = 0
    thought: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    cut: bool = False
    queue_seconds: float = 0.0


#: asks vLLM to go on with what is written
_Ask: TypeAlias = Callable[[_Writing, Any], Awaitable[Any]]


class VllmEngine:
    """``Engine`` on vLLM; starts its processes at once, which takes half a minute or more. Make it off the loop.

    ``max_batch`` is how many requests run at once on each rank. ``args`` are any of vLLM's engine arguments, by field
    name (``tensor_parallel_size``, ``data_parallel_size``, ``gpu_memory_utilization``, ...); raises ``ConfigError``.
    """

    def __init__(self, weights: Weights, *, max_batch: int = 256, args: Mapping[str, Any] | None = None) -> None:
        _check_version()
        self._weights, self.max_batch = weights, max_batch
        self._tokenizer, self._encoder = read_tokenizer(weights.folder)
        added = self._tokenizer.get_added_tokens_decoder()
        self._control = frozenset(id for id, token in added.items() if token.special) - {self._encoder.im_end}
        config = json.loads((weights.folder / "config.json").read_text("utf-8"))
        vision = config["vision_config"]
        self._factor = vision["patch_size"] * vision["spatial_merge_size"]
        facts = weights.facts
        self._decoding = Pictures(self._factor, facts)
        self._limit = min(
            facts.max_input_tokens + facts.max_new_tokens,
            config.get("text_config", config)["max_position_embeddings"],
        )
        self._words = Words(self._tokenizer)
        self._first = [ids[0] for ids in self._words.labels]
        if self._first[0] == self._first[1]:
            raise ConfigError("the labels begin with the same token", path=str(weights.folder))
        self._verdict_tokens = len(self._encode(f"{_REQUEST} unharmful\nResponse: unharmful\n{END_RESULT}"))
        self._form = Form(facts.form, self._tokenizer) if facts.form else None
        self._stats: dict[int, Stats] = {}
        self._llm = self._start(args or {})

    def _start(self, args: Mapping[str, Any]) -> AsyncLLM:
        check_stated(args, {f.name for f in dataclasses.fields(AsyncEngineArgs)})
        processors = self._processors()
        arguments = engine_arguments(
            self._weights,
            args,
            max_batch=self.max_batch,
            limit=self._limit,
            dtype="float32" if current_platform.is_cpu() else "bfloat16",
            processors=processors,
        )
        os.environ["GUARD_MIDDLEWARE_WORKER_PID"] = str(os.getpid())
        if processors:
            # They are written for the first model runner.
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        try:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[self._stat_logger])
        except Exception as error:
            raise ConfigError(f"vLLM cannot start: {error}", path=str(self._weights.folder)) from error

    def _processors(self) -> list[str]:
        """vLLM's names of the logits processors that the model needs."""
        return [] if self._form is None else ["guard_middleware.worker.vllm_form:FormProcessor"]

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
        """vLLM's own figures, summed over its data-parallel ranks (shares: averaged)."""
        return summed(list(self._stats.values()))

    async def close(self) -> None:
        """Ends vLLM's processes."""
        self._decoding.close()
        await asyncio.to_thread(self._llm.shutdown)

    async def generate(self, id: str, prompt: GuardPrompt, priority: int = 0) -> Generation:
        """See ``Engine``."""
        pictures = await self._pictures(prompt)
        ask = functools.partial(self._ask, id, prompt, pictures, priority)
        if self._form is not None and prompt.think:
            writing = await self._fill(prompt, ask)
        else:
            writing = await self._write(prompt, self._limit - len(prompt.ids) - pictures.extra_tokens, ask)
        if not self._control.isdisjoint(writing.ids):
            raise GuardError(GuardErrorKind.UNPARSEABLE, "the guard wrote a control token")
        thought = writing.thought if writing.thought is not None or not prompt.think else writing.decoded
        return Generation(
            text=self._tokenizer.decode(writing.ids),
            prompt_tokens=len(prompt.ids) + pictures.extra_tokens + writing.given,
            completion_tokens=writing.decoded,
            reasoning_tokens=min(thought or 0, writing.decoded),
            request_score=writing.scores.get("request"),
            response_score=writing.scores.get("response") if prompt.answered else None,
            finish="length" if writing.cut else "stop",
            queue_seconds=writing.queue_seconds,
        )

    async def _write(self, prompt: GuardPrompt, room: int, ask: _Ask) -> _Writing:
        """Reasoning, where it is wanted, in ``room`` tokens with the labels; then the labels."""
        filling: Filling | Brief
        if self._form is not None:
            if not self._form.judges_without_reasoning:
                why = f"{self.facts.name} has no form without reasoning: use mode reason"
                raise GuardError(GuardErrorKind.UNSUPPORTED, why)
            filling = self._form.start((), answered=prompt.answered, think=False)
        else:
            filling = Brief(self._words, prompt.answered)
        fixed = filling.run_on()
        writing = _Writing()
        if not prompt.think:
            writing.ids, writing.given = fixed, len(fixed)
        elif not await self._reason(min(room, prompt.max_new_tokens) - self._verdict_tokens, ask, writing):
            return writing
        while not filling.complete:
            await self._decide(prompt, ask, writing, filling)
            writing.ids += filling.run_on()
        writing.scores = filling.scores
        return writing

    async def _reason(self, budget: int, ask: _Ask, writing: _Writing) -> bool:
        """Up to the request's label; whether the output has come so far in its proper form."""
        params = _greedy(max_tokens=max(1, budget), stop=[RESULT], include_stop_str_in_output=True)
        output = await ask(writing, params)
        writing.thought = self._thought(writing.ids)
        writing.cut = output.finish_reason == "length"
        text = self._tokenizer.decode(writing.ids)
        if writing.cut or not _REASONED.fullmatch(text) or not self._control.isdisjoint(writing.ids):
            return False
        writing.ids += self._encode(_REQUEST if text.endswith("\n") else f"\n{_REQUEST}")
        return True

    async def _decide(self, prompt: GuardPrompt, ask: _Ask, writing: _Writing, filling: Filling | Brief) -> None:
        """One token of which the choice is the guard's. Without reasoning it may refuse to label at all."""
        open_ids = list(filling.open() if isinstance(filling, Filling) else self._first)
        allowed = open_ids if prompt.think or isinstance(filling, Filling) else None
        output = await ask(
            writing, _greedy(max_tokens=1, allowed_token_ids=allowed, logprob_token_ids=open_ids, detokenize=False)
        )
        filling.take(writing.ids[-1], {id: one.logprob for id, one in output.logprobs[0].items()})

    async def _fill(self, prompt: GuardPrompt, ask: _Ask) -> _Writing:
        """A form with reasoning, in one request, which ends with the last choice: what follows it is known."""
        assert self._form is not None
        writing, filling = _Writing(), self._form.start((), answered=prompt.answered)
        ends = filling.last_choices()
        if not ends.isdisjoint(prompt.ids):  # a quote may hold one
            ends = frozenset()
        deciding = sorted({id for slot in filling.slots if slot.decides for id in filling.open_to(slot)})
        params = _greedy(
            max_tokens=prompt.max_new_tokens + 1,  # the end of the output, which is no part of it
            stop_token_ids=sorted(ends),
            logprob_token_ids=deciding,
            detokenize=False,
            extra_args={FORM: [prompt.answered]},
        )
        output = await ask(writing, params)
        for token, found in zip(writing.ids, output.logprobs, strict=True):
            if filling.complete:
                break
            filling.take(token, {id: one.logprob for id, one in found.items()})
        if writing.ids[-1] == self._encoder.im_end:
            writing.ids.pop()
            writing.decoded -= 1
        if writing.ids[-1] in ends:
            writing.ids += filling.run_on()
        writing.cut = not filling.complete or writing.decoded > prompt.max_new_tokens
        writing.scores, writing.thought = filling.scores, self._thought(writing.ids)
        return writing

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _thought(self, ids: Sequence[int]) -> int | None:
        """The number of tokens up to ``</think>``. It stands near the end, and one look costs microseconds."""
        thought = None
        if END_THINK in self._tokenizer.decode(ids):
            for length in range(len(ids), 0, -1):
                if END_THINK in self._tokenizer.decode(ids[max(0, length - _TAIL) : length]):
                    thought = length
                elif thought is not None:
                    break
        return thought

    # -- vLLM

    async def _ask(
        self,
        id: str,
        prompt: GuardPrompt,
        pictures: _Pictures,
        priority: int,
        writing: _Writing,
        params: SamplingParams,
    ) -> CompletionOutput:
        """One request to vLLM after what is written so far, to which it adds."""
        tokens = TokensPrompt(prompt_token_ids=[*prompt.ids, *writing.ids])
        if pictures.images:
            tokens["multi_modal_data"] = {"image": list(pictures.images)}
            tokens["multi_modal_uuids"] = {"image": list(pictures.names)}
        # What has begun goes before anything of its class that has not: its place in the cache is warm.
        priority = 2 * priority - (writing.asked > 0)
        answer: RequestOutput | None = None
        try:
            (rendered,) = await self._llm.renderer.render_cmpl_async([tokens])
            async with aclosing(
                self._llm.generate(rendered, params, f"{id}-{writing.asked}", priority=priority)
            ) as outputs:
                async for output in outputs:
                    answer = output
        except EngineDeadError:
            raise GuardError(GuardErrorKind.UNAVAILABLE, "vLLM's engine has died") from None
        if answer is None or answer.outputs[0].finish_reason not in ("stop", "length"):
            raise GuardError(GuardErrorKind.INTERNAL, "vLLM gave up the request")
        if len(answer.prompt_token_ids or ()) != len(prompt.ids) + pictures.extra_tokens + len(writing.ids):
            raise GuardError(GuardErrorKind.INTERNAL, "vLLM shows the guard other images than were planned")
        if answer.metrics is not None:
            writing.queue_seconds += max(0.0, answer.metrics.scheduled_ts - answer.metrics.queued_ts)
        written = answer.outputs[0].token_ids
        writing.ids, writing.decoded = [*writing.ids, *written], writing.decoded + len(written)
        writing.asked += 1
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
        images, names = await self._decoding.shown(prompt.images)
        return _Pictures(images, names, sum(counts) - len(counts))

    def _stat_logger(self, config: Any, engine_index: int = 0) -> Stats:
        self._stats[engine_index] = stats = Stats(config, engine_index)
        return stats


@dataclass(frozen=True, slots=True)
class _Pictures:
    """``names`` identify the images' bytes in vLLM's caches; ``extra_tokens`` is what they add to one pad each."""

    images: tuple[Image.Image, ...]
    names: tuple[str, ...]
    extra_tokens: int


def _greedy(**options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, output_kind=RequestOutputKind.FINAL_ONLY, **options)


def _check_version() -> None:
    if tuple(map(int, re.findall(r"\d+", vllm.__version__)[:2])) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise ConfigError(f"vLLM {vllm.__version__} is too old", path="--engine", remedy=f"pip install 'vllm>={least}'")
