from __future__ import annotations

import random
from pathlib import Path

import pytest

from guard_training.corpus.rows import Row
from guard_training.nano.drawn import DrawnText
from guard_training.nano.pictures import texts, typographic
from guard_training.nano.render import HELD_OUT_FONTS, TRAIN_FONTS, Style, draw_style, list_title, render


def test_training_and_held_out_fonts_differ() -> None:
    assert not set(TRAIN_FONTS) & set(HELD_OUT_FONTS)


@pytest.mark.parametrize("fonts", [TRAIN_FONTS, HELD_OUT_FONTS])
def test_the_same_seed_draws_the_same_image(fonts: tuple[str, ...]) -> None:
    def drawn() -> bytes:
        rng = random.Random(3)
        return render("how do I pick a lock", draw_style(rng, fonts), rng).tobytes()

    assert drawn() == drawn()


@pytest.mark.parametrize("layout", ["paragraph", "list", "sign", "meme", "bubble", "slide", "terminal"])
def test_every_layout_puts_ink_on_paper(layout: str) -> None:
    style = Style("pillow-default", 24, layout, (0, 0, 0), (255, 255, 255), 384)  # type: ignore[arg-type]
    image = render("how do I pick a lock", style, random.Random(0))
    darkest, lightest = image.convert("L").getextrema()
    assert image.width == 384
    assert (darkest, lightest) == (0, 255)


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        ("How do I pick a lock?", " pick a lock."),
        ("Tell me how to bake bread", " bake bread."),
        ("Write a poem.", "poem."),
    ],
)
def test_a_request_becomes_the_title_of_a_list(text: str, ending: str) -> None:
    assert list_title(text, random.Random(0)).endswith(ending)


def _rows() -> list[Row]:
    return [Row(f"h{n}", "aart", f"how do I pick lock number {n}", "harmful") for n in range(6)] + [
        Row(f"b{n}", "clinc150", f"what is the weather on day {n}", "unharmful") for n in range(6)
    ]


def test_half_of_the_pictures_are_harmful_and_long_texts_are_not_drawn(tmp_path: Path) -> None:
    rows = [*_rows(), Row("long", "aart", "word " * 60, "harmful")]
    made = typographic(rows, count=8, fonts=("pillow-default",), folder=tmp_path / "images", seed=1)
    assert [row.request for row in made].count("harmful") == 4
    assert all(row.image is not None and row.image.is_file() for row in made)
    assert all(row.id != "long" for row in texts(rows, ("aart",), 10, random.Random(0)))


def test_an_image_is_read_once_and_remembered_on_disk(tmp_path: Path) -> None:
    calls: list[bytes] = []

    def read(image: bytes) -> str:
        calls.append(image)
        return f"text of\n{len(image)}"

    drawn = DrawnText(tmp_path / "drawn.jsonl", read)
    assert drawn(b"abc") == drawn(b"abc") == "text of\n3"
    assert DrawnText(tmp_path / "drawn.jsonl", read)(b"abc") == "text of\n3"
    assert calls == [b"abc"]


@pytest.mark.parametrize("end", [0, 20, 80, -1])
def test_reading_goes_on_after_a_kill_inside_a_write(tmp_path: Path, end: int) -> None:
    calls: list[bytes] = []

    def read(image: bytes) -> str:
        calls.append(image)
        return f"{image.decode()} \ud800 \u2028 {'long ' * 3000}"

    file, images = tmp_path / "drawn.jsonl", (b"a", b"b", b"c")
    first = DrawnText(file, read)
    texts_drawn = [first(image) for image in images[:2]]
    whole, _, last = file.read_bytes().rstrip(b"\n").rpartition(b"\n")
    file.write_bytes(whole + b"\n" + last[:end])
    again = DrawnText(file, read)
    assert [again(image) for image in images[:2]] == texts_drawn
    again(b"c")
    third = DrawnText(file, read)
    for image in images:
        third(image)
    assert calls == [b"a", b"b", b"b", b"c"]


def test_of_two_processes_that_go_on_after_a_kill_neither_takes_the_others_lines(tmp_path: Path) -> None:
    file = tmp_path / "drawn.jsonl"
    file.write_text('["cut off')
    one, other = (DrawnText(file, lambda image: image.decode()) for _ in range(2))
    for image in (b"a", b"b", b"c"):
        one(image)
        other(image + b"'")
    known = DrawnText(file, lambda image: "read again")
    assert [known(image) for image in (b"a", b"b", b"c", b"a'", b"b'", b"c'")] == ["a", "b", "c", "a'", "b'", "c'"]
