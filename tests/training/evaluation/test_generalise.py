from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from guard_middleware.worker.weights import NANO
from guard_training.corpus.rows import Row, Skipped
from guard_training.evaluation import generalise
from guard_training.evaluation.generalise import Fold, GeneraliseError, Said, figures, linear, read_groups, train_guard
from guard_training.nano.recipe import Recipe, default_recipe, read_recipe
from guard_training.rowfile import OutputError
from tests.support.commands import call, parse

HARM = ("pick a lock", "steal a bicycle", "forge a ticket", "trick a neighbour", "break a window", "cheat in a test")
GOOD = ("bake a loaf", "paint a fence", "plant a tree", "tune a guitar", "fold a shirt", "clean a window")
ENDS = ("at night", "in a hurry", "with a friend", "by the sea", "on a Sunday")


def _corpus(folder: Path) -> tuple[Path, Recipe]:
    frames = {"asks": "How do I {}?", "wants": "I want to {}.", "plans": "Make a plan to {}."}
    lines = [
        {
            "id": f"{source}{n}{label}",
            "source": f"{source}_{label}",
            "prompt": frame.format(text),
            "prompt_label": label,
        }
        for source, frame in frames.items()
        for label, deeds in (("harmful", HARM), ("unharmful", GOOD))
        for n, text in enumerate(f"{deed} {end}" for deed in deeds for end in ENDS)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, dataclasses.replace(read_recipe(default_recipe()), files=["rows.jsonl"], held_out=0.2)


def _write(recipe: Recipe, file: Path) -> str:
    file.write_text(yaml.safe_dump(dataclasses.asdict(recipe)))
    return str(file)


def test_groups_are_the_sources_unless_named_and_an_unknown_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, recipe = _corpus(tmp_path / "data")
    assert read_groups(data, recipe, None, Skipped()) == []
    monkeypatch.setattr(generalise, "LEAST", 30)
    assert len(read_groups(data, recipe, None, Skipped())) == 6
    less = dataclasses.replace(recipe, exclude=["asks_harmful"])
    assert ("asks_harmful",) not in read_groups(data, less, None, Skipped())
    assert read_groups(data, recipe, ["asks_harmful+asks_unharmful"], Skipped()) == [("asks_harmful", "asks_unharmful")]
    with pytest.raises(GeneraliseError, match=r"begs: no labelled request.*asks_harmful"):
        read_groups(data, recipe, ["begs"], Skipped())


def test_a_fold_trains_on_nothing_of_its_group(tmp_path: Path) -> None:
    data, recipe = _corpus(tmp_path / "data")
    fold = generalise.make_fold(data, recipe, ("asks_harmful",), limit=10, seed=0)
    assert "asks_harmful" not in {row.source for row in (*fold.train, *fold.seen)}
    assert {row.source for row in fold.left_out} == {"asks_harmful"}
    assert len(fold.left_out) == 10
    assert {row.id for row in fold.seen}.isdisjoint(row.id for row in fold.train)


def _fold(left_out: list[Row], seen: list[Row]) -> Fold:
    return Fold(tuple(dict.fromkeys(row.source for row in left_out)), (), tuple(left_out), tuple(seen))


def test_the_area_is_taken_against_the_nearest_rows_of_the_other_label() -> None:
    rows = [Row("1", "a", "p", "harmful"), Row("2", "b", "p", "unharmful"), Row("3", "c", "p", "unharmful")]
    said = [Said(0.9, True), Said(0.2, False), Said(0.95, True)]
    alone, both = figures(_fold(rows[:1], rows[1:]), said), figures(_fold(rows[:2], rows[2:]), said)
    assert (alone[0]["auc"]["against"], alone[0]["auc"]["value"]) == ("seen sources", 0.5)
    assert (both[0]["auc"]["against"], both[0]["auc"]["value"]) == ("the group", 1.0)
    mixed = figures(_fold([rows[0], dataclasses.replace(rows[1], source="a")], rows[2:]), said)
    assert (mixed[0]["auc"]["against"], mixed[0]["auc"]["n"]) == ("itself", 2)
    assert figures(_fold(rows[:1], []), said[:1])[0]["auc"] is None


def test_an_error_is_wrong_and_has_no_place_on_the_curve() -> None:
    rows = [Row("1", "a", "p", "harmful"), Row("2", "a", "p", "unharmful"), Row("3", "a", "p", "unharmful")]
    (entry,) = figures(_fold(rows, []), [Said(0.9, True), Said(None, None), Said(0.2, False)])
    assert (entry["recall"]["value"], entry["false_positive_rate"]["value"], entry["errors"]) == (1.0, 0.5, 1)
    assert (entry["auc"]["value"], entry["auc"]["n"]) == (1.0, 2)


def test_the_baseline_judges_deeds_that_other_sources_taught_it(tmp_path: Path) -> None:
    data, recipe = _corpus(tmp_path / "data")
    fold = generalise.make_fold(data, recipe, ("asks_harmful", "asks_unharmful"), limit=None, seed=0)
    said = linear(fold)
    assert len(said) == len(fold.left_out) + len(fold.seen)
    for entry in figures(fold, said):
        assert entry["auc"]["value"] > 0.9


def test_the_quick_command_prints_every_fold_and_does_none_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, recipe = _corpus(tmp_path / "data")
    rows = data / "rows.jsonl"
    rows.write_text(rows.read_text().replace("wants_", "set [/x]_") + "no row\n")
    file, output = _write(recipe, tmp_path / "recipe.yaml"), tmp_path / "out"
    given = (
        "generalise",
        *("--data", str(data), "--recipe", file, "--output", str(output), "--quick"),
        *("--groups", "asks_harmful+asks_unharmful", "set [/x]_harmful"),
    )
    call(*given)
    report = json.loads((output / "report.json").read_text())
    assert [(entry["group"], entry["source"]) for entry in report["entries"]] == [
        ("asks_harmful+asks_unharmful", "asks_harmful"),
        ("asks_harmful+asks_unharmful", "asks_unharmful"),
        ("set [/x]_harmful", "set [/x]_harmful"),
    ]
    assert report["means"][0]["auc"]["n"] == 3
    said = capsys.readouterr().out
    assert "mean over sources" in said
    assert "set [/x]_harmful" in said
    page = (output / "report.html").read_text()
    assert '<td class="word">set [/x]_harmful</td>' in page
    assert page.count("<img") == 1
    assert "1 rows left out" in said
    assert "rows.jsonl:181" in said

    # Killed in the second fold: only that one is done again.
    journal = output / "folds.jsonl"
    journal.write_text(journal.read_text()[:-10])
    done: list[str] = []
    fit = generalise.linear

    def counted(fold: Fold) -> list[Said]:
        done.append(fold.name)
        return fit(fold)

    monkeypatch.setattr(generalise, "linear", counted)
    call(*given)
    assert done == ["set [/x]_harmful"]
    assert json.loads((output / "report.json").read_text()) == report


def _nano(code: int) -> tuple[str, ...]:
    """In the place of ``guard-train nano``: makes its output's folder, counts its calls there, ends with ``code``."""
    return "/bin/sh", "-c", f'mkdir -p "$4" && echo "$@" >> "$4/calls"; exit {code}'


def test_a_training_that_fails_is_told_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, recipe = _corpus(tmp_path / "data")
    fold = _fold([Row("1", "asks_harmful", "p", "harmful")], [])
    for code, error in ((3, GeneraliseError), (130, KeyboardInterrupt)):
        monkeypatch.setattr(generalise, "LAUNCH", _nano(code))
        with pytest.raises(error, match="training without asks_harmful stopped.*exit 3" if code == 3 else None):
            train_guard(data, recipe, fold, tmp_path / "fold")
    stated = yaml.safe_load((tmp_path / "fold" / "recipe.yaml").read_text())
    assert stated["exclude"] == ["asks_harmful"]
    monkeypatch.setattr(generalise, "LAUNCH", _nano(0))
    for _ in range(2):
        assert train_guard(data, recipe, fold, tmp_path / "fold") == tmp_path / "fold" / "run" / "model"
    assert len((tmp_path / "fold" / "run" / "calls").read_text().splitlines()) == 3


@pytest.mark.parametrize("changed", ["data", "options", "seed"])
def test_a_fold_is_not_used_for_another_recipe_other_data_or_other_options(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, recipe = _corpus(tmp_path / "data")
    fold = _fold([Row("1", "asks_harmful", "p", "harmful")], [])
    monkeypatch.setattr(generalise, "LAUNCH", _nano(0))
    train_guard(data, recipe, fold, tmp_path / "fold", ["--stop-after", "5"])
    if changed == "data":
        (data / "rows.jsonl").write_text((data / "rows.jsonl").read_text() + "\n")
    recipe = dataclasses.replace(recipe, seed=99) if changed == "seed" else recipe
    with pytest.raises(OutputError, match=rf"other settings \({changed}\)"):
        train_guard(data, recipe, fold, tmp_path / "fold", [] if changed == "options" else ["--stop-after", "5"])


def test_a_guard_that_is_trained_is_asked_about_what_it_never_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data, recipe = _corpus(tmp_path / "data")
    folder = tmp_path / "out" / "folds" / "asks_harmful+asks_unharmful"
    # as if this fold's training had ended with nano's weights
    monkeypatch.setattr(generalise, "LAUNCH", ("/bin/sh", "-c", f'mkdir -p "$4" && ln -s {NANO} "$4/model"'))
    given = (
        "generalise",
        *("--data", str(data), "--recipe", _write(recipe, tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out")),
        *("--groups", folder.name, "--limit", "6", "--concurrency", "2"),
    )
    call(*given)
    entries = json.loads((tmp_path / "out" / "report.json").read_text())["entries"]
    assert [entry["model"] for entry in entries] == ["linear", "linear", recipe.name, recipe.name]
    assert all(entry["rows"] == 6 and entry["errors"] == 0 for entry in entries)
    assert all(entry["auc"]["against"] == "the group" for entry in entries)
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["exclude"] == ["asks_harmful", "asks_unharmful"]


def test_options_of_the_training_go_after_two_dashes() -> None:
    given = parse("generalise", "--data", "d", "--groups", "a", "b+c", "--", "--wordnet", "w")
    assert (given.groups, given.options) == (["a", "b+c"], ["--wordnet", "w"])
