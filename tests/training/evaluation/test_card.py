from __future__ import annotations

import json
from pathlib import Path

import pytest

from guard_training.evaluation.benchmarks import paper_table
from guard_training.evaluation.card import BEGIN, END, results, write_results
from guard_training.evaluation.metrics import summarise
from guard_training.evaluation.outcomes import Outcome

OUTCOMES = [
    Outcome("1", "locks", "text", "harmful", None, "harmful", request_score=0.9),
    Outcome("2", "locks", "text", "harmful", None, "unharmful", request_score=0.4),
    Outcome("3", "locks", "text", "unharmful", None, error="unparseable"),
    Outcome("4", "locks", "text", "unharmful", None, "unharmful", request_score=0.1),
    Outcome("5", "ToxicChat", "text", "harmful", None, "harmful", request_score=0.8),
]


def _figures(path: Path) -> Path:
    summary = summarise(OUTCOMES, model="nano", revision="abc")
    summary["benchmarks"] = paper_table(OUTCOMES, "strict")
    path.write_text(json.dumps({"data": "dev.jsonl", "limit": 5, **summary}))
    return path


def test_results_replace_what_stands_between_the_markers(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(f"# nano\n{BEGIN}\nold\n{END}\nend\n")
    write_results(card, [_figures(tmp_path / "dev.json")])
    text = card.read_text()
    assert text.startswith(f"# nano\n{BEGIN}\n")
    assert text.endswith(f"{END}\nend\n")
    assert "old" not in text
    assert "`dev.jsonl` (at most 5 rows of a source), revision `abc`" in text
    assert "| locks | request | 4 | 2 | 50.0 (9.5-90.5) | 50.0 (9.5-90.5) |" in text
    assert "guard errors: unparseable 1" in text
    assert "recall at fixed false positives" in text
    assert "| GuardReasoner-VL 3B (paper) | 74.45 |" in text
    write_results(card, [tmp_path / "dev.json"])
    assert card.read_text() == text


def test_every_line_of_a_table_has_as_many_cells_as_its_head(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(f"{BEGIN}\n{END}\n")
    write_results(card, [_figures(tmp_path / "dev.json")])
    for table in card.read_text().split("\n\n"):
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


def test_another_model_of_the_same_name_stands_beside_it(tmp_path: Path) -> None:
    summary = {"data": "dev.jsonl", **summarise(OUTCOMES, model="nano", revision="new"), "benchmarks": None}
    other = {**summarise(OUTCOMES[:2], model="nano", revision="old"), "benchmarks": None}
    assert "| source | judged | nano new | nano |" in results({**summary, "others": {"nano": other}})
    assert "| source | judged | nano" not in results({**summary, "others": {}})


@pytest.mark.parametrize("text", ["# nano\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{BEGIN}\n{END}\n"])
def test_a_card_without_its_markers_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match="needs one line"):
        write_results(tmp_path / "README.md", [_figures(tmp_path / "dev.json")])


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"data": "a", "revision": "b"}'])
def test_a_file_that_holds_no_figures_is_refused_and_the_card_stays(tmp_path: Path, text: str) -> None:
    (tmp_path / "old.json").write_text(text)
    (tmp_path / "README.md").write_text(f"{BEGIN}\nold\n{END}\n")
    with pytest.raises(ValueError, match=r"old\.json: not the figures of this version"):
        write_results(tmp_path / "README.md", [tmp_path / "old.json"])
    assert "old" in (tmp_path / "README.md").read_text()
