from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from guard_middleware.types import Text
from guard_training.corpus.rows import Row, Skipped, held_out
from guard_training.nano.lexicon import Lexicon
from guard_training.update.corrections import Lesson, whole
from guard_training.update.lessons import (
    HELD_BACK,
    Said,
    fit_lexicon,
    held_back,
    read_lessons,
    replay,
    with_rationales,
    without_leaks,
    write_lessons,
)

LEXICON = Lexicon({"lock": 2.0, "bread": -2.0}, {"lock": 1.0, "bread": 1.0})
WORDS = ("apple", "river", "stone", "cloud", "paper", "glass", "music", "garden", "window", "bridge", "candle")


def rows(count: int, source: str = "made") -> list[Row]:
    return [
        Row(f"{source}{n}", source, f"{WORDS[n % 11]} {source} {n}", "harmful" if n % 2 else "unharmful")
        for n in range(count)
    ]


def chat(*messages: tuple[str, str], **more: object) -> Lesson:
    value = [{"role": role, "content": text} for role, text in messages]
    prompt = next(text for role, text in reversed(messages) if role == "user")
    base = Lesson("correction:c", "corrections", prompt, "harmful", messages=json.dumps(value))
    return replace(base, **more)  # type: ignore[arg-type]


def test_what_an_evaluation_or_golden_file_holds_is_never_trained_on() -> None:
    held = {"dev.jsonl": [Row("e1", "dev", "how do I open the old garden gate", None)]}
    skipped = Skipped()
    kept = without_leaks(
        [
            Row("a", "made", "How do I open the old garden gate?", "harmful"),
            Row("b", "made", "how do I open the old garden gate now", "harmful"),
            Row("c", "made", "how do I bake bread in a pan", "unharmful"),
            chat(("user", "how do I open the old garden gate"), ("assistant", "Why?"), ("user", "just so")),
        ],
        held,
        skipped,
    )
    assert [row.id for row in kept] == ["c"]
    assert [reason.partition(":")[0] for reason in skipped.reasons] == ["a", "b", "correction"]
    assert "dev.jsonl holds it too (e1, text exact)" in skipped.reasons[0]
    assert "garden" not in "".join(skipped.reasons)


def test_an_image_of_an_evaluation_file_is_found_by_its_picture(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / name)
    held = {"dev": [Row("e", "dev", "what is this", "harmful", image=tmp_path / "a.png")]}
    mine = [replace(held["dev"][0], id=f"m{name}", image=tmp_path / name) for name in ("a.png", "b.png")]
    skipped = Skipped()
    assert [row.id for row in without_leaks(mine, held, skipped)] == ["mb.png"]


def test_replay_is_even_in_labels_and_repeats_no_row() -> None:
    older = [*rows(400, "large"), *rows(40, "small")]
    chosen = replay(older, [], 60, seed=1)
    assert len({row.id for row in chosen}) == 60
    assert sum(row.request == "harmful" for row in chosen) == 30
    # by the root of their size: 20 to 6.3, where plain chance would give 10 to 1
    assert 8 <= sum(row.source == "small" for row in chosen) <= 24
    assert replay(older, [], 60, seed=1) == chosen
    assert replay(older, [], 60, seed=2) != chosen
    assert not any(held_out(row.id, HELD_BACK) for row in replay(older, [], 10_000, seed=1))


def test_replay_gives_what_there_is_and_fills_up_the_scarce_label() -> None:
    older = [row for row in rows(200) if row.request == "unharmful"] + rows(8, "few")
    chosen = replay(older, [], 50, seed=0)
    assert len(chosen) == 50
    assert sum(row.request == "harmful" for row in chosen) == 4
    assert replay([], [], 0, seed=0) == []


def test_a_corrected_content_is_not_replayed_with_its_old_label() -> None:
    older = rows(40)
    corrected = [replace(older[1], id="correction:1", request="unharmful", prompt=older[1].prompt.upper())]
    assert older[1].id not in {row.id for row in replay(older, corrected, 1000, seed=0)}


def test_rows_held_back_for_calibration_are_not_replayed() -> None:
    older = rows(2000)
    back = held_back(older, 40, seed=0)
    assert len(back) == 40
    assert not {row.id for row in back} & {row.id for row in replay(older, [], 5000, seed=0)}


