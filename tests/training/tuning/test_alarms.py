from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from guard_training.tuning.alarms import Limits, RewardHacked, Sampled, StopWhenHacked, Watch, measure, ringing

WORDS = "the bread rises slowly in a warm kitchen while rain falls on quiet streets tonight".split()


def _healthy() -> list[Sampled]:
    """Eight prompts of two completions, half with images, all of them different and half right."""
    return [
        Sampled(
            prompt=str(n // 2),
            image=n % 4 < 2,
            reasoning=" ".join(random.Random(n).sample(WORDS, 10)),
            tokens=20 + n % 3,
            truncated=False,
            right=float(n % 2),
        )
        for n in range(16)
    ]


def _changed(**values: Any) -> list[Sampled]:
    return [replace(sample, **values) for sample in _healthy()]


def _imbalanced() -> list[Sampled]:
    return [replace(sample, right=float(not sample.image)) for sample in _healthy()]


def test_the_measures_of_a_rollout() -> None:
    values = measure(_healthy())
    assert values["format"] == 1
    assert values["truncated"] == 0
    assert values["length"] == pytest.approx(20.94, abs=0.01)
    assert values["identical"] == 1 / 8
    assert values["gap"] == 0
    assert 0.8 < values["distinct"] <= 1
    assert measure(_imbalanced())["gap"] == 1.0


@pytest.mark.parametrize(
    "samples",
    [
        [Sampled("a", False, None, 0, True, 0.0)],
        [replace(_healthy()[0], prompt="a"), replace(_healthy()[1], prompt="a")],
    ],
)
def test_what_has_no_meaning_in_a_rollout_is_not_measured(samples: list[Sampled]) -> None:
    assert not {"identical", "gap"} & measure(samples).keys()


@pytest.mark.parametrize(
    ("samples", "alarm"),
    [
        (_healthy(), None),
        (_changed(reasoning="it is a request that does no harm"), "template_collapse"),
        (
            [replace(s, reasoning=f"it is it is it is it is it is it is {n}") for n, s in enumerate(_healthy())],
            "template_collapse",
        ),
        (_changed(reasoning=None), "format_drift"),
        (_changed(tokens=400), "length_runaway"),
        (_changed(truncated=True), "length_runaway"),
        (_imbalanced(), "modality_imbalance"),
    ],
)
def test_each_sign_rings_its_alarm(samples: list[Sampled], alarm: str | None) -> None:
    rung = ringing(measure(samples), measure(_healthy()), Limits())
    assert rung.keys() == ({alarm} if alarm else set())


def test_a_sampler_that_drifts_from_the_trainer_rings() -> None:
    first = measure(_healthy())
    assert ringing({**first, "drift": 0.4}, first, Limits()).keys() == {"rollout_drift"}
    assert not ringing({**first, "drift": 0.001}, first, Limits())


def test_only_rollouts_in_a_row_count() -> None:
    watch, good, bad = Watch(Limits(patience=2)), measure(_healthy()), measure(_changed(reasoning=None))
    over = []
    for values in (good, bad, good, bad, bad):
        logged = watch(values)
        over.append(watch.over is not None)
    assert over == [False, False, False, False, True]
    assert logged["alarm/rung/format_drift"] == 2
    assert logged["alarm/format"] == 0
    assert "format 0 below 0.9" in (watch.over or "")


def test_a_resumed_run_goes_on_counting_and_comparing() -> None:
    limits, bad = Limits(patience=2), measure(_changed(tokens=100))
    first = Watch(limits)
    history = [first(measure(_healthy())), {"loss": 0.1}, first(bad)]
    second = Watch(limits)
    second.restore(history)
    second(bad)
    assert second.first["length"] == first.first["length"]
    assert "length_runaway for 2 rollouts" in (second.over or "")


@pytest.mark.parametrize(
    ("limits", "over"),
    [
        (Limits(patience=2), True),
        (Limits(patience=2, length_ratio=9), False),
        (Limits(patience=3), False),
        # rang once by the limits of then, twice by those of now
        (Limits(patience=2, length_ratio=1.1), True),
    ],
)
def test_a_run_that_an_alarm_stopped_goes_on_only_with_other_limits(limits: Limits, over: bool) -> None:
    watch = Watch(Limits(patience=2))
    history = [watch(measure(_changed(tokens=tokens))) for tokens in (20, 24, 100, 100)]
    stop = StopWhenHacked(Watch(limits), updates_per_rollout=2)
    state = SimpleNamespace(log_history=history, global_step=8)
    if over:
        with pytest.raises(RewardHacked, match=r"length_runaway for \d rollouts.*out/checkpoint-8"):
            stop.on_train_begin(SimpleNamespace(output_dir="out"), state, None)
    else:
        stop.on_train_begin(SimpleNamespace(output_dir="out"), state, None)


def test_the_run_ends_with_a_checkpoint_at_the_end_of_the_rollout() -> None:
    watch = Watch(Limits(patience=1))
    stop = StopWhenHacked(watch, updates_per_rollout=2)
    stop.on_train_begin(SimpleNamespace(output_dir="out"), SimpleNamespace(log_history=[], global_step=0), None)
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    stop.on_step_end(None, SimpleNamespace(global_step=2), control)
    stop.raise_if_over("x")
    watch(measure(_changed(reasoning=None)))
    stop.on_step_end(None, SimpleNamespace(global_step=3), control)
    assert not control.should_training_stop
    stop.on_step_end(None, SimpleNamespace(global_step=4), control)
    assert control.should_training_stop
    assert control.should_save
    with pytest.raises(RewardHacked, match=r"format_drift.*checkpoint-4.*alarms"):
        stop.raise_if_over("checkpoint-4")
