from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.types import Blob, Text, Usage, Verdict
from guard_training.cli import main, parser
from guard_training.corpus.conversation import conversation
from guard_training.corpus.rows import Row
from guard_training.evaluation.card import BEGIN, END, write_results
from guard_training.evaluation.measure import Asked, sample, summarise
from guard_training.nano.recipe import RecipeError, default_recipe, read_recipe, recipe, stages


def _verdict(request: str, response: str | None = None) -> Verdict:
    score = None if response is None else 0.5
    return Verdict(request, response, 0.5, score, "r", Usage(10, 20, 12), "nano", "abc")  # type: ignore[arg-type]


def _asked() -> list[Asked]:
    unparseable = GuardError(GuardErrorKind.UNPARSEABLE, "no verdict")
    return [
        Asked(Row("1", "locks", "p", "harmful"), _verdict("harmful"), 0.1),
        Asked(Row("2", "locks", "p", "harmful"), _verdict("unharmful"), 0.2),
        Asked(Row("3", "locks", "p", "unharmful"), unparseable, 0.3),
        Asked(Row("4", "bread", "p", None, "r", "unharmful"), _verdict("harmful", "unharmful"), 0.4),
    ]


def test_sources_and_sides_are_counted_apart_and_an_error_is_wrong() -> None:
    summary = summarise(_asked(), "nano")
    found = {(s["source"], s["side"]): s for s in summary["sources"]}
    assert set(found) == {("locks", "request"), ("bread", "response")}
    locks = found["locks", "request"]
    assert locks["recall"]["value"] == 0.5
    assert locks["false_positive_rate"]["value"] == 1.0
    assert locks["errors"] == 1
    assert locks["f1"]["value"] == pytest.approx(0.5)
    assert found["bread", "response"]["recall"] is None
    assert summary["format_compliance"]["value"] == 0.75
    assert summary["errors"] == {"unparseable": 1}
    assert summary["mean_reasoning_tokens"] == 12


def test_a_row_is_asked_about_as_the_gateway_would_see_it(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    asked = conversation(Row("1", "s", "hello", "unharmful", "hi", "unharmful", image=tmp_path / "a.png"))
    blob, text = asked.messages[0].parts
    assert isinstance(blob, Blob)
    assert blob.mime_type == "image/png"
    assert text == Text("hello")
    assert asked.answer is not None
    assert conversation(Row("1", "s", "hello", "unharmful", "hi", None)).answer is None


def test_a_limit_holds_for_every_source_and_draws_the_same_rows() -> None:
    rows = [Row(str(n), f"s{n % 2}", "p", "harmful") for n in range(40)]
    chosen = sample(rows, 5)
    assert [row.source for row in chosen] == ["s0"] * 5 + ["s1"] * 5
    assert chosen == sample(rows, 5)
    assert sample(rows, None) == [*rows[::2], *rows[1::2]]


def test_results_replace_what_stands_between_the_markers(tmp_path: Path) -> None:
    figures, card = tmp_path / "dev.json", tmp_path / "README.md"
    figures.write_text(json.dumps({"data": "dev.jsonl", "limit": None, **summarise(_asked(), "nano")}))
    card.write_text(f"# nano\n{BEGIN}\nold\n{END}\nend\n")
    assert main(["card", "--model", str(tmp_path), "--results", str(figures)]) == 0
    text = card.read_text()
    assert text.startswith(f"# nano\n{BEGIN}\n")
    assert text.endswith(f"{END}\nend\n")
    assert "old" not in text
    assert "| locks | request | 3 | 2 | 50.0 (9.5-90.5) |" in text
    card.write_text("# nano\n")
    with pytest.raises(ValueError, match="needs one line"):
        write_results(card, [figures])


def test_a_wrong_input_ends_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("seed: 1\nsede: 2\n")
    arguments = ["nano", "--data", str(tmp_path), "--output", str(tmp_path), "--recipe", str(tmp_path / "bad.yaml")]
    assert main(arguments) == 1
    assert "unknown key 'sede'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["nano", "evaluate", "card"])
def test_help_shows_how_to_call_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args([command, "--help"])
    assert "guard-train" in capsys.readouterr().out


def test_the_recipe_of_nano_is_whole_and_strict() -> None:
    whole = read_recipe(default_recipe())
    assert sum(whole.kind_shares.values()) == pytest.approx(1.0)
    assert [stage.seed for stage in stages(whole)] == [whole.seed + n for n in range(3)]
    assert all(sum(stage.kind_shares.values()) == pytest.approx(1.0) for stage in stages(whole))
    values = {name: getattr(whole, name) for name in whole.__slots__}
    with pytest.raises(RecipeError, match="batch must be a int"):
        recipe({**values, "batch": "many"})
    values.pop("layers")
    with pytest.raises(RecipeError, match="layers is missing"):
        recipe(values)