def test_rationales_come_from_reviewer_then_guard_then_template() -> None:
    asked: list[str] = []

    def ask(due: object) -> dict[str, Said]:
        asked.extend(row.id for row in due)  # type: ignore[attr-defined]
        return {
            "agrees": Said("harmful", None, "Step 1: I see."),
            "differs": Said("harmful", None, "Step 1: Wrong."),
            "answer": Said("harmful", "unharmful", "Step 1: It declines."),
        }

    skipped = Skipped()
    found, origins = with_rationales(
        [
            Row("given", "corrections", "a", "harmful", rationale="Because."),
            Row("agrees", "made", "b", "harmful"),
            Row("differs", "made", "pick <b> a lock", "unharmful"),
            Row("silent", "made", "c", "harmful", category="locks"),
            Row("answer", "made", "d", None, "No.", "unharmful"),
            Row("unknown", "made", "e", None, "No.", "harmful"),
            Row("tagged", "made", "f", "harmful", rationale="x </think> y"),
        ],
        skipped,
        ask=ask,
        lexicon=None,
        read=None,
    )
    by_id = {row.id: row for row in found}
    assert asked == ["agrees", "differs", "silent", "answer", "unknown"]
    assert dict(origins) == {"given": 1, "guard": 2, "template": 2}
    assert by_id["given"].rationale == "Because."
    assert by_id["agrees"].rationale == "Step 1: I see."
    assert (by_id["answer"].request, by_id["answer"].rationale) == ("harmful", "Step 1: It declines.")
    assert "« pick b a lock »" in str(by_id["differs"].rationale)
    assert "does no harm" in str(by_id["differs"].rationale)
    assert "would do harm (locks)" in str(by_id["silent"].rationale)
    assert sorted(reason.partition(":")[0] for reason in skipped.reasons) == ["tagged", "unknown"]


def test_nanos_teacher_quotes_what_speaks_for_the_label_and_says_where_it_stands(tmp_path: Path) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    found, origins = with_rationales(
        [
            Row("text", "made", "how do I bake bread", "unharmful"),
            chat(("system", "teach to pick a lock"), ("user", "begin")),
            Row("image", "made", "see", "harmful", image=tmp_path / "a.png"),
            Row("answer", "made", "bread", "unharmful", "I cannot.", "unharmful"),
        ],
        Skipped(),
        ask=lambda due: {},
        lexicon=LEXICON,
        read=lambda data: "pick a lock",
    )
    said = [str(row.rationale) for row in found]
    assert dict(origins) == {"teacher": 4}
    assert said[0].startswith("Step 1: ordinary words in the request: « bread ».")
    assert said[1].startswith("Step 1: risky words in the system text: « lock ».")
    assert said[2].startswith("Step 1: risky words in the drawn text: « lock ».")
    assert "Step 3: the answer declines" in said[3]


def test_the_teachers_lexicon_is_learnt_from_the_rows() -> None:
    older = [
        Row(f"{n}", f"s{n % 2}", "pick the lock" if n % 2 else "bake the bread", "harmful" if n % 2 else "unharmful")
        for n in range(20)
    ]
    lexicon = fit_lexicon(older)
    assert lexicon.weight("lock") > 0 > lexicon.weight("bread")
    assert fit_lexicon(older[:1]).weights == {}


def test_lessons_come_back_as_they_were_with_images_beside_the_file(tmp_path: Path) -> None:
    Image.new("RGB", (56, 56), (9, 9, 99)).save(tmp_path / "a.png")
    out = tmp_path / "out"
    out.mkdir()
    parts = [{"type": "text", "content": "see"}, {"type": "image", "image": "a.png"}]
    messages = json.dumps([{"role": "system", "content": "s"}, {"role": "user", "content": parts}])
    lessons = [
        # characters that str.splitlines cuts at and JSON does not
        Row("r", "made", "bread\u2028and\x85salt", "unharmful", rationale="Because."),
        Lesson("correction:1", "corrections", "see", "harmful", image=tmp_path / "a.png", messages=messages,
               rationale="Because."),
    ]  # fmt: skip
    write_lessons(lessons, out / "lessons.jsonl")
    skipped = Skipped()
    first, second = read_lessons(out / "lessons.jsonl", skipped)
    assert skipped.reasons == []
    assert (first.id, first.prompt, first.rationale) == ("r", "bread\u2028and\x85salt", "Because.")
    assert second.image is not None
    assert second.image.is_relative_to(out)
    seen = whole(second)
    assert seen.messages[0].parts == (Text("s"),)
    assert seen.blobs()[0].data == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("limit", [0, 3, 1000])
def test_held_back_rows_are_as_many_as_asked_for_or_all_that_there_are(limit: int) -> None:
    there = {row.id for row in rows(300) if held_out(row.id, HELD_BACK)}
    found = [row.id for row in held_back(rows(300), limit, seed=0)]
    assert len(found) == len(set(found)) == min(limit, len(there))
    assert set(found) <= there
