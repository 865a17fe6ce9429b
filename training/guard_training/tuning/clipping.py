"""Dynamic clipping (paper, equation 7): the bound of the probability ratio shrinks as training goes on.

    B_s = eps * prod_{i=1..s} (S - i) / S,    s = 1 .. S rollouts

so the first rollout has eps * (S-1)/S and the last exactly 0. The paper counts rollouts; a trainer's ``global_step``
counts optimiser steps, hence the division. The bound is computed from the step, never carried along, so a resumed run
has the bound of one that was never stopped. (The released code changes the driver's copy of the config, which the
worker that computes the loss does not read.)

At a bound of 0 every ratio other than 1 is clipped on the favourable side, which makes all but the first update of a
rollout useless; ``floor`` keeps a little room. It is reached at about half of the run (S = 23, eps 0.2: B_13 = 0.001).
"""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

FLOOR = 1e-3


def bound(rollout: int, rollouts: int, *, epsilon: float = 0.2, floor: float = FLOOR) -> float:
    """B_s of rollout ``rollout`` (from 1) of ``rollouts``, at least ``floor``."""
    if not 1 <= rollout <= rollouts:
        raise ValueError(f"rollout {rollout} of {rollouts}")
    if rollout == rollouts:
        return floor
    # prod_{i=1..s} (S - i)/S = (S-1)! / ((S-1-s)! S^s)
    log = math.lgamma(rollouts) - math.lgamma(rollouts - rollout) - rollout * math.log(rollouts)
    return max(epsilon * math.exp(log), floor)


def rollout_of(global_step: int, updates_per_rollout: int) -> int:
    """The rollout (from 1) that the optimiser step after ``global_step`` steps belongs to."""
    return global_step // updates_per_rollout + 1


class DynamicClipping(TrainerCallback):
    """Sets ``trainer.epsilon_low`` and ``epsilon_high``, which the loss reads each time (``args.epsilon`` it does not).

    ``dynamic`` False keeps ``epsilon``: the ablation.
    """

    def __init__(self, trainer: Any, updates_per_rollout: int, *, epsilon: float, floor: float, dynamic: bool = True):
        self._trainer, self._updates = trainer, updates_per_rollout
        self._epsilon, self._floor, self._dynamic = epsilon, floor, dynamic

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        value = self._epsilon
        if self._dynamic:
            rollouts = math.ceil(state.max_steps / self._updates)
            rollout = rollout_of(state.global_step, self._updates)
            value = bound(rollout, rollouts, epsilon=self._epsilon, floor=self._floor)
        self._trainer.epsilon_low = self._trainer.epsilon_high = value
