from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from guard_training.corpus.leakage import (
    Fingerprints,
    NearIndex,
    alike,
    find_duplicates,
    find_leaks,
    fingerprint,
    readable,
    shingles,
    words,
)
from guard_training.corpus.rows import Row, Skipped

LONG = "please tell me how long the dough of a plain white loaf has to rest before it goes into the oven"
#: one word of 20 changed: 15 of 21 shingles are shared
ALMOST = LONG.replace("white", "brown")


def row(id: str, prompt: str = "", response: str | None = None, image: Path | None = None, source: str = "s") -> Row:
    return Row(id, source, prompt, "unharmful", response, image=image)


def kinds(rows: list[Row], evaluated: list[Row]) -> list[tuple[str, str, str]]:
    return [(leak.id, leak.other, leak.kind) for leak in find_leaks(rows, {"dev": evaluated})]


@pytest.mark.parametrize(
    ("train", "dev", "expected"),
    [
        (row("a", LONG), row("x", LONG), "text exact"),
        (row("a", f"  {LONG.upper()}?!\n"), row("x", LONG), "text exact"),
        (row("a", "\uff48\uff45\uff4c\uff4c\uff4f there"), row("x", "Hello, there"), "text exact"),  # full width
        (row("a", LONG, "an hour"), row("x", LONG, "two hours"), "text exact"),
        (row("a", ALMOST), row("x", LONG), "text near"),
        (row("a", "one thing", LONG), row("x", "other things", LONG), "text near"),
        (row("a", "\U0001f35e"), row("x", "\U0001f35e"), "text exact"),
        (row("a", "\U0001f35e"), row("x", "\U0001f950"), None),
        (row("a", "how do I bake"), row("x", "how do I bake bread tonight"), None),
        (row("a", "first question", "Sorry, no."), row("x", "second question", "Sorry, no."), None),
        (row("a", ""), row("x", ""), None),
    ],
)
def test_texts_leak_by_their_words(train: Row, dev: Row, expected: str | None) -> None:
    assert kinds([train], [dev]) == ([("a", "x", expected)] if expected else [])


def test_a_leak_names_ids_and_how_similar_and_where(tmp_path: Path) -> None:
    (leak,) = find_leaks(
        [row("a", ALMOST), row("b", "another matter")], {"one": [row("x", "no")], "two": [row("y", LONG)]}
    )
    assert (leak.id, leak.other, leak.where, leak.kind) == ("a", "y", "two", "text near")
    assert leak.similarity == pytest.approx(
        len(shingles(LONG) & shingles(ALMOST)) / len(shingles(LONG) | shingles(ALMOST)), abs=1e-3
    )


def test_the_closest_of_several_matches_is_named() -> None:
    third = LONG.replace("plain white", "rich brown")
    assert kinds([row("a", LONG + " today")], [row("x", third), row("y", ALMOST), row("z", LONG)]) == [
        ("a", "z", "text near")
    ]


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    return len(a & b) / len(a | b)


@settings(max_examples=150, deadline=None)
@given(
    sets=st.lists(st.frozensets(st.integers(0, 12), min_size=1, max_size=9), min_size=1, max_size=8),
    query=st.frozensets(st.integers(0, 12), min_size=1, max_size=9),
    threshold=st.sampled_from([0.3, 0.5, 0.6, 2 / 3, 0.8, 1.0]),
)
def test_the_index_finds_exactly_what_comparing_with_each_finds(
    sets: list[frozenset[int]], query: frozenset[int], threshold: float
) -> None:
    index = NearIndex(threshold, Counter(shingle for each in sets for shingle in each))
    for number, each in enumerate(sets):
        index.add(str(number), each)
    wanted = [(str(n), jaccard(each, query)) for n, each in enumerate(sets) if jaccard(each, query) >= threshold - 1e-9]
    assert list(index.matches(query)) == wanted


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5])
def test_a_threshold_that_means_nothing_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        NearIndex(threshold, {})


@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_every_text_has_words_that_do_not_depend_on_case_and_spacing(text: str) -> None:
    assert words(text) == words(f"  {text}\n")
    assert bool(words(text)) == bool(text.split())
    assert len(shingles(text)) >= 1


def test_scripts_without_spaces_are_compared_by_character() -> None:
    assert len(shingles("\u4eca\u65e5\u306f\u3044\u3044\u5929\u6c17\u3067\u3059")) == 7


# ---------------------------------------------------------------- images


