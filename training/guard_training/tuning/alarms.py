"""Reward-hacking alarms: signs that the guard games its reward instead of judging, measured on every rollout.

| sign | measure | hacked when |
|---|---|---|
| template collapse | ``identical``: share of prompts that got the rollout's commonest reasoning; ``distinct``: distinct 3-grams of words over all | the first is high, the second falls below a share of the run's first rollout |
| format drift | ``format``: share of completions that the strict parser reads | low |
| length run-away | ``length``: mean tokens; ``truncated``: share cut off at the longest | grows to a multiple of the first rollout's; high |
| modality imbalance | ``gap``: accuracy on text rows less accuracy on image rows | its size grows over the first rollout's |
| rollout drift | ``drift``: mean difference of log-probabilities between sampler and trainer (vLLM only) | high: stale or misread images |

A measure that must be compared with the start is, because its natural value depends on the guard and on the size of a
rollout. An alarm that rings ``patience`` rollouts in a row stops the run at the end of the rollout, with a checkpoint.
"""  # noqa: E501

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback

from guard_training.tuning.settings import RecipeError

#: Log names: ``alarm/<measure>`` for what was measured, ``alarm/rung/<alarm>`` for rollouts in a row.
PREFIX, RUNG = "alarm/", "alarm/rung/"
_NGRAM = 3


class RewardHacked(ValueError):
    """An alarm rang too often; the message names the alarm, its figures, the checkpoint and the remedy."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Where the alarms ring. ``*_ratio`` and ``gap_growth`` are relative to the first rollout of the run."""

    patience: int = 3
    identical_max: float = 0.5
    distinct_ratio: float = 0.4
    format_min: float = 0.9
    length_ratio: float = 3.0
    truncated_max: float = 0.5
    gap_growth: float = 0.25
    drift_max: float = 0.05

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise RecipeError("patience must be at least 1")


@dataclass(frozen=True, slots=True)
class Sampled:
    """One completion of a rollout. ``reasoning`` is None where the format is broken, ``right`` is r_safety, 0 to 1."""

    prompt: str
    image: bool
    reasoning: str | None
    tokens: int
    truncated: bool
    right: float


def measure(samples: Sequence[Sampled]) -> dict[str, float]:
    """The measures of one rollout; one that has no meaning there (one prompt, one modality) is left out."""
    total = len(samples)
    values = {
        "format": sum(s.reasoning is not None for s in samples) / total,
        "length": sum(s.tokens for s in samples) / total,
        "truncated": sum(s.truncated for s in samples) / total,
    }
    prompts: dict[bytes, set[str]] = defaultdict(set)
    grams: Counter[tuple[str, ...]] = Counter()
    for sample in samples:
        if sample.reasoning is not None:
            words = sample.reasoning.split()
            prompts[hashlib.sha256(" ".join(words).encode()).digest()].add(sample.prompt)
            grams.update(zip(*(words[start:] for start in range(_NGRAM)), strict=False))
    distinct_prompts = len({sample.prompt for sample in samples})
    if prompts and distinct_prompts > 1:
        values["identical"] = max(map(len, prompts.values())) / distinct_prompts
    if grams:
        values["distinct"] = len(grams) / grams.total()
    text, image = ([s.right for s in samples if s.image == kind] for kind in (False, True))
    if text and image:
        values["gap"] = sum(text) / len(text) - sum(image) / len(image)
    return values


def ringing(values: Mapping[str, float], first: Mapping[str, float], limits: Limits) -> dict[str, str]:
    """The alarms that ring, each with its figures. ``first`` are the measures of the run's first rollout."""
    rung: dict[str, str] = {}

    def check(alarm: str, name: str, limit: float, above: bool) -> None:
        if name in values and (values[name] > limit if above else values[name] < limit):
            rung[alarm] = f"{name} {values[name]:.3g} {'above' if above else 'below'} {limit:.3g}"

    check("template_collapse", "identical", limits.identical_max, above=True)
    if "distinct" in first:
        check("template_collapse", "distinct", first["distinct"] * limits.distinct_ratio, above=False)
    check("format_drift", "format", limits.format_min, above=False)
    check("length_runaway", "length", first["length"] * limits.length_ratio, above=True)
    check("length_runaway", "truncated", limits.truncated_max, above=True)
    check("rollout_drift", "drift", limits.drift_max, above=True)
    if "gap" in values and "gap" in first and abs(values["gap"]) > abs(first["gap"]) + limits.gap_growth:
        rung["modality_imbalance"] = f"gap {values['gap']:.3g}, at first {first['gap']:.3g}"
    return rung


ALARMS = ("template_collapse", "format_drift", "length_runaway", "modality_imbalance", "rollout_drift")


@dataclass(slots=True)
class Watch:
    """What has been measured so far: the first rollout, and for how many rollouts in a row each alarm has rung."""

    limits: Limits
    first: dict[str, float] = field(default_factory=dict)
    rung: Counter[str] = field(default_factory=Counter)
    figures: dict[str, str] = field(default_factory=dict)

    def __call__(self, values: Mapping[str, float]) -> dict[str, float]:
        """Takes one rollout's measures; gives what is to be logged."""
        for name, value in values.items():
            self.first.setdefault(name, value)
        self.figures = ringing(values, self.first, self.limits)
        self.rung = Counter({alarm: self.rung[alarm] + 1 for alarm in self.figures})
        counts = {f"{RUNG}{alarm}": float(self.rung[alarm]) for alarm in ALARMS}
        return {**{f"{PREFIX}{name}": value for name, value in values.items()}, **counts}

    def restore(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Takes up a stopped run from its log history: what rang in it is judged anew, by the limits of now."""
        for entry in history:
            measured = {
                name.removeprefix(PREFIX): value
                for name, value in entry.items()
                if name.startswith(PREFIX) and not name.startswith(RUNG) and value is not None
            }
            if measured:
                self(measured)

    @property
    def over(self) -> str | None:
        """The alarm that has rung too often, with its figures."""
        for alarm, figures in self.figures.items():
            if self.rung[alarm] >= self.limits.patience:
                return f"{alarm} for {self.rung[alarm]} rollouts in a row: {figures}"
        return None


class StopWhenHacked(TrainerCallback):
    """Ends the run at the end of a rollout in which an alarm was over its patience, with a checkpoint.

    Stopping inside a rollout would leave a checkpoint from which the rollout could not be repeated. Raises
    ``RewardHacked`` where a run would go on from such a checkpoint with limits that still ring.
    """

    def __init__(self, watch: Watch, updates_per_rollout: int) -> None:
        self.watch, self._updates = watch, updates_per_rollout

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.restore(state.log_history)
        self.raise_if_over(f"{args.output_dir}/checkpoint-{state.global_step}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.watch.over and state.global_step % self._updates == 0:
            control.should_save = control.should_training_stop = True

    def raise_if_over(self, checkpoint: str) -> None:
        """Raises ``RewardHacked`` if the run was stopped by an alarm."""
        if self.watch.over:
            raise RewardHacked(
                f"stopped by an alarm: {self.watch.over}. The checkpoint is {checkpoint}; read the completions log, "
                "then lower the learning rate or change the reward, or raise the limit in the recipe's `alarms`, and "
                "give the same command to go on"
            )
