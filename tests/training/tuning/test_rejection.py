"""Which samples are right, and which rows are kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard_middleware.guard.parse import completion
from guard_training.corpus.rows import Row
from guard_training.tuning.rejection import (
    Counts,
    Outcome,
    count,
    from_json,
    judge,
    read_range,
    select,
    statistics,
    to_json,
)
from guard_training.tuning.sampling import Sample


def row(id: str = "a", request=None, response=None, image: bool = False, prompt: str = "ask") -> Row:  # type: ignore[no-untyped-def]
    picture = Path("x.png") if image else None
    return Row(id, "made", prompt, request, "answer" if response else None, response, image=picture)


@pytest.mark.parametrize(
    ("labels", "said", "outcome"),
    [
        (("harmful", None), ("harmful", None), Outcome.RIGHT),
        (("harmful", None), ("unharmful", None), Outcome.WRONG),
        (("harmful", "unharmful"), ("harmful", "unharmful"), Outcome.RIGHT),
        (("harmful", "unharmful"), ("harmful", "harmful"), Outcome.WRONG),
        (("harmful", "unharmful"), ("unharmful", "unharmful"), Outcome.WRONG),
        ((None, "harmful"), ("unharmful", "harmful"), Outcome.RIGHT),
        ((None, "harmful"), ("harmful", "unharmful"), Outcome.WRONG),
        (("harmful", None), ("harmful", "harmful"), Outcome.MALFORMED),
        (("harmful", "unharmful"), ("harmful", None), Outcome.MALFORMED),
    ],
)
def test_a_sample_is_right_where_every_labelled_side_is(labels, said, outcome) -> None:  # type: ignore[no-untyped-def]
    assert judge(completion("Step 1.", *said), row("a", *labels), answered=labels[1] is not None) == outcome


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Request: harmful",
        "<think>\nRequest: harmful\n</think>\n<result>\nAnswers:\n",
        completion("Step 1.", "harmful", None) + " and more",
        completion("Step 1.", "harmful", None) * 2,
    ],
)
def test_what_the_strict_parser_refuses_is_malformed_even_where_it_names_the_label(text: str) -> None:
    assert judge(text, row("a", "harmful"), answered=False) == Outcome.MALFORMED


def test_counts_hold_right_malformed_and_cut_off_samples_and_lengths() -> None:
    right, wrong = completion("Step 1.", "harmful", None), completion("Step 1.", "unharmful", None)
    samples = [Sample(right, 9, True), Sample(wrong, 8, True), Sample("<think>", 40, False)]
    found = count(row("a", "harmful"), samples, answered=False)
    assert found == Counts("a", right=1, malformed=1, cut=1, tokens=(9, 8, 40))
    assert (found.samples, found.wrong) == (3, 2)
    assert from_json(to_json(found)) == found


@pytest.mark.parametrize(
    ("text", "numbers"), [(None, [4]), ("4", [4]), ("1..3", [1, 2, 3]), ("0..4", [0, 1, 2, 3, 4]), ("2..2", [2])]
)
def test_a_range_names_numbers_of_wrong_samples(text: str | None, numbers: list[int]) -> None:
    assert list(read_range(text, 4)) == numbers


@pytest.mark.parametrize("text", ["5", "3..1", "1-3", "", "..", "a", "1..9", "-1"])
def test_a_range_outside_the_samples_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"within 0\.\.4"):
        read_range(text, 4)


ROWS = [
    row("easy", "harmful"),
    row("mixed", "harmful"),
    row("hard", "harmful"),
    row("picture", "harmful", image=True, prompt=""),
    row("captioned", "harmful", image=True),
    row("unasked", "harmful"),
]
COUNTS = {
    id: Counts(id, right, 0, 0, (10, 20, 30, 40))
    for id, right in {"easy": 4, "mixed": 2, "hard": 0, "picture": 4, "captioned": 4}.items()
}


@pytest.mark.parametrize(
    ("keep", "all_images", "kept"),
    [
        (None, False, ["hard"]),
        ("1..3", False, ["mixed"]),
        (None, True, ["hard", "picture"]),
        ("0..4", False, ["easy", "mixed", "hard", "picture", "captioned"]),
    ],
)
def test_rows_are_kept_by_their_wrong_samples_and_by_the_papers_image_rule(keep, all_images, kept) -> None:  # type: ignore[no-untyped-def]
    chosen = select(ROWS, COUNTS, read_range(keep, 4), all_images=all_images)
    assert [one.id for one in chosen] == kept


@given(st.integers(0, 60), st.integers(0, 5), st.integers(0, 60))
def test_at_most_so_many_rows_are_kept_in_order_and_the_same_for_a_seed(number: int, seed: int, most: int) -> None:
    rows = [row(str(n), "harmful") for n in range(number)]
    counts = {one.id: Counts(one.id, 0, 0, 0, (1,)) for one in rows}
    kept = select(rows, counts, range(1, 2), max_rows=most, seed=seed)
    assert len(kept) == min(number, most)
    assert [int(one.id) for one in kept] == sorted(int(one.id) for one in kept)
    assert kept == select(rows, counts, range(1, 2), max_rows=most, seed=seed)


def test_another_seed_draws_other_rows() -> None:
    rows = [row(str(n), "harmful") for n in range(60)]
    counts = {one.id: Counts(one.id, 0, 0, 0, (1,)) for one in rows}
    assert select(rows, counts, range(1, 2), max_rows=9) != select(rows, counts, range(1, 2), max_rows=9, seed=1)


def test_balanced_rows_are_as_often_harmful_as_not_among_those_with_the_same_sides_labelled() -> None:
    def made(labels: str) -> Row:
        request, response = ({"h": "harmful", "u": "unharmful", "-": None}[letter] for letter in labels[:2])
        return Row(labels, "made", "words", request, "answer", response)  # type: ignore[arg-type]

    rows = [
        made(f"{sides}{n}") for sides in ("u-", "h-", "-u", "uu", "uh", "hu") for n in range(2 if "h" in sides else 5)
    ]
    counts = {one.id: Counts(one.id, 0, 0, 0, (1,)) for one in rows}
    kept = select(rows, counts, range(1, 2), balance=True)
    assert Counter(one.id[:2] for one in kept) == {
        "u-": 2,
        "h-": 2,
        "uu": 4,
        "uh": 2,
        "hu": 2,
    }  # "-u" has no other side
    assert [one.id for one in kept] == [one.id for one in rows if one in kept]
    assert kept == select(rows, counts, range(1, 2), balance=True)


def test_statistics_are_by_source_and_modality_then_in_all() -> None:
    groups = {(group.source, group.modality): group for group in statistics(ROWS, COUNTS, ROWS[2:3], 4)}
    assert list(groups) == [
        ("made", "image"),
        ("made", "text"),
        ("made", "text-image"),
        ("all", "image"),
        ("all", "text"),
        ("all", "text-image"),
        ("all", "all"),
    ]
    text = groups["made", "text"]
    assert (text.rows, text.right, text.length, text.kept) == (3, (1, 0, 1, 0, 1), 25.0, 1)
    assert (groups["all", "all"].rows, sum(groups["all", "all"].right)) == (5, 5)


def test_shares_are_of_the_samples() -> None:
    counts = {"easy": Counts("easy", 1, 2, 1, (5, 5, 5, 5))}
    (group, *_) = statistics(ROWS[:1], counts, [], 4)
    assert (group.malformed, group.cut) == (0.5, 0.25)


def test_no_rows_give_no_statistics() -> None:
    assert statistics(ROWS, {}, [], 4) == []
