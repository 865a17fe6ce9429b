"""What the worker needs of a model, whatever runs it: the values that go in and come out, and the protocol.

A prompt is token ids, never text, so that an engine cannot make control tokens out of what a user wrote. Two kinds
of engine fit behind it. One that batches by itself (vLLM) implements ``Engine``. One that runs a batch at a time on
one thread (transformers) implements ``BatchEngine``. ``continuous.runner`` knows how each is fed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from guard_middleware.errors import GuardError
from guard_middleware.guard.prompt import PromptEncoder
from guard_middleware.worker.weights import ModelFacts


@dataclass(frozen=True, slots=True)
class GuardPrompt:
    """One prompt: ids with one ``<|image_pad|>`` per image, and each image's canonical bytes in the order of the pads.

    ``max_new_tokens`` is the whole budget of the output, reasoning included. ``think`` false asks for the verdict
    alone: the labels after an empty reasoning, for which an engine decodes no more than the labels.
    """

    ids: tuple[int, ...]
    images: tuple[bytes, ...]
    answered: bool
    max_new_tokens: int
    think: bool = True


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model wrote, control tokens removed.

    ``prompt_tokens`` counts image tokens; ``reasoning_tokens`` is the share of ``completion_tokens`` up to and
    including ``</think>``. A score is the probability of *harmful* against *unharmful* where that label was written,
    None where it was not. ``finish`` is ``length`` when the budget ended first. ``queue_seconds`` is the wait inside an
    engine that has a queue of its own.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    request_score: float | None
    response_score: float | None
    finish: Literal["stop", "length"]
    queue_seconds: float = 0.0


class Model(Protocol):
    """What the planner and the app read of any engine."""

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def encoder(self) -> PromptEncoder: ...

    def image_tokens(self, image: bytes) -> int:
        """Prompt tokens that an image costs, from its size alone; raises ``GuardError(media)``."""
        ...


class Engine(Model, Protocol):
    """Continuous: many ``generate`` calls at once, each of which may be cancelled as an asyncio task."""

    @property
    def dead(self) -> bool:
        """Nothing will ever come of it again; the process should end."""
        ...

    def gauges(self) -> Mapping[str, float]:
        """Its own figures as of now, by name."""
        ...

    async def generate(self, id: str, prompt: GuardPrompt, priority: int = 0) -> Generation:
        """Raises ``GuardError``. A lower ``priority`` goes first. A cancelled task frees the prompt's place at once."""
        ...

    async def close(self) -> None: ...


@runtime_checkable
class BatchEngine(Model, Protocol):
    """One batch at a time, blocking; called from one thread. It has nothing to end: its memory goes with it."""

    @property
    def max_batch(self) -> int:
        """Prompts that one batch should hold at most."""
        ...

    def generate_batch(
        self, prompts: Sequence[GuardPrompt], cancelled: Callable[[int], bool]
    ) -> list[Generation | GuardError]:
        """One outcome per prompt, in order. ``cancelled(row)`` is asked at every token; a cancelled row ends early."""
        ...
