from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard_middleware.guard.parse import completion
from guard_training.tuning.reward import Shape, Truth, reward, safety, score, verdict
from guard_training.tuning.settings import RecipeError

PAPER = Shape("characters", longest=3072)
ECO = Shape("characters", longest=3072, beta=500 / 3072)
RIGHT = completion("Step 1: it asks about bread.", "unharmful", None)
BOTH = completion("Step 1: it asks about bread.", "unharmful", "harmful")


@pytest.mark.parametrize(
    ("shape", "length", "expected"),
    [
        (PAPER, 250, -151.0),
        (PAPER, 500, -37.7),
        (PAPER, 1000, -9.44),
        (PAPER, 3072, -1.0),
        (PAPER, 9000, -1.0),
        (PAPER, 0, -400.0),
        (ECO, 250, -151.0),
        (ECO, 500, -37.7),
        (ECO, 1000, -37.7),
        (ECO, 3072, -37.7),
        (Shape("tokens", longest=100, beta=1 / 6), 50, -36.0),
        (Shape("none"), 7, -1.0),
    ],
)
def test_a_wrong_completion_earns_what_equation_ten_says(shape: Shape, length: int, expected: float) -> None:
    assert reward(0.0, length, shape) == pytest.approx(expected, rel=2e-3)
    assert reward(0.5, length, shape) == pytest.approx(expected / 2, rel=2e-3)


shapes = st.builds(
    Shape,
    unit=st.sampled_from(["tokens", "characters"]),
    longest=st.integers(1, 5000),
    beta=st.floats(0.1, 1),
    floor=st.floats(0.01, 0.1),
)


@given(shapes, st.integers(0, 10000))
def test_a_right_completion_earns_nothing_whatever_its_length(shape: Shape, length: int) -> None:
    assert reward(1.0, length, shape) == 0


@given(shapes, st.integers(0, 10000), st.integers(0, 10000), st.sampled_from([0.0, 0.5]))
def test_a_wrong_one_is_less_bad_the_longer_it_is_until_beta(shape: Shape, one: int, two: int, right: float) -> None:
    short, long = sorted((one, two))
    lowest = -(shape.floor**-2) * (1 + 1e-9)
    assert lowest <= reward(right, short, shape) <= reward(right, long, shape) < 0
    beyond = shape.beta * shape.longest
    assert reward(right, beyond + one, shape) == pytest.approx(reward(right, beyond, shape))
    within = [share * shape.longest for share in (shape.floor, (shape.floor + shape.beta) / 2, shape.beta)]
    if shape.beta > shape.floor * 1.01:
        assert reward(right, within[0], shape) < reward(right, within[1], shape) < reward(right, within[2], shape)


@pytest.mark.parametrize(
    ("text", "truth", "expected"),
    [
        (RIGHT, Truth("unharmful", None, False), 1.0),
        (RIGHT, Truth("harmful", None, False), 0.0),
        (BOTH, Truth("unharmful", "harmful", True), 1.0),
        (BOTH, Truth("unharmful", "unharmful", True), 0.5),
        (BOTH, Truth("harmful", "unharmful", True), 0.0),
        (BOTH, Truth(None, "harmful", True), 1.0),
        (BOTH, Truth(None, "unharmful", True), 0.0),
        (BOTH, Truth("unharmful", None, True), 1.0),
        # the gate: what the gateway would refuse earns nothing, however right its words are
        (BOTH, Truth("unharmful", None, False), 0.0),
        (RIGHT, Truth("unharmful", "harmful", True), 0.0),
        (RIGHT + RIGHT, Truth("unharmful", None, False), 0.0),
        ("so: " + RIGHT, Truth("unharmful", None, False), 0.0),
        (RIGHT.replace("</result>", ""), Truth("unharmful", None, False), 0.0),
        (RIGHT.replace("unharmful", "Unharmful"), Truth("unharmful", None, False), 0.0),
        ("", Truth("unharmful", None, False), 0.0),
    ],
)
def test_only_labelled_sides_of_a_well_formed_verdict_count(text: str, truth: Truth, expected: float) -> None:
    assert safety(verdict(text, truth), truth) == expected


def test_length_is_in_the_unit_that_was_asked_for() -> None:
    wrong = Truth("harmful", None, False)
    assert score(RIGHT, 30, wrong, Shape("tokens", longest=60))[0] == -4.0
    assert score(RIGHT, 30, wrong, Shape("characters", longest=2 * len(RIGHT)))[0] == -4.0
    assert score(RIGHT, 30, wrong, Shape("none"))[0] == -1.0


@pytest.mark.parametrize("values", [{"beta": 0.01}, {"floor": 0.0}, {"beta": 1.5}, {"longest": 0}])
def test_a_reward_that_would_explode_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="floor"):
        Shape(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", [(None, None, True), (None, None, False), ("harmful", "harmful", False)])
def test_a_row_that_cannot_be_rewarded_is_refused(labels: tuple) -> None:
    with pytest.raises(ValueError, match="label"):
        Truth(*labels)
