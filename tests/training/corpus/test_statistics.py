from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from guard_training.corpus.rows import Row
from guard_training.corpus.statistics import labels_table, modality, statistics, steps, steps_table

PAPER = "# Task 1\n## Reasoning Step 1\nabcd\n## Reasoning Step 2: ef\n# Task 2\n## Reasoning Step 1\ngh\nij\n"


@pytest.mark.parametrize(
    ("rationale", "expected"),
    [
        (PAPER, ["abcd", "ef", "gh\nij"]),
        ("Step 1: one\nStep 2: two steps back", ["one", "two steps back"]),
        ("**Reasoning Step 1:** one\n\n**Reasoning Step 2:** two", ["one", "two"]),
        ("# Task 1\none line\n\nanother line", ["one line", "another line"]),
        ("## Reasoning Step 1\n\n## Reasoning Step 2\nonly this", ["only this"]),
        ("", []),
    ],
)
def test_steps_are_what_stands_under_their_headings(rationale: str, expected: list[str]) -> None:
    assert steps(rationale) == expected


@given(st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1), min_size=1, max_size=10))
def test_as_many_steps_are_counted_as_were_written(written: list[str]) -> None:
    assert steps("\n".join(f"## Reasoning Step {n}\n{step}" for n, step in enumerate(written, 1))) == written


ROWS = [
    Row("1", "a", "p", "harmful", "r", "unharmful", licence="MIT", rationale=PAPER),
    Row("2", "a", "p", "unharmful", licence="MIT"),
    Row("3", "b", "", "harmful", image=Path("x.png"), rationale="Step 1: abcdef"),
    Row("4", "b", "p", None, "r", None, image=Path("x.png")),
]


def test_modalities_and_steps_are_counted_as_in_the_papers_table() -> None:
    assert [modality(row) for row in ROWS] == ["text", "text", "image", "text-image"]
    found = statistics(ROWS).steps
    assert [(line.modality, line.samples, line.steps, line.mean_steps, line.mean_length) for line in found] == [
        ("text", 2, 3, 1.5, (4 + 2 + 5) / 3),
        ("image", 1, 1, 1.0, 6.0),
        ("text-image", 1, 0, 0.0, None),
        ("all", 4, 4, 1.0, (4 + 2 + 5 + 6) / 4),
    ]


def test_labels_are_counted_by_source_and_modality_on_both_sides() -> None:
    found = statistics(ROWS).labels
    assert [(line.source, line.modality, line.samples, line.request, line.response) for line in found] == [
        ("a", "text", 2, {"harmful": 1, "unharmful": 1}, {"unharmful": 1}),
        ("b", "image", 1, {"harmful": 1}, {}),
        ("b", "text-image", 1, {"none": 1}, {"none": 1}),
    ]
    assert [(line.rationales, line.licence) for line in found] == [(1, "MIT"), (1, ""), (0, "")]


def test_a_bracket_in_a_name_stands_in_the_table_as_it_is() -> None:
    console = Console(file=io.StringIO(), width=150)
    console.print(labels_table(statistics([Row("1", "set [/x]", "hi", "harmful", licence="CC [b]")])))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "set [/x]" in shown
    assert "CC [b]" in shown


def test_nothing_has_no_means() -> None:
    assert [(line.samples, line.mean_steps, line.mean_length) for line in statistics([]).steps] == [(0, None, None)] * 4


def test_the_tables_and_the_json_say_the_same() -> None:
    found = statistics(ROWS)
    console = Console(file=io.StringIO(), width=150)
    console.print(steps_table(found), labels_table(found))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines()]
    assert ["text", "2", "3", "1.50", "3.67"] in cells
    assert ["text-image", "1", "0", "0.00", "-"] in cells
    assert "1 / 1 / 0" in shown
    assert json.loads(json.dumps(found.to_json()))["steps"][3]["samples"] == 4
