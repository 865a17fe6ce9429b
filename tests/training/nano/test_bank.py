"""The bank of prompts, and the other texts that nano learns from."""

from __future__ import annotations

from pathlib import Path

import pytest

from guard_training.corpus.rows import CorpusError
from guard_training.nano.bank import default_bank, pair_of, read_bank
from guard_training.nano.wordnet import WordNetMissing, definitions, lemmas


def test_prompts_and_pairs_become_rows_of_their_files_kind(tmp_path: Path) -> None:
    (tmp_path / "benign_work_2.yaml").write_text("baking:\n  - How long does bread rise?\n")
    (tmp_path / "contrast_a.yaml").write_text("locks:\n  - {harmful: pick their lock, unharmful: pick my lock}\n")
    rows = read_bank(tmp_path)
    assert [(row.id, row.source, row.request) for row in rows] == [
        ("benign_work_2/baking/0", "bank_benign_work", "unharmful"),
        ("contrast_a/locks/0/harmful", "bank_contrast", "harmful"),
        ("contrast_a/locks/0/unharmful", "bank_contrast", "unharmful"),
    ]
    assert pair_of(rows[1].id) == pair_of(rows[2].id)


@pytest.mark.parametrize("text", ["- a list\n", "topic:\n  - 3\n", "topic:\n  - {harmful: x}\n"])
def test_any_other_shape_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "contrast_a.yaml").write_text(text)
    with pytest.raises(CorpusError, match=r"contrast_a\.yaml"):
        read_bank(tmp_path)


def test_a_prompt_with_two_answers_is_a_pair_whose_request_nobody_labelled(tmp_path: Path) -> None:
    (tmp_path / "answers_a.yaml").write_text("t:\n  - {prompt: p, harmful: h, unharmful: u}\n")
    unsafe, safe = read_bank(tmp_path)
    assert [(row.prompt, row.request, row.response, row.response_label) for row in (unsafe, safe)] == [
        ("p", None, "h", "harmful"),
        ("p", None, "u", "unharmful"),
    ]
    assert pair_of(unsafe.id) == pair_of(safe.id)


def test_the_projects_own_bank_has_both_labels_and_no_text_twice() -> None:
    rows = read_bank(default_bank())
    texts = [(row.prompt.lower().strip(), (row.response or "").lower().strip()) for row in rows]
    assert len(set(texts)) == len(texts)
    assert len({row.id for row in rows}) == len(rows)
    pairs = [row for row in rows if row.source == "bank_contrast"]
    assert sum(row.request == "harmful" for row in pairs) * 2 == len(pairs)
    answers = [row for row in rows if row.source == "bank_answers"]
    assert sum(row.response_label == "harmful" for row in answers) * 2 == len(answers)


def test_definitions_are_read_in_a_fixed_order_half_of_them_with_their_word(tmp_path: Path) -> None:
    for name in ("data.noun", "data.verb", "data.adj", "data.adv"):
        (tmp_path / name).write_text(
            '  a licence line\n00001740 03 n 01 pick_lock 0 000 | a tool; "he used it"\n', encoding="latin-1"
        )
    texts = definitions(tmp_path)
    assert texts == ['a tool; "he used it"', 'pick lock: a tool; "he used it"'] * 2


def test_lemmas_are_all_words_of_a_synset_by_part_of_speech(tmp_path: Path) -> None:
    line = "00001740 03 n 03 Pick_lock 0 bolt 1 door_to_door_sale 0 000 | a tool\n"
    for name in ("data.noun", "data.verb", "data.adj", "data.adv"):
        (tmp_path / name).write_text(line if name == "data.noun" else "  a licence line\n", encoding="latin-1")
    assert lemmas(tmp_path) == {"noun": ["bolt", "pick lock"], "verb": [], "adj": [], "adv": []}


def test_a_missing_file_of_wordnet_names_its_package(tmp_path: Path) -> None:
    with pytest.raises(WordNetMissing, match="wordnet-base"):
        definitions(tmp_path)