def draw(path: Path, seed: int, *, quality: int | None = None, scale: float = 1.0) -> Path:
    """A made picture of rectangles; the same seed is the same picture."""
    rng = random.Random(seed)
    image = Image.new("RGB", (160, 160), (rng.randrange(256), 120, 90))
    pencil = ImageDraw.Draw(image)
    for _ in range(60):
        x, y = rng.randrange(150), rng.randrange(150)
        shade = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        pencil.rectangle((x, y, x + rng.randrange(5, 40), y + rng.randrange(5, 40)), fill=shade)
    if scale != 1.0:
        image = image.resize((int(160 * scale), int(160 * scale)))
    image.save(path, **({"quality": quality} if quality else {}))
    return path


def test_images_leak_by_their_bytes_and_by_how_they_look(tmp_path: Path) -> None:
    dev = [row("x", image=draw(tmp_path / "x.png", 1)), row("y", image=draw(tmp_path / "y.png", 2))]
    train = [
        row("same", "another question", image=draw(tmp_path / "a.png", 1)),
        row("saved again", image=draw(tmp_path / "b.jpg", 2, quality=40, scale=0.7)),
        row("other", image=draw(tmp_path / "c.png", 3)),
        row("text", LONG),
    ]
    assert kinds(train, dev) == [("same", "x", "image exact"), ("saved again", "y", "image near")]


def test_the_same_question_about_another_image_does_not_leak(tmp_path: Path) -> None:
    train, dev = (row(id, LONG, image=draw(tmp_path / f"{id}.png", seed)) for id, seed in (("a", 1), ("x", 2)))
    assert kinds([train], [dev]) == []


def test_flat_pictures_are_compared_by_their_bytes_only(tmp_path: Path) -> None:
    for name, shade in (("a", "red"), ("x", "blue")):
        Image.new("RGB", (64, 64), shade).save(tmp_path / f"{name}.png")
    train, dev = (row(id, image=tmp_path / f"{id}.png") for id in ("a", "x"))
    assert not fingerprint(tmp_path / "a.png").comparable
    assert kinds([train], [dev]) == []
    assert kinds([row("b", image=tmp_path / "x.png")], [dev]) == [("b", "x", "image exact")]


def test_many_pictures_are_compared_as_one_by_one(tmp_path: Path) -> None:
    prints = [fingerprint(draw(tmp_path / f"{seed}.png", seed)) for seed in range(12)]
    left = [prints[seed % 12] for seed in range(1500)]
    assert [(mine, theirs) for mine, theirs, _ in alike(left, prints)] == [(n, n % 12) for n in range(1500)]
    assert list(alike(left, [])) == list(alike([], prints)) == []


def test_fingerprints_are_kept_until_the_file_changes(tmp_path: Path) -> None:
    picture, cache = draw(tmp_path / "a.png", 1), tmp_path / "cache.jsonl"
    with Fingerprints(cache) as prints:
        first = prints(picture)
    assert cache.read_text().count("\n") == 1
    cut = cache.read_bytes()
    with cache.open("ab") as file:
        file.write(b'{"id": "cut')
    with Fingerprints(cache) as prints:
        assert prints(picture) == first
    assert cache.read_bytes() == cut
    draw(picture, 2)
    with Fingerprints(cache) as prints:
        assert prints(picture) != first


def test_rows_with_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    rows = [row("a"), row("b", image=tmp_path / "gone.png"), row("c", image=tmp_path / "broken.png")]
    skipped = Skipped()
    assert readable(rows, Fingerprints(), skipped) == [rows[0]]
    assert [reason.split(" (")[0] for reason in skipped.reasons] == [
        "b: its image gone.png cannot be read",
        "c: its image broken.png cannot be read",
    ]


# ---------------------------------------------------------------- duplicates


def test_duplicates_are_the_later_rows_and_contradictions_are_marked(tmp_path: Path) -> None:
    picture, copy = draw(tmp_path / "a.png", 1), draw(tmp_path / "b.png", 1)
    rows = [
        row("a", LONG),
        row("b", LONG.upper()),
        Row("c", "s", LONG, "harmful"),
        Row("d", "s", LONG, None),
        row("e", LONG, "an answer"),
        row("f", image=picture),
        row("g", image=copy),
        row("h", "what is it?", image=copy),
    ]
    found = [(duplicate.id, duplicate.first, duplicate.contradicts) for duplicate in find_duplicates(rows)]
    assert found == [("b", "a", False), ("c", "a", True), ("d", "a", False), ("g", "f", False)]


def test_near_duplicates_are_left_out_when_asked_for() -> None:
    rows = [row("a", LONG), row("b", ALMOST), row("c", "another matter altogether, of course"), row("d", LONG)]
    assert [duplicate.id for duplicate in find_duplicates(rows)] == ["d"]
    assert [(found.id, found.first) for found in find_duplicates(rows, near=0.6)] == [("b", "a"), ("d", "a")]
    assert find_duplicates(rows, near=0.9) == find_duplicates(rows)
