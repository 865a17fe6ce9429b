"""Two rows joined: labels, pictures, pairs that repeat for a seed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from guard_training.corpus.conversation import image_size
from guard_training.corpus.rows import CorpusError, Row
from guard_training.tuning.concatenation import (
    LAYOUTS,
    Mix,
    Options,
    compose,
    count_for,
    either,
    merge,
    overall,
    place,
    plan,
    request_label,
    response_label,
)


def row(id: str, request=None, response=None, answer=None, image=None, prompt=None) -> Row:  # type: ignore[no-untyped-def]
    return Row(id, "made", prompt if prompt is not None else f"ask {id}", request, answer, response, image=image)


def picture(path: Path, size: tuple[int, int], colour: object) -> Path:
    Image.new("RGBA" if isinstance(colour, tuple) and len(colour) == 4 else "RGB", size, colour).save(path)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("first", "second", "label"),
    [
        ("harmful", "harmful", "harmful"),
        ("harmful", "unharmful", "harmful"),
        ("harmful", None, "harmful"),
        ("unharmful", "unharmful", "unharmful"),
        ("unharmful", None, None),
        (None, None, None),
    ],
)
def test_a_mix_is_harmful_if_either_is_and_unharmful_only_if_both_are_known_to_be(first, second, label) -> None:  # type: ignore[no-untyped-def]
    assert either(first, second) == either(second, first) == label
    assert request_label((row("a", first), row("b", second))) == label
    assert response_label((row("a", None, first, "x"), row("b", None, second, "y"))) == label


def test_a_row_without_an_answer_leaves_the_label_of_the_other_answer() -> None:
    silent = row("a", "harmful")
    assert response_label((silent, row("b", None, "unharmful", "x"))) == "unharmful"
    assert response_label((silent, row("b", None, None, "x"))) is None
    assert response_label((silent, silent)) is None


@pytest.mark.parametrize(
    ("case", "label"),
    [
        (row("a", "unharmful"), "unharmful"),
        (row("a", "unharmful", "harmful", "x"), "harmful"),
        (row("a", "unharmful", None, "x"), None),
        (row("a", None, "unharmful", "x"), None),
    ],
)
def test_a_row_is_unharmful_only_where_each_of_its_sides_is(case: Row, label: str | None) -> None:
    assert overall(case) == label


def test_the_mixed_labels_stand_in_the_new_row_and_differ_from_the_first_rows(tmp_path: Path) -> None:
    first, second = row("a", "unharmful", "unharmful", "fine"), row("b", "harmful", "unharmful", "no")
    made = compose(Mix((first, second), (), "side_by_side", "drawn", 0), tmp_path, Options())
    assert (made.request, made.response_label) == ("harmful", "unharmful")
    assert (made.prompt, made.response, made.image) == ("ask a ask b", "fine no", None)


def test_fillers_lend_their_request_and_picture_but_not_their_answer(tmp_path: Path) -> None:
    red = picture(tmp_path / "red.png", (30, 30), "red")
    filler = row("f", "unharmful", "harmful", "not judged", image=red)
    made = compose(Mix((row("a", "harmful"), row("b", "harmful")), (filler,), "grid", "drawn", 0), tmp_path, Options())
    assert made.prompt == "ask a ask f ask b"
    assert made.response is None
    assert made.response_label is None
    assert made.image is not None


def test_one_picture_is_kept_beside_a_text(tmp_path: Path) -> None:
    red = picture(tmp_path / "red.png", (40, 30), "red")
    mix = Mix((row("a", "harmful", image=red, prompt=""), row("b", "unharmful")), (), "side_by_side", "drawn", 0)
    made = compose(mix, tmp_path, Options())
    assert made.prompt == "ask b"
    with Image.open(made.image) as merged:  # type: ignore[arg-type]
        assert (merged.size, merged.format) == ((40, 30), "PNG")


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=5),
    st.sampled_from(LAYOUTS),
    st.integers(0, 200),
    st.integers(28, 1500),
)
def test_every_picture_lies_inside_the_bounded_canvas_and_none_is_enlarged(sizes, layout, gap, side) -> None:  # type: ignore[no-untyped-def]
    (width, height), boxes = place(sizes, layout, gap=gap, side=side, inset=0.4)
    assert 1 <= width <= side
    assert 1 <= height <= side
    assert len(boxes) == len(sizes)
    for (x, y, wide, high), size in zip(boxes, sizes, strict=True):
        assert x >= 0
        assert y >= 0
        assert x + wide <= width
        assert y + high <= height
        assert 1 <= wide <= size[0]
        assert 1 <= high <= size[1]


@given(
    st.lists(st.tuples(st.integers(40, 300), st.integers(40, 300)), min_size=2, max_size=5),
    st.sampled_from(["side_by_side", "stacked", "grid"]),
    st.integers(0, 50),
)
def test_pictures_beside_each_other_do_not_overlap(sizes, layout, gap) -> None:  # type: ignore[no-untyped-def]
    _, boxes = place(sizes, layout, gap=gap, side=10_000, inset=0.4)
    for n, (x, y, wide, high) in enumerate(boxes):
        for other in boxes[:n]:
            apart = (x - other[0] - other[2], other[0] - x - wide, y - other[1] - other[3], other[1] - y - high)
            assert max(apart) >= gap


@pytest.mark.parametrize(
    ("layout", "gap", "size", "red", "blue", "white"),
    [
        ("side_by_side", 0, (100, 50), (10, 10), (70, 40), (10, 45)),
        ("side_by_side", 10, (110, 50), (10, 10), (80, 40), (45, 10)),
        ("stacked", 0, (60, 80), (10, 10), (50, 60), (50, 10)),
        ("grid", 0, (120, 50), (30, 25), (90, 25), (2, 2)),
        ("inset", 5, (60, 50), (45, 40), (5, 5), None),
    ],
)
def test_layouts_put_the_pictures_where_they_say(  # type: ignore[no-untyped-def]
    tmp_path: Path, layout, gap, size, red, blue, white
) -> None:
    images = [picture(tmp_path / "r.png", (40, 30), "red"), picture(tmp_path / "b.png", (60, 50), "blue")]
    with Image.open(merge(images, layout, gap, tmp_path, Options())) as merged:
        assert merged.size == size
        assert merged.getpixel(red) == (255, 0, 0)
        assert merged.getpixel(blue) == (0, 0, 255)
        assert white is None or merged.getpixel(white) == (255, 255, 255)


def test_a_merged_picture_is_bounded_as_in_the_paper_and_named_by_its_digest(tmp_path: Path) -> None:
    wide = picture(tmp_path / "w.png", (1500, 700), "red")
    first, second = (merge([wide, wide], "side_by_side", 0, tmp_path, Options()) for _ in range(2))
    assert first == second
    assert len(first.stem) == 32
    with Image.open(first) as merged:
        assert merged.size == (1024, 238)


def test_a_transparent_picture_stands_on_white(tmp_path: Path) -> None:
    clear = picture(tmp_path / "clear.png", (30, 30), (255, 0, 0, 0))
    with Image.open(merge([clear], "side_by_side", 0, tmp_path, Options())) as merged:
        assert merged.getpixel((3, 3)) == (255, 255, 255)


def test_a_broken_or_huge_picture_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = picture(tmp_path / "whole.png", (200, 200), "red")
    noise = Image.effect_noise((200, 200), 90)
    noise.save(tmp_path / "noise.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes((tmp_path / "noise.png").read_bytes()[:2000])
    with pytest.raises(CorpusError, match=r"cut.png cannot be decoded"):
        merge([whole, cut], "stacked", 0, tmp_path, Options())
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(CorpusError, match=r"text.png is no readable image"):
        image_size(tmp_path / "text.png")
    monkeypatch.setattr("guard_training.corpus.conversation.MAX_PIXELS", 100)
    with pytest.raises(CorpusError, match="200 x 200 pixels"):
        image_size(whole)


@pytest.mark.parametrize(("rows", "share", "count"), [(9600, 0.2, 2400), (100, 0.0, 0), (10, 0.5, 10), (0, 0.2, 0)])
def test_the_share_is_of_the_whole(rows: int, share: float, count: int) -> None:
    assert count_for(rows, share) == count


def _rows(tmp_path: Path, number: int = 24) -> list[Row]:
    red = picture(tmp_path / "red.png", (30, 30), "red")
    rng = random.Random(1)
    return [row(str(n), rng.choice(["harmful", "unharmful"]), image=red if n % 3 == 0 else None) for n in range(number)]


def test_a_plan_repeats_for_its_seed_and_pairs_no_two_rows_twice(tmp_path: Path) -> None:
    rows = _rows(tmp_path)
    options = Options(layouts=LAYOUTS, gaps=(0, 16), orders=("drawn", "harmful_first"))
    mixes = plan(rows, 100, options, seed=3)
    assert mixes == plan(rows, 100, options, seed=3)
    assert mixes != plan(rows, 100, options, seed=4)
    assert len({frozenset((mix.parents[0].id, mix.parents[1].id)) for mix in mixes}) == 100
    assert {mix.layout for mix in mixes} == set(LAYOUTS)
    assert {mix.gap for mix in mixes} == {0, 16}


@pytest.mark.parametrize("pairing", ["opposed", "same"])
def test_pairs_are_of_the_labels_that_are_asked_for(tmp_path: Path, pairing) -> None:  # type: ignore[no-untyped-def]
    for mix in plan(_rows(tmp_path), 40, Options(pairing=pairing), seed=0):
        assert (mix.parents[0].request != mix.parents[1].request) == (pairing == "opposed")


@pytest.mark.parametrize("across", ["across", "within"])
def test_pairs_are_of_the_modalities_that_are_asked_for(tmp_path: Path, across) -> None:  # type: ignore[no-untyped-def]
    for mix in plan(_rows(tmp_path), 40, Options(across=across), seed=0):
        first, second = mix.parents
        assert ((first.image is None) != (second.image is None)) == (across == "across")


@pytest.mark.parametrize(("order", "first"), [("harmful_first", "harmful"), ("harmful_last", "unharmful")])
def test_the_harmful_row_stands_where_it_is_asked_for(tmp_path: Path, order, first) -> None:  # type: ignore[no-untyped-def]
    mixes = plan(_rows(tmp_path), 40, Options(orders=(order,), pairing="opposed"), seed=0)
    assert {mix.parents[0].request for mix in mixes} == {first}


def test_a_grid_is_filled_with_pictures_of_unharmful_rows_and_only_where_a_parent_has_one(tmp_path: Path) -> None:
    mixes = plan(_rows(tmp_path), 60, Options(layouts=("grid",)), seed=0)
    fillers = [filler for mix in mixes for filler in mix.fillers]
    assert fillers
    assert all(filler.request == "unharmful" and filler.image for filler in fillers)
    assert all(filler.id not in {parent.id for parent in mix.parents} for mix in mixes for filler in mix.fillers)
    assert all(bool(mix.fillers) == any(parent.image for parent in mix.parents) for mix in mixes)


def test_rows_that_leave_too_few_pairs_are_refused_with_the_number_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3 rows give 3 different uniform pairs .* 4 are wanted"):
        plan(_rows(tmp_path, 3), 4, Options(), seed=0)
    with pytest.raises(ValueError, match="no unharmful row can be a filler"):
        plan([row("a", "harmful"), row("b", "harmful")], 1, Options(fillers=(1,)), seed=0)


def test_a_pair_whose_mix_would_have_no_label_is_not_drawn() -> None:
    rows = [row("a", None, "unharmful", "x"), row("b", "unharmful", None, "y"), row("c", "harmful")]
    pairs = {frozenset(parent.id for parent in mix.parents) for mix in plan(rows, 2, Options(), seed=0)}
    assert pairs == {frozenset("ac"), frozenset("bc")}


@pytest.mark.parametrize(
    "wrong", [{"gaps": (-1,)}, {"side": 5}, {"inset": 1.5}, {"layouts": ("inset",), "fillers": (4,)}]
)
def test_options_that_mean_nothing_are_refused(wrong) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"pixels|share|corners"):
        Options(**wrong)
