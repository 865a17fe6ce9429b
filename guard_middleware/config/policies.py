"""Policies: what is done with requests and answers, by which guards they are judged, and how streams are held back.

Refuses keys that have no effect beside others, ranges of scores in the wrong order, and windows that cannot be cut.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from guard_middleware.config.section import Section
from guard_middleware.configtypes import Name, Seconds, refuse
from guard_middleware.types import Judging, Mode

BUILT_IN_POLICY = "default"


class Ensemble(Section):
    """Several guards that judge together (``guard_middleware.ensemble``); one alone picks that guard."""

    rule: Literal["any", "all", "first_confident"] = Field(
        description="any, all or first_confident: who of them has to find harm"
    )
    of: tuple[Name, ...] = Field(
        min_length=1, description="a list of names out of `guards`, and `worker`, such as [worker, large]"
    )
    confident: tuple[float, float] | None = Field(
        default=None, description="first_confident only: two scores from 0 to 1, the lower first, such as [0.1, 0.9]"
    )

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if len(set(self.of)) < len(self.of):
            raise refuse("a guard that is named twice", "name each once", "of")
        if (self.rule == "first_confident") != (self.confident is not None):
            if self.confident is None:
                raise refuse("first_confident trusts some scores: say which", "write confident: [0.1, 0.9]", "rule")
            raise refuse(f"`confident` has no effect beside rule: {self.rule}", "remove it", "confident")
        if self.confident is not None and not 0.0 <= self.confident[0] < self.confident[1] <= 1.0:
            raise refuse("no range of scores", "write [0.1, 0.9], the lower score first", "confident")
        return self


class SourcePolicy(Section):
    """What is done with one source (input or output)."""

    moderate: bool = Field(default=True, description="true; false leaves this source UNGUARDED: no verdict, no refusal")
    on_harmful: Literal["block", "annotate", "shadow"] = Field(default="block", description="block, annotate or shadow")
    on_error: Literal["block", "annotate_unscreened", "allow_unscreened"] = Field(
        default="block",
        description="block; or annotate_unscreened or allow_unscreened, which let through what nobody screened",
    )
    threshold: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="a number between 0 and 1, such as 0.5; to guard nothing write moderate: false",
    )
    deadline: Seconds = Field(
        default=10.0, description="a duration of more than 0 and at most 10m, such as 2s or 500ms"
    )
    show_reasoning: bool = Field(
        default=False, description="true or false: whether the client sees the guard's reasoning"
    )
    reader: bool | None = Field(
        default=None,
        description="true or false: whether text drawn in images is read; left out, the model's own default",
    )
    mode: Mode = Field(
        default="reason",
        description="reason (think, then judge), label (judge at once) or hybrid (think where think_between says)",
    )
    think_between: tuple[float, float] | None = Field(
        default=None, description="hybrid only: two scores from 0 to 1, the lower first, such as [0.1, 0.9]"
    )

    ensemble: Ensemble | None = Field(
        default=None, description="a mapping, such as {rule: any, of: [worker, large]}; left out, `worker` judges"
    )

    @property
    def judging(self) -> Judging:
        return Judging(self.mode, *(self.think_between or ()))

    @model_validator(mode="after")
    def _no_dead_keys(self) -> Self:
        for key in sorted(self.model_fields_set - {"moderate"}):
            if not self.moderate:
                raise refuse(f"`{key}` has no effect beside moderate: false", f"remove {key}, or moderate: false", key)
        if self.mode == "label" and self.show_reasoning:
            raise refuse("`show_reasoning` has no effect in mode label: there is none", "remove it", "show_reasoning")
        return self

    @model_validator(mode="after")
    def _confident_on_both_sides(self) -> Self:
        if self.ensemble is not None and self.ensemble.confident is not None:
            low, high = self.ensemble.confident
            if not low < self.threshold <= high:
                raise refuse(
                    f"confident scores that leave the threshold ({self.threshold:g}) on one side",
                    "write two scores with the threshold between them",
                    "ensemble",
                    "confident",
                )
        return self

    @model_validator(mode="after")
    def _thinks_somewhere(self) -> Self:
        if (self.mode == "hybrid") != (self.think_between is not None):
            if self.mode == "hybrid":
                raise refuse("hybrid thinks about some scores: say which", "write think_between: [0.1, 0.9]", "mode")
            raise refuse(f"`think_between` has no effect in mode {self.mode}", "remove it", "think_between")
        if self.think_between is not None and not 0.0 <= self.think_between[0] < self.think_between[1] <= 1.0:
            raise refuse("no range of scores", "write [0.1, 0.9], the lower score first", "think_between")
        return self


class StreamRules(Section):
    """How a streamed answer leaves while it is judged (``holdback``). Sizes are characters of one choice."""

    mode: Literal["hold", "window", "async"] = Field(
        default="hold",
        description="hold (nothing before the last verdict), window (what was judged) or async (at once, then cut)",
    )
    first_window: int = Field(default=240, ge=16, le=100_000, description="characters of the first window, from 16")
    last_window: int = Field(default=2000, ge=16, le=1_000_000, description="characters of the longest window, from 16")
    growth: float = Field(default=1.5, ge=1, le=4, description="how much longer each window is, a number from 1 to 4")
    overlap: int = Field(
        default=120, ge=0, le=10_000, description="characters that a window repeats; at most half of first_window"
    )
    leak_bound: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="async only: how many characters may be ahead of the guard, such as 1000",
    )
    keep_alive: Seconds = Field(
        default=15.0, description="a duration, such as 15s: silence after which a held stream shows a sign of life"
    )

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.overlap * 2 > self.first_window:
            raise refuse("the overlap is more than half of the first window", "lower overlap", "overlap")
        if self.last_window < self.first_window:
            raise refuse("the last window is shorter than the first", "raise last_window", "last_window")
        if (self.mode == "async") != (self.leak_bound is not None):
            if self.mode == "async":
                raise refuse("async shows text before its verdict: say how much", "write leak_bound: 1000", "mode")
            raise refuse(f"`leak_bound` has no effect in mode {self.mode}", "remove it", "leak_bound")
        return self


class OutputPolicy(SourcePolicy):
    deadline: Seconds = Field(
        default=20.0, description="a duration of more than 0 and at most 10m, such as 2s or 500ms"
    )
    stream: StreamRules = Field(default=StreamRules(), description="a mapping, such as {mode: window}")


class Policy(Section):
    """One named policy. The deadlines suit nano on a CPU; on a GPU 2s and 5s are enough."""

    input: SourcePolicy = Field(default=SourcePolicy(), description="a mapping, such as {on_harmful: block}")
    output: OutputPolicy = Field(default=OutputPolicy(), description="a mapping, such as {on_harmful: annotate}")
    race: bool = Field(
        default=False,
        description="true or false: whether the upstream is called before the input has its verdict",
    )
    block_style: Literal["error", "soft"] = Field(
        default="error",
        description="error (400, or finish_reason content_filter), or soft (200 with a refusal as the answer)",
    )
