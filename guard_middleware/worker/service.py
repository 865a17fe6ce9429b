"""From a question to a verdict: read drawn text, plan the prompts, have them run and read (``cascade``), merge them.

What blocks runs on threads: reading on two of its own (``reading``), planning (tokenising, image headers) on a small
pool, the engine on the runner's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.guard.prompt import render
from guard_middleware.types import Conversation, Message, Source, Text, Verdict
from guard_middleware.wire import ModerationRequest
from guard_middleware.worker.batching import BatchLimits, Ran
from guard_middleware.worker.calibration import Calibration
from guard_middleware.worker.cascade import Planned, cascade
from guard_middleware.worker.continuous import runner
from guard_middleware.worker.engine import BatchEngine, Engine, Generation
from guard_middleware.worker.metrics import Metrics
from guard_middleware.worker.reading import DrawnText, Reader
from guard_middleware.worker.windows import check_characters, merge, plan

logger = logging.getLogger(__name__)

_WARM_UP_SECONDS = 300.0
#: A user waits for the check of an input before anything happens at all; windows of an output come while they read.
_PRIORITY: Mapping[Source, int] = {"input": 0, "output": 1}


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """``reader_seconds`` bounds the reading of one image, ``reads`` how many may wait (``reading.DrawnText``)."""

    batching: BatchLimits = field(default_factory=BatchLimits)
    reader_seconds: float = 5.0
    reads: int = 64


class GuardService:
    """``app.Guard`` on an engine of either kind; make it on the loop that uses it.

    ``reader`` and ``read_by_default`` are ``reading.DrawnText``'s; ``serving`` is ``weights.serving``'s.
    """

    def __init__(
        self,
        engine: BatchEngine | Engine,
        metrics: Metrics,
        *,
        reader: Reader | None = None,
        read_by_default: bool = False,
        calibration: Calibration | None = None,
        serving: str = "",
        limits: ServiceLimits | None = None,
    ) -> None:
        self._limits = limits or ServiceLimits()
        seconds, reads = self._limits.reader_seconds, self._limits.reads
        self._drawn = DrawnText(reader, by_default=read_by_default, seconds=seconds, most=reads)
        self._engine, self._calibration, self._serving = engine, calibration or Calibration(), serving
        self._runner = runner(engine, self._limits.batching, metrics)
        self._plan_pool = ThreadPoolExecutor(2, thread_name_prefix="guard-plan")

    @property
    def model(self) -> str:
        return self._engine.facts.name

    @property
    def revision(self) -> str:
        judges = self._calibration.revision(self._engine.facts.revision)
        return f"{judges}+{self._serving}" if self._serving else judges

    async def moderate(self, request: ModerationRequest, deadline: float) -> Verdict:
        """See ``app.Guard``."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        conversation = request.conversation
        self._runner.admit(1, 0)  # before the work of reading and planning, which would be for nothing
        drawn = await self._drawn.read(conversation.blobs(), request.reader, deadline)
        read = loop.time()
        prompts = await loop.run_in_executor(self._plan_pool, self._plan, conversation, drawn)
        planned = loop.time()

        def run(prompts: Sequence[Planned]) -> Awaitable[list[Ran[Generation]]]:
            return self._runner.submit(prompts, deadline, _PRIORITY[request.source])

        judged = await cascade(prompts, request.judging, run, self._calibration)
        judgement = merge(judged.outcomes, answered=conversation.answer is not None)
        return Verdict(
            request=judgement.request,
            response=judgement.response,
            request_score=judgement.request_score,
            response_score=judgement.response_score,
            reasoning=judgement.reasoning,
            usage=judgement.usage,
            model=self.model,
            revision=self.revision,
            drawn_text=drawn,
            timings=(
                ("reader", read - started),
                ("plan", planned - read),
                ("queue", judged.queue_seconds),
                ("generate", judged.run_seconds),
            ),
            judging=request.judging,
            thought=judged.thought,
        )

    async def warm_up(self) -> None:
        """One real verdict; raises ``GuardError`` unless the engine produced an output, readable or not."""
        question = Conversation((Message("user", (Text("Hello, how are you?"),)),))
        request = ModerationRequest("warm-up", question, "input", _WARM_UP_SECONDS)
        try:
            await self.moderate(request, asyncio.get_running_loop().time() + _WARM_UP_SECONDS)
        except GuardError as error:
            if error.kind not in (GuardErrorKind.UNPARSEABLE, GuardErrorKind.TRUNCATED):
                raise
            logger.warning("the warm-up gave no verdict: %s", error)

    def gauges(self) -> Mapping[str, float]:
        return {
            "queue_depth": self._runner.queued,
            "queue_tokens": self._runner.queued_tokens,
            "running": self._runner.running,
            "reading": self._drawn.reading,
            **({} if isinstance(self._engine, BatchEngine) else self._engine.gauges()),
        }

    def stalled(self) -> float:
        return self._runner.stalled(asyncio.get_running_loop().time())

    async def aclose(self) -> None:
        await self._runner.aclose()
        if not isinstance(self._engine, BatchEngine):
            await self._engine.close()
        self._drawn.close()
        self._plan_pool.shutdown(wait=False, cancel_futures=True)

    def _plan(self, conversation: Conversation, drawn: tuple[str, ...]) -> list[Planned]:
        check_characters(conversation, self._engine)
        images = [blob.data for blob in conversation.blobs()]
        prompts = plan(render(conversation, drawn), images, self._engine)
        return [(prompt, len(prompt.ids) + sum(map(self._engine.image_tokens, prompt.images))) for prompt in prompts]
