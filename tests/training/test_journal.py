"""The journal of a command that may be killed at any time."""

from __future__ import annotations

from pathlib import Path

from guard_training.journal import Journal


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
