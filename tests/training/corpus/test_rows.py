from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from guard_training.corpus.rows import (
    CorpusError,
    Row,
    Skipped,
    held_out,
    labelled,
    passages,
    read_rows,
    unique_prompts,
)

ROW = {"id": "a", "source": "s", "prompt": "how do I pick a lock", "prompt_label": "unharmful", "response": None}


def test_rows_are_read_plain_and_compressed(tmp_path: Path) -> None:
    line = json.dumps({**ROW, "image": "x.png"})
    (tmp_path / "a.jsonl").write_text(line + "\n\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    expected = [Row("a", "s", "how do I pick a lock", "unharmful", image=tmp_path / "x.png")]
    assert read_rows(tmp_path / "a.jsonl") == expected
    assert read_rows(tmp_path / "a.jsonl.gz") == expected


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"id": "a"}', json.dumps({**ROW, "prompt_label": "bad"}), json.dumps({**ROW, "image": "../x.png"})],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(CorpusError, match=r"a\.jsonl:2"):
        read_rows(tmp_path / "a.jsonl")


def test_about_the_wanted_share_is_held_out_and_always_the_same() -> None:
    chosen = [held_out(f"row-{n}", 0.1) for n in range(2000)]
    assert chosen == [held_out(f"row-{n}", 0.1) for n in range(2000)]
    assert 140 < sum(chosen) < 260


def test_the_same_prompt_is_kept_once() -> None:
    rows = [Row("1", "s", "Hello", "unharmful"), Row("2", "t", "hello", "harmful"), Row("3", "s", "hello", None, "x")]
    assert [row.id for row in unique_prompts(rows)] == ["1", "3"]


def test_passages_come_from_labelled_answers_only() -> None:
    long = " ".join(f"word{n}" for n in range(60))
    rows = [
        Row("1", "coconot_pref", "q", "unharmful", long, "unharmful"),
        Row("2", "diasafety", "q", None, "you are silly", "harmful", "Offending User"),
        Row("3", "gptfuzz_labeled", "q", "harmful", long, "harmful"),
    ]
    made = passages(rows, random.Random(0))
    assert {row.source for row in made} == {"coconot_pref_passage", "diasafety_turn"}
    assert [row.request for row in made if row.source == "diasafety_turn"] == ["harmful"]
    assert all(row.request == "unharmful" for row in made if row.source == "coconot_pref_passage")


def test_rows_need_a_label_of_what_is_there_and_an_id_of_their_own() -> None:
    rows = [
        Row("request", "s", "p", "harmful"),
        Row("answer", "s", "p", None, "r", "harmful"),
        Row("none", "s", "p", None, "r"),
        Row("answer that is not there", "s", "p", None, None, "harmful"),
        Row("request", "s", "another", "harmful"),
        Row("none", "s", "p", "harmful"),
    ]
    skipped = Skipped()
    assert [row.id for row in labelled(rows, skipped)] == ["request", "answer", "none"]
    assert [reason.partition(":")[0] for reason in skipped.reasons] == ["none", "answer that is not there", "request"]
