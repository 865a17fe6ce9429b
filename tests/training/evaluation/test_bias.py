from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard_training.corpus.rows import Skipped
from guard_training.evaluation.bias import BiasError, agreement, compare, count, kappa, read_teacher
from guard_training.evaluation.outcomes import Outcome, write_outcomes
from tests.support.commands import call

_LABEL: dict[int, Any] = {0: "unharmful", 1: "harmful"}


def _outcome(id: str, truth: int | None, said: int | None, source: str = "locks") -> Outcome:
    label = None if truth is None else _LABEL[truth]
    error = "timeout" if said is None else None
    called = None if said is None else _LABEL[said]
    return Outcome(id, source, "text", label, None, called, error=error, model="nano", revision="abc")


def test_errors_that_the_teacher_makes_too_are_told_from_the_students_own() -> None:
    # (truth, teacher, student): 4 rows where the teacher is wrong, the student copies 3; 6 where it is right, 1 wrong.
    triples = [(1, 0, 0), (1, 0, 0), (0, 1, 1), (0, 1, 0)] + [(0, 0, 0)] * 3 + [(1, 1, 1)] * 2 + [(1, 1, 0)]
    counts = count([tuple(map(bool, triple)) for triple in triples])  # type: ignore[misc]
    assert counts.cells == (3, 0, 1, 1, 2, 0, 1, 2)
    assert (counts.copied.hits, counts.copied.total) == (3, 4)
    assert (counts.wrong_after_wrong.hits, counts.wrong_after_wrong.total) == (3, 4)
    assert (counts.wrong_after_right.hits, counts.wrong_after_right.total) == (1, 6)
    assert counts.total(truth=1) == 5
    assert counts.total(teacher=1, student=0) == 2


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans())))
def test_every_error_is_counted_once(triples: list[tuple[bool, bool, bool]]) -> None:
    counts = count(triples)
    errors = sum(truth != student for truth, _, student in triples)
    assert counts.copied.total == errors
    assert counts.wrong_after_right.hits + counts.wrong_after_wrong.hits == errors
    assert counts.wrong_after_right.total + counts.wrong_after_wrong.total == len(triples) == counts.rows


def test_kappa_agrees_with_the_worked_example_of_the_literature() -> None:
    # Fleiss, Levin and Paik: 50 grant applications, 20 yes by both, 15 no by both, 5 and 10 split; kappa 0.4.
    assert kappa(np.array([[15.0, 10.0, 5.0, 20.0]]))[0] == pytest.approx(0.4)
    assert kappa(np.array([[5.0, 0.0, 0.0, 5.0]]))[0] == pytest.approx(1.0)
    assert np.isnan(kappa(np.array([[9.0, 0.0, 0.0, 0.0]]))[0])


def test_kappa_has_an_interval_round_it_and_is_none_where_one_label_is_all_there_is() -> None:
    counts = count([(True, True, True)] * 20 + [(False, False, False)] * 15 + [(False, True, False)] * 15)
    found = agreement(counts, "teacher", "student")
    low, high = found["kappa"]["interval"]
    assert low < found["kappa"]["value"] < high
    assert found["agreement"]["value"] == pytest.approx(0.7)
    assert agreement(count([(True, True, True)] * 5), "truth", "teacher")["kappa"] is None


def test_sources_stand_apart_and_what_cannot_be_compared_is_counted() -> None:
    outcomes = [
        _outcome("1", 1, 1),
        _outcome("2", 0, 1, "bread"),
        _outcome("3", 1, None),
        _outcome("4", 1, 1),
        _outcome("5", None, 1),
    ]
    teacher: Any = {"1": {"request": "harmful"}, "2": {"request": "harmful"}, "3": {"request": "harmful"}}
    entries, left_out = compare(outcomes, teacher)
    assert left_out == {"guard errors": 1, "without the teacher's label": 1}
    assert [(entry["source"], entry["rows"]) for entry in entries] == [("bread", 1), ("locks", 1), ("all", 2)]
    assert entries[0]["copied_errors"]["value"] == 1.0
    assert entries[1]["copied_errors"] is None


def test_a_teacher_is_read_in_each_of_its_forms_and_bad_lines_are_named(tmp_path: Path) -> None:
    file, skipped = tmp_path / "teacher.jsonl", Skipped()
    lines = [
        {"id": "1", "request": "harmful"},
        {"id": "2", "source": "s", "prompt_label": None, "response_label": "unharmful"},
        {"id": "3", "request": None, "error": "timeout"},
        {"id": "4", "request": "bad"},
        {"request": "harmful"},
        {"id": "6"},
        ["7"],
        {"id": 8, "request": "harmful"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\nno\n" + "[" * 100_000)
    assert read_teacher(file, skipped) == {
        "1": {"request": "harmful"}, "2": {"response": "unharmful"}, "3": {}, "8": {"request": "harmful"},
    }  # fmt: skip
    assert [reason.split(": ")[0] for reason in skipped.reasons] == [f"teacher.jsonl:{n}" for n in (4, 5, 6, 7, 10, 11)]


def test_the_command_compares_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes, teacher, out = (tmp_path / name for name in ("nano.jsonl", "teacher.jsonl", "new/bias.json"))
    write_outcomes(outcomes, [_outcome(str(n), n % 2, int(n > 4), "set [/x]") for n in range(10)])
    outcomes.write_text(outcomes.read_text() + "no\n")
    teacher.write_text("".join(f'{{"id": "{n}", "request": "{_LABEL[int(n > 4)]}"}}\n' for n in range(10)) + "no\n")
    call("bias", "--outcomes", outcomes, "--teacher", teacher, "--json", out, "--report", tmp_path / "b.html")
    page = (tmp_path / "b.html").read_text()
    assert "wrong, teacher wrong" in page
    assert page.count("<img") == 1
    (entry,) = json.loads(out.read_text())["sources"]
    assert entry["copied_errors"]["value"] == 1.0
    assert entry["student_and_teacher"]["kappa"]["value"] == 1.0
    assert sum(map(sum, entry["table"])) == 10
    printed = capsys.readouterr().out
    assert "set [/x]" in printed
    assert "teacher.jsonl:11" in printed
    assert "nano.jsonl:11" in printed


def test_files_without_a_common_row_are_said_so(tmp_path: Path) -> None:
    outcomes, teacher = tmp_path / "nano.jsonl", tmp_path / "teacher.jsonl"
    write_outcomes(outcomes, [_outcome("1", 1, 1)])
    teacher.write_text('{"id": "2", "request": "harmful"}\n')
    with pytest.raises(BiasError, match="share no row"):
        call("bias", "--outcomes", outcomes, "--teacher", teacher)
