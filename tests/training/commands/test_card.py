"""``guard-train card`` on what ``guard-train evaluate`` wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guard_training.evaluation.card import BEGIN, END
from tests.support.commands import call


def test_the_figures_of_evaluate_go_into_the_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": str(n), "source": "locks", "prompt": "p", "prompt_label": "harmful"} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = [{"id": str(n), "request_score": 0.4 * n} for n in range(3)]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    others = [{"id": str(n), "request": "harmful" if n else "unharmful"} for n in range(3)]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(line) + "\n" for line in others))
    figures = tmp_path / "dev.json"
    call("evaluate", "--data", tmp_path / "rows.jsonl", "--predictions", f"tfidf={tmp_path}/said.jsonl",
         "--predictions", f"words={tmp_path}/others.jsonl", "--json", figures)  # fmt: skip
    (tmp_path / "README.md").write_text(f"# guard\n{BEGIN}\nold\n{END}\n")
    call("card", "--model", tmp_path, "--results", figures)
    text = (tmp_path / "README.md").read_text()
    assert f"{tmp_path / 'README.md'}: the figures of dev.json" in capsys.readouterr().out
    assert "old" not in text
    assert "| locks | request | 3 | 3 | 33.3 (6.1-79.2) |" in text
    assert "| source | judged | tfidf | words |" in text
    assert "| mean over sources |  | 33.3 / - / - | 66.7 / - / - |" in text
    assert "| tfidf | " in text  # words gives no scores
