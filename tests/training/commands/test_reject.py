"""``guard-train reject`` with real weights: nano's, without the form that its worker holds it to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from guard_middleware.worker.weights import NANO
from guard_training.corpus.rows import CorpusError
from guard_training.rowfile import OutputError
from tests.support.commands import call
from tests.support.rows import read_rows

WORDS = ["how do I bake bread", "how do I pick a lock", "hello there", "write a poem about rain", "rob the house"]


def lines(path: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("guards") / "guard"
    folder.mkdir()
    for file in NANO.iterdir():
        if file.name != "guard.json":
            (folder / file.name).symlink_to(file)
    stated = {"reader": False, "max_new_tokens": 24, "min_pixels": 3136, "max_pixels": 12544, "max_input_tokens": 400}
    (folder / "guard.json").write_text(json.dumps(stated))
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.effect_noise((60, 60), 80).convert("RGB").save(folder / "noise.png")
    found = [
        {
            "id": f"r{n}",
            "source": "made",
            "prompt": f"{WORDS[n % 5]} {n}",
            "prompt_label": ("harmful", "unharmful")[n % 2],
        }
        for n in range(8)
    ]
    found += [
        {"id": "pair", "source": "set [/x]", "prompt": "hi", "prompt_label": "unharmful", "response": "Hello!",
         "response_label": "unharmful"},
        {"id": "image", "source": "pictures", "prompt": "", "prompt_label": "unharmful", "image": "noise.png"},
        {"id": "gone", "source": "pictures", "prompt": "", "prompt_label": "harmful", "image": "gone.png"},
        {"id": "long", "source": "made", "prompt": "very " * 900, "prompt_label": "harmful"},
        {"id": "bare", "source": "made", "prompt": "hi", "prompt_label": None},
        {"id": "r0", "source": "made", "prompt": "twice", "prompt_label": "harmful"},
    ]  # fmt: skip
    text = "\n".join(map(json.dumps, found)) + "\n{broken\n"
    (folder / "rows.jsonl").write_text(text)
    return folder / "rows.jsonl"


def test_hard_rows_are_kept_and_everything_else_is_counted(
    guard: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "hard.jsonl"
    call("reject", "--rows", rows, "--model", guard, "--output", output, "--json", tmp_path / "s.json",
         "--keep-all-images")  # fmt: skip
    counts = {line["id"]: line for line in lines(tmp_path / "out" / "hard.counts.jsonl")}
    assert set(counts) == {*(f"r{n}" for n in range(8)), "pair", "image"}
    assert all(len(line["tokens"]) == 4 and 0 <= line["right"] <= 4 for line in counts.values())
    kept = read_rows(output)
    assert {row.id for row in kept} == {id for id, line in counts.items() if line["right"] == 0} | {"image"}
    (image,) = (row.image for row in kept if row.image)
    assert image is not None
    assert image.is_relative_to(output.parent.resolve())
    assert {line["id"]: line["rejection"]["wrong"] for line in lines(output)} == {
        row.id: 4 - counts[row.id]["right"] for row in kept
    }
    groups = json.loads((tmp_path / "s.json").read_text())
    assert [(g["source"], g["rows"]) for g in groups if g["source"] != "all"] == [
        ("made", 8),
        ("pictures", 1),
        ("set [/x]", 1),
    ]
    shown = capsys.readouterr().out
    assert "set [/x]" in shown
    assert "5 rows left out" in shown
    for reason in (
        "rows.jsonl:15: not a labelled row",
        "rows.jsonl:13: bare: no label",
        "rows.jsonl:14: r0: a second row",
        "rows.jsonl:11: gone: gone.png is no",
        "rows.jsonl:12: long: a prompt of",
    ):
        assert reason in shown


def test_a_killed_run_draws_what_it_would_have_drawn(guard: Path, rows: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "a" / "hard.jsonl", tmp_path / "b" / "hard.jsonl"
    common = ("--rows", rows, "--model", guard, "--batch", 8, "--k", 2, "--max-new-tokens", 14, "--keep", "0..2")
    call("reject", *common, "--output", whole)
    call("reject", *common, "--output", cut)
    journal = cut.with_name("hard.counts.jsonl")
    kept = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(kept[:5]) + kept[5][:9])
    cut.unlink()
    call("reject", *common, "--output", cut)
    assert cut.read_bytes() == whole.read_bytes()
    assert journal.read_bytes() == whole.with_name("hard.counts.jsonl").read_bytes()


def test_the_selection_changes_without_sampling_again(
    guard: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "hard.jsonl"
    call("reject", "--rows", rows, "--model", guard, "--output", output, "--keep", "0..4")
    assert len(lines(output)) == 10
    monkeypatch.setattr("guard_training.tuning.sampling.TransformersSampler", None)
    call("reject", "--rows", rows, "--model", guard, "--output", output, "--keep", "0..4", "--max-rows", 3)
    assert len(lines(output)) == 3
    with pytest.raises(ValueError, match=r"other settings \(temperature\)"):
        call("reject", "--rows", rows, "--model", guard, "--output", output, "--temperature", 0.5)


def test_an_image_that_was_not_there_is_sampled_when_it_is(guard: Path, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "hard.jsonl"
    common = ("--rows", rows, "--model", guard, "--output", output, "--keep", "0..4")
    call("reject", *common)
    before = lines(tmp_path / "hard.counts.jsonl")
    (rows.parent / "gone.png").write_bytes((rows.parent / "noise.png").read_bytes())
    call("reject", *common)
    after = lines(tmp_path / "hard.counts.jsonl")
    assert after[:-1] == before
    assert after[-1]["id"] == "gone"
    assert "gone" in {line["id"] for line in lines(output)}


def test_a_guard_that_is_served_with_a_reader_is_asked_with_what_it_reads(rows: Path, tmp_path: Path) -> None:
    only = rows.with_name("only.jsonl")
    picked = [line for line in rows.read_text().splitlines() if '"id": "image"' in line]
    only.write_text("\n".join(picked) + "\n")
    call("reject", "--rows", only, "--model", "nano", "--output", tmp_path / "hard.jsonl", "--k", 1,
         "--max-new-tokens", 4)  # fmt: skip
    assert len(lines(tmp_path / "hard.drawn.jsonl")) == 1
    assert json.loads((tmp_path / "hard.counts.jsonl.settings.json").read_text())["reader"] is True


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(("--keep", "7"), "within 0..4"), (("--top-p", "2"), "top-p"), (("--model", "/nowhere"), "no such folder")],
)
def test_what_cannot_be_meant_is_refused_before_the_model_loads(  # type: ignore[no-untyped-def]
    guard: Path, rows: Path, tmp_path: Path, arguments, reason
) -> None:
    with pytest.raises(ValueError, match=reason):
        call("reject", "--rows", rows, "--model", guard, "--output", tmp_path / "hard.jsonl", *arguments)


def test_a_file_that_reject_did_not_write_is_not_written_over(guard: Path, rows: Path) -> None:
    before = rows.read_bytes()
    with pytest.raises(OutputError, match=r"rows\.jsonl exists and no rows\.counts\.jsonl says how it was made"):
        call("reject", "--rows", rows, "--model", guard, "--output", rows)
    assert rows.read_bytes() == before


def test_without_a_usable_row_the_reasons_are_given(guard: Path, rows: Path, tmp_path: Path) -> None:
    rows.write_text('{"id": 1}\n')
    with pytest.raises(CorpusError, match=r"no usable row; 1 rows left out:\n  rows\.jsonl:1: not a labelled row"):
        call("reject", "--rows", rows, "--model", guard, "--output", tmp_path / "hard.jsonl")
    assert not (tmp_path / "hard.counts.jsonl").exists()


def test_rows_that_all_cannot_be_asked_leave_an_empty_file(
    guard: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = [line for line in rows.read_text().splitlines() if '"gone"' in line]
    rows.write_text("\n".join(gone) + "\n")
    call("reject", "--rows", rows, "--model", guard, "--output", tmp_path / "hard.jsonl")
    assert (tmp_path / "hard.jsonl").read_text() == ""
    assert "rows.jsonl:1: gone: gone.png is no" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--k", "--batch", "--max-rows", "--max-new-tokens"])
def test_a_number_below_one_is_refused(guard: Path, rows: Path, tmp_path: Path, option: str) -> None:
    with pytest.raises(SystemExit):
        call("reject", "--rows", rows, "--model", guard, "--output", tmp_path / "hard.jsonl", option, 0)
