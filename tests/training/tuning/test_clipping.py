from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from guard_training.tuning.clipping import FLOOR, DynamicClipping, bound, rollout_of


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [(1, 0.191), (2, 0.175), (3, 0.152), (4, 0.126), (5, 0.098), (6, 0.073), (7, 0.051), (10, 0.011), (23, 0.0)],
)
def test_the_bound_of_the_papers_run(rollout: int, expected: float) -> None:
    assert bound(rollout, 23, floor=0.0) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("rollouts", [1, 2, 7, 23, 400])
def test_the_closed_form_is_the_product(rollouts: int) -> None:
    product = 0.2
    for rollout in range(1, rollouts + 1):
        product *= (rollouts - rollout) / rollouts
        assert bound(rollout, rollouts, floor=0.0) == pytest.approx(product, rel=1e-9, abs=1e-300)
        assert bound(rollout, rollouts) == max(bound(rollout, rollouts, floor=0.0), FLOOR)


def test_a_long_run_does_not_overflow() -> None:
    assert bound(1, 10**6) == pytest.approx(0.2, rel=1e-5)
    assert bound(10**6 - 1, 10**6, floor=0.0) == 0.0


@pytest.mark.parametrize("rollout", [0, 6])
def test_a_rollout_outside_the_run_is_refused(rollout: int) -> None:
    with pytest.raises(ValueError, match="of 5"):
        bound(rollout, 5)


@pytest.mark.parametrize(("step", "updates", "rollout"), [(0, 2, 1), (1, 2, 1), (2, 2, 2), (45, 2, 23), (3, 1, 4)])
def test_optimiser_steps_belong_to_rollouts(step: int, updates: int, rollout: int) -> None:
    assert rollout_of(step, updates) == rollout


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_callback_sets_what_the_loss_reads_from_the_step_alone(dynamic: bool) -> None:
    trainer: Any = SimpleNamespace()
    callback = DynamicClipping(trainer, 2, epsilon=0.2, floor=0.0, dynamic=dynamic)
    for step in (9, 0, 3):
        callback.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=10), None)
        expected = 0.2 * math.prod((5 - i) / 5 for i in range(1, step // 2 + 2)) if dynamic else 0.2
        assert trainer.epsilon_low == trainer.epsilon_high == pytest.approx(expected)
