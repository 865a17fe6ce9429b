"""The limiter, on a clock of its own."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard_training.synthesis.client import retry_after
from guard_training.synthesis.limits import WINDOW, Limiter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def times(sizes: list[int], requests: int | None, tokens: int | None) -> list[float]:
    clock = Clock()
    limiter = Limiter(requests, tokens, clock=clock, sleep=clock.sleep)

    async def run() -> list[float]:
        return [(await limiter.take(size)).at - 1000.0 for size in sizes]

    return asyncio.run(run())


def test_without_limits_nothing_waits() -> None:
    assert times([10**9] * 5, None, None) == [0.0] * 5


def test_requests_of_a_minute_are_bounded() -> None:
    assert times([1] * 5, 2, None) == [0, 0, 60, 60, 120]


def test_tokens_of_a_minute_are_bounded_and_a_request_too_large_goes_alone() -> None:
    assert times([60, 30, 20, 500, 10], None, 100) == [0, 0, 60, 120, 180]


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 5), st.integers(50, 120))
def test_no_minute_holds_more_than_the_limits(sizes: list[int], requests: int, tokens: int) -> None:
    sent = list(zip(times(sizes, requests, tokens), sizes, strict=True))
    for start, _ in sent:
        within = [size for at, size in sent if start <= at < start + WINDOW - 1e-6]
        assert len(within) <= requests
        assert sum(within) <= tokens


def test_real_tokens_replace_the_estimate() -> None:
    clock = Clock()
    limiter = Limiter(None, 100, clock=clock, sleep=clock.sleep)

    async def run() -> float:
        (await limiter.take(90)).tokens = 20
        return (await limiter.take(70)).at

    assert asyncio.run(run()) == 1000.0


def test_a_pause_holds_everything_back() -> None:
    clock = Clock()
    limiter = Limiter(clock=clock, sleep=clock.sleep)
    limiter.pause(7)
    limiter.pause(3)
    assert asyncio.run(limiter.take(1)).at == 1007.0


@pytest.mark.parametrize("limits", [(0, None), (None, 0)])
def test_a_limit_of_nothing_is_refused(limits: tuple[int | None, int | None]) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        Limiter(*limits)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0.0),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "soon"}, 0.0),
        ({"retry-after": "-4"}, 0.0),
        ({"retry-after": "Thu, 01 Jan 2015 00:00:00 GMT"}, 0.0),
    ],
)
def test_what_a_server_asks_for_is_read(headers: dict[str, str], seconds: float) -> None:
    assert retry_after(headers) == seconds


def test_a_date_is_read_as_the_seconds_until_then() -> None:
    assert 3e8 < retry_after({"retry-after": "Fri, 01 Jan 2100 00:00:00 GMT"}) < 4e9
