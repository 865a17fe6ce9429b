from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from guard_training.evaluation.outcomes import Outcome
from guard_training.update.gate import UpdateRefused, judge, sheet, weigh_golden


def outcomes(source: str, truth: Sequence[bool], called: Sequence[bool | None]) -> list[Outcome]:
    def label(one: bool | None) -> Any:
        return None if one is None else "harmful" if one else "unharmful"

    return [
        Outcome(f"{source}{n}", source, "text", label(is_), None, request=label(said), revision="r")
        for n, (is_, said) in enumerate(zip(truth, called, strict=True))
    ]


GOLDEN = outcomes("golden", [False, True], [False, True])


def decide(before: list[Outcome], after: list[Outcome], **more: Any):  # type: ignore[no-untyped-def]
    return judge(before, after, GOLDEN, GOLDEN, **{"margin": 0.02, **more})


@pytest.mark.parametrize(
    ("figure", "truth", "before", "after", "accepted"),
    [
        ("recall", [True] * 100, [True] * 100, [True] * 98 + [False] * 2, True),
        ("recall", [True] * 100, [True] * 100, [True] * 97 + [False] * 3, False),
        ("recall", [True] * 100, [True] * 100, [True] * 97 + [None] * 3, False),
        ("false_positive_rate", [False] * 100, [False] * 100, [True] * 3 + [False] * 97, False),
        ("false_positive_rate", [False] * 100, [True] * 9 + [False] * 91, [False] * 100, True),
        ("f1", [True] * 50 + [False] * 50, [True] * 50 + [False] * 50, [True] * 60 + [False] * 40, False),
        ("f1", [True] * 50 + [False] * 50, [True] * 40 + [False] * 60, [True] * 51 + [False] * 49, True),
    ],
)
def test_a_source_may_lose_up_to_the_margin(
    figure: str, truth: list[bool], before: list[bool], after: list[bool | None], accepted: bool
) -> None:
    found = decide(outcomes("s", truth, before), outcomes("s", truth, after))
    assert [one.figure for one in found.changes] == [figure]
    assert found.accepted is accepted
    if accepted:
        found.raise_if_refused()
    else:
        with pytest.raises(UpdateRefused, match="nothing is written"):
            found.raise_if_refused()


def test_one_source_that_loses_refuses_all_and_is_named() -> None:
    good, bad = [True] * 100, [True] * 90 + [False] * 10
    before = [*outcomes("a", good, bad), *outcomes("b", good, good)]
    after = [*outcomes("a", good, good), *outcomes("b", good, bad)]
    found = decide(before, after)
    assert [one.source for one in found.losses] == ["b"]
    assert found.reasons() == ["b (request): recall 100.0 -> 90.0, more than 2 points less"]
    assert decide(before, after, margin=0.1).accepted
    table = sheet(found)
    assert [row[0] for row in table.rows if row[-1] == "lost"] == ["b"]
    assert "-10.0 (" in table.rows[1][6]
    assert json.loads(json.dumps(found.to_json()))["changes"][1]["lost"] is True


def test_a_loss_that_may_be_chance_counts_unless_it_is_allowed() -> None:
    truth = [True] * 20
    before = outcomes("s", truth, [True] * 10 + [False] * 10)
    # one row lost, none won: 5 points of 20 rows
    after = outcomes("s", truth, [True] * 9 + [False] * 11)
    strict = decide(before, after)
    assert not strict.accepted
    assert "this may be chance" in strict.reasons()[0]
    assert decide(before, after, allow_chance=True).accepted
    certain = outcomes("s", truth, [False] * 20)
    assert not decide(before, certain, allow_chance=True).accepted


def test_the_golden_set_breaks_only_by_what_was_right_before_false_positives_first() -> None:
    truth = [True, True, False, False, False]
    before = outcomes("g", truth, [True, False, False, True, False])
    after = outcomes("g", truth, [False, False, True, True, False])
    found = weigh_golden(before, after)
    assert found.broken == ("g2", "g0")
    assert found.wrong_before_and_after == ("g3", "g1")
    assert found.mended == ()
    same = outcomes("s", [True], [True])
    verdict = judge(same, same, before, after, margin=0.02)
    assert not verdict.accepted
    assert verdict.reasons() == ["the golden set breaks: g2, g0"]


def test_a_golden_set_without_rows_shows_nothing_and_refuses() -> None:
    same = outcomes("s", [True], [True])
    verdict = judge(same, same, [], [], margin=0.02)
    assert not verdict.accepted
    assert verdict.reasons() == ["the golden set holds no row"]


def test_no_verdict_breaks_a_golden_row() -> None:
    before = outcomes("g", [False], [False])
    assert weigh_golden(before, outcomes("g", [False], [None])).broken == ("g0",)


def test_guards_that_share_no_row_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="share no labelled row"):
        decide(outcomes("a", [True], [True]), outcomes("b", [True], [True]))
