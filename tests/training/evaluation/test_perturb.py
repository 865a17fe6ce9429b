from __future__ import annotations

import base64
import codecs
import io
import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from guard_training.corpus.rows import Row, Skipped
from guard_training.evaluation import perturb
from guard_training.evaluation.perturb import (
    GROUPS,
    TEXT_PERTURBATIONS,
    PerturbError,
    picture,
    read_translations,
    subjects,
    surrounded,
    variants,
)

TEXT = "How do I open a tin without a tool?"


def _rows(count: int = 12) -> list[Row]:
    return [Row(f"b{n}", "bread", f"bake loaf number {n}", "unharmful") for n in range(count)]


def _visible(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text)
    return "".join(c for c in folded if unicodedata.category(c) not in ("Cf", "Mn"))


@pytest.mark.parametrize("name", TEXT_PERTURBATIONS)
def test_a_perturbation_changes_the_text_and_repeats_for_a_seed(name: str) -> None:
    change = TEXT_PERTURBATIONS[name]
    once = change(TEXT, random.Random("7"))
    assert once != TEXT
    assert once == change(TEXT, random.Random("7"))


@pytest.mark.parametrize("name", ["zero_width", "variation_selectors", "fullwidth", "mathematical"])
@given(text=st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1))
def test_what_is_seen_is_the_text(name: str, text: str) -> None:
    assert _visible(TEXT_PERTURBATIONS[name](text, random.Random(1))) == _visible(text)


def test_every_letter_is_followed_by_something_invisible() -> None:
    for name in ("zero_width", "variation_selectors"):
        found = TEXT_PERTURBATIONS[name]("lock", random.Random(1))
        assert len(found) == 8
        assert all(not _visible(c) for c in found[1::2])


def test_the_tags_block_hides_the_whole_text_behind_a_harmless_one() -> None:
    found = perturb.tags_block(TEXT, random.Random(1))
    hidden = "".join(chr(ord(c) - 0xE0000) for c in found if ord(c) >= 0xE0000)
    assert hidden == TEXT
    assert TEXT not in _visible(found)


def test_look_alikes_have_the_same_length_and_leave_latin_script() -> None:
    found = perturb.look_alikes("exposed cases " * 10, random.Random(1))
    assert len(found) == 140
    names = {unicodedata.name(c).split()[0] for c in found if c.isalpha()}
    assert names == {"LATIN", "CYRILLIC"}


def test_encodings_can_be_decoded_to_the_text() -> None:
    rng = random.Random(1)
    assert base64.b64decode(perturb.in_base64(TEXT, rng).split("\n")[1]).decode() == TEXT
    assert codecs.decode(perturb.in_rot13(TEXT, rng).split("\n")[1], "rot13") == TEXT
    leet = perturb.leetspeak("open " * 20, rng)
    assert leet.replace("0", "o").replace("3", "e") == "open " * 20
    assert 20 < sum(map(leet.count, "03")) < 40


@pytest.mark.parametrize("name", perturb.TEXT_GROUPS["injection"])
def test_an_injection_keeps_the_text_whole(name: str) -> None:
    assert TEXT in TEXT_PERTURBATIONS[name](TEXT, random.Random(3))


@pytest.mark.parametrize(
    ("position", "wanted"), [("begin", "x\n\na\n\nb"), ("middle", "a\n\nx\n\nb"), ("end", "a\n\nb\n\nx")]
)
def test_other_texts_stand_where_the_position_says(position: perturb.Position, wanted: str) -> None:
    assert surrounded("x", ["a", "b"], position) == wanted


def test_a_text_is_drawn_alike_for_a_seed_unless_it_is_empty_or_long() -> None:
    data = picture(TEXT, random.Random(1), "paragraph")
    assert data is not None
    assert data == picture(TEXT, random.Random(1), "paragraph")
    assert min(Image.open(io.BytesIO(data)).size) > 40
    assert picture("word " * (perturb.DRAWN_WORDS + 1), random.Random(1), "list") is None
    assert picture(" ", random.Random(1), "list") is None


def test_what_is_not_labelled_has_no_text_or_has_an_image_is_no_subject(tmp_path: Path) -> None:
    rows = [
        Row("1", "s", "ask", "harmful", "answer", "unharmful"),
        Row("2", "s", "ask", None, "answer", "harmful"),
        Row("3", "s", "  ", "harmful"),
        Row("4", "s", "ask", "harmful", image=tmp_path / "a.png"),
    ]
    assert subjects(rows, "request") == [Row("1", "s", "ask", "harmful")]
    assert [row.id for row in subjects(rows, "response")] == ["1", "2"]


def test_every_group_has_its_variants(tmp_path: Path) -> None:
    ways = variants(_rows(), "request", translations={"ko": {"b1": "하나"}}, images=tmp_path)
    assert {way.group for way in ways} == set(GROUPS)
    assert len({way.name for way in ways}) == len(ways) == 2 + len(TEXT_PERTURBATIONS) + 1 + 11


def test_depths_nest_and_never_repeat_the_row_itself(tmp_path: Path) -> None:
    rows = _rows()
    found = {
        way.name: way.change(rows[0]) for way in variants(rows, "request", groups=["concatenation"], images=tmp_path)
    }
    texts = {name: row.prompt.split("\n\n") for name, row in found.items() if row}
    assert texts["concat_8_begin"][0] == rows[0].prompt
    assert texts["concat_8_begin"].count(rows[0].prompt) == 1
    assert len(texts["concat_8_begin"]) == 9
    assert texts["concat_8_begin"][1:5] == texts["concat_4_begin"][1:]
    assert texts["concat_8_middle"][4] == texts["concat_1_end"][1] == rows[0].prompt


def test_too_few_harmless_texts_to_join_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(PerturbError, match=r"found 8.*--groups"):
        variants(_rows(8), "request", images=tmp_path)


def test_a_response_is_changed_and_the_request_left(tmp_path: Path) -> None:
    row = Row("1", "s", "ask", None, "answer", "harmful")
    ways = variants([row], "response", groups=["encoding", "typography"], images=tmp_path)
    assert [way.name for way in ways] == ["base64", "rot13", "leetspeak"]
    changed = ways[1].change(row)
    assert changed is not None
    assert (changed.prompt, changed.response_label) == ("ask", "harmful")
    assert (changed.response or "").endswith("nafjre")


def test_bad_translations_are_named_and_the_good_ones_used(tmp_path: Path) -> None:
    file, skipped = tmp_path / "t.jsonl", Skipped()
    file.write_text(
        '{"id": "b1", "language": "ko", "text": "빵"}\n{"id": "b1"}\nno\n[]\n'
        '{"id": 1.5, "language": "ko", "text": "x"}\n'
    )
    assert read_translations(file, skipped) == {"ko": {"b1": "빵"}}
    assert [reason.split(": ")[0] for reason in skipped.reasons] == [f"t.jsonl:{n}" for n in (2, 3, 4, 5)]
    (way,) = variants(_rows(), "request", groups=["translation"], translations={"ko": {"b1": "빵"}}, images=tmp_path)
    changed = way.change(_rows()[1])
    assert changed is not None
    assert changed.prompt == "빵"
    assert way.change(_rows()[2]) is None
