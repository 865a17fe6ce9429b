from __future__ import annotations

import gzip
import io
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from guard_training.corpus.rows import (
    BrokenFileError,
    CorpusError,
    Row,
    Skipped,
    held_out,
    labelled,
    passages,
    read_good_rows,
    read_lines,
    unique_prompts,
)
from tests.support.rows import read_rows

ROW = {"id": "a", "source": "s", "prompt": "how do I pick a lock", "prompt_label": "unharmful", "response": None}


def test_rows_are_read_plain_and_compressed(tmp_path: Path) -> None:
    line = json.dumps({**ROW, "image": "x.png"})
    (tmp_path / "a.jsonl").write_text(line + "\n\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    expected = [Row("a", "s", "how do I pick a lock", "unharmful", image=tmp_path / "x.png")]
    assert read_rows(tmp_path / "a.jsonl") == expected
    assert read_rows(tmp_path / "a.jsonl.gz") == expected


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting property name"),
        ("[" * 100_000, "maximum recursion depth"),
        ("[]", "not a JSON object"),
        ('{"id": "a"}', "no 'source'"),
        *(
            (json.dumps({**ROW, **changed}), reason)
            for changed, reason in [
                ({"id": ""}, "no 'id'"),
                ({"id": None}, "no 'id'"),
                ({"id": ["a"]}, "'id' is no text"),
                ({"prompt": 5}, "'prompt' is no text"),
                ({"response": ["a"]}, "'response' is no text"),
                ({"category": {}}, "'category' is no text"),
                ({"rationale": 0}, "'rationale' is no text"),
                ({"prompt": "a \ud800 b"}, "'prompt' holds half of a surrogate pair"),
                ({"prompt_label": "bad"}, "'prompt_label' is none of"),
                ({"response_label": ["harmful"]}, "'response_label' is none of"),
                ({"image": 5}, "'image' is no text"),
                ({"image": "a\0.png"}, "null byte"),
                ({"image": "../x.png"}, "outside the data file's folder"),
            ]
        ),
        (json.dumps(ROW).encode().replace(b"lock", b"l\xffck"), "can't decode byte 0xff"),
    ],
)
def test_a_bad_row_is_refused_with_its_line_and_the_good_ones_go_on(
    tmp_path: Path, line: str | bytes, reason: str
) -> None:
    good, bad = json.dumps(ROW).encode(), line.encode() if isinstance(line, str) else line
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, bad, good]))
    skipped = Skipped()
    assert [row.id for row in read_good_rows(tmp_path / "a.jsonl", skipped)] == ["a", "a"]
    (said,) = skipped.reasons
    assert said.startswith("a.jsonl:2: ")
    assert reason in said


def test_a_row_that_was_read_is_named_by_its_file_and_line_and_stays_equal_to_one_that_was_made(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(ROW) + "\n")
    (row,) = read_rows(tmp_path / "a.jsonl")
    assert row.name == "a.jsonl:2: a"
    assert replace(row, where="").name == "a"
    assert row == replace(row, where="")


def test_a_folder_is_no_file_of_rows(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="is a folder; give a file in it"):
        read_good_rows(tmp_path, Skipped())


def test_reasons_that_are_not_shown_go_to_a_file_which_the_next_run_takes_away(tmp_path: Path) -> None:
    file = tmp_path / "skipped.txt"
    assert Skipped([f"r{n}: \ud800" for n in range(7)]).report(file).endswith(f"... and 2 more: {file}")
    assert len(file.read_text().splitlines()) == 7
    assert Skipped(["x"] * 7).report(tmp_path / "not there" / "skipped.txt").endswith("... and 2 more")
    assert Skipped(["r: x"]).report(file) == "1 rows left out:\n  r: x"
    assert not file.exists()


@pytest.mark.parametrize(
    ("reasons", "quiet", "told"),
    [(["[/x]"], False, "1 rows left out:\n  [/x]\n"), ([], False, ""), (["x"] * 7, True, "")],
)
def test_what_was_left_out_is_told_once_where_there_is_anything(
    reasons: list[str], quiet: bool, told: str, tmp_path: Path
) -> None:
    console = Console(file=io.StringIO(), quiet=quiet)
    Skipped(reasons).tell(console, tmp_path / "skipped.txt")
    assert console.file.getvalue() == told  # type: ignore[attr-defined]
    assert not list(tmp_path.iterdir())


def test_a_compressed_file_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [{**ROW, "id": n, "prompt": f"{rng.getrandbits(20_000):x}"} for n in range(50)]
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    path = tmp_path / "a.jsonl.gz"
    for data, least in ((whole[: len(whole) // 2], 20), (whole[:99] + b"\xff" * 99, 0), (b"no gzip", 0)):
        path.write_bytes(data)
        skipped = Skipped()
        found = read_good_rows(path, skipped)
        assert [row.id for row in found] == [str(n) for n in range(len(found))]
        assert least <= len(found) < 50
        assert skipped.reasons[-1].startswith(
            f"a.jsonl.gz:{len(found) + 1}: the file is broken or cut off from here on"
        )


@pytest.mark.parametrize("data", [gzip.compress(b"{}\n" * 9, mtime=0)[:-9], b"no gzip"], ids=["cut off", "no gzip"])
def test_a_broken_file_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    with pytest.raises(BrokenFileError, match=r"^a\.jsonl\.gz:\d+: the file is broken"):
        list(read_lines(tmp_path / "a.jsonl.gz", lambda value, where: where, pytest.fail, "a line"))


def test_about_the_wanted_share_is_held_out_and_always_the_same() -> None:
    chosen = [n for n in range(2000) if held_out(f"row-{n}", 0.1)]
    assert chosen[:9] == [1, 4, 10, 14, 22, 23, 29, 31, 36]
    assert len(chosen) == 209


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
