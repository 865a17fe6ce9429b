"""The journal of a command that may be killed at any time."""

from __future__ import annotations

from pathlib import Path

import pytest

from guard_training.journal import Journal, JournalError, done_in


def test_a_journal_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal.jsonl"
    with Journal(path) as journal:
        journal.append({"id": "a", "value": 1})
        journal.append({"id": "b", "value": "ä"})
    with path.open("ab") as file:
        file.write(b'{"id": "c", "val')
    with Journal(path) as journal:
        assert journal.done == {"a", "b"}
        journal.append({"id": "c", "value": 3})
    with Journal(path) as journal:
        assert [line["value"] for line in journal] == [1, "ä", 3]


def test_a_journal_takes_any_text(tmp_path: Path) -> None:
    given = {"id": "half \ud800", "value": "\\ \u2028 \udcff\r\n\0"}
    for _ in range(2):
        with Journal(tmp_path / "journal.jsonl") as journal:
            journal.append(given)
    with Journal(tmp_path / "journal.jsonl") as journal:
        assert (list(journal), journal.done) == ([given, given], {"half \ud800"})


@pytest.mark.parametrize("line", ['{"value": 1}', "[1]", "no JSON", '{"id": 1}'])
def test_a_file_of_something_else_is_refused_and_left_as_it_was(tmp_path: Path, line: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(f'{{"id": "a"}}\n{line}\nwithout an end')
    before = path.read_bytes()
    for look in (Journal, done_in):
        with pytest.raises(JournalError, match=r"mine\.jsonl:2"):
            look(path)
    assert path.read_bytes() == before


def test_looking_at_a_journal_changes_nothing_of_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert done_in(path) == set()
    assert not path.exists()
    path.write_text('{"id": "a"}\n{"id": "b"')
    assert done_in(path) == {"a"}
    assert path.read_text().endswith('"b"')
