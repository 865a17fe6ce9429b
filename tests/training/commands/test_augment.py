"""``guard-train augment`` from file to file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.support.commands import call
from tests.support.rows import read_rows


def lines(path: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    (folder / "pictures").mkdir(parents=True)
    written = []
    for n in range(20):
        label = "harmful" if n % 2 else "unharmful"
        line = {"id": f"r{n}", "source": "made", "prompt": f"question {n}", "prompt_label": label, "licence": "CC0"}
        if n % 4 == 0:
            Image.new("RGB", (40, 30 + n), (n, 0, 0)).save(folder / "pictures" / f"{n}.png")
            line["image"] = f"pictures/{n}.png"
        written.append(json.dumps(line))
    written.insert(3, "not json")
    written.append(json.dumps({"id": "x", "source": "made", "prompt": "p", "prompt_label": None}))
    written.append(
        json.dumps({"id": "y", "source": "made", "prompt": "p", "prompt_label": "harmful", "image": "no.png"})
    )
    written.append(json.dumps({"id": "r1", "source": "made", "prompt": "p", "prompt_label": "harmful"}))
    whole = (folder / "pictures" / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    written.append(
        json.dumps({"id": "z", "source": "made", "prompt": "p", "prompt_label": "harmful", "image": "cut.png"})
    )
    (folder / "rows.jsonl").write_text("\n".join(written) + "\n")
    return folder / "rows.jsonl"


def test_rows_and_their_mixes_are_written_with_provenance_and_bad_rows_are_named(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "rl.jsonl"
    call(
        "augment", "--rows", rows, "--output", output, "--share", 0.5, "--layout", "side_by_side", "grid", "--gap", 0, 8
    )
    written = {line["id"]: line for line in lines(output)}
    mixes = {id: line for id, line in written.items() if "concatenation" in line}
    assert (len(written), len(mixes)) == (40, 20)
    by_id = {row.id: row for row in read_rows(output)}
    for id, line in mixes.items():
        first, second = (by_id[parent] for parent in line["concatenation"]["parents"])
        assert by_id[id].request == ("harmful" if "harmful" in (first.request, second.request) else "unharmful")
        assert first.prompt in by_id[id].prompt
        assert second.prompt in by_id[id].prompt
        assert by_id[id].licence == "CC0"
        with_image = bool(first.image or second.image)
        assert bool(by_id[id].image) == with_image == (line["concatenation"]["layout"] is not None)
    assert all(row.image is None or row.image.is_file() for row in by_id.values())
    shown = capsys.readouterr().out
    assert "5 rows left out" in shown
    for reason in (
        "rows.jsonl:4: not a labelled row",
        "rows.jsonl:22: x: no label",
        "rows.jsonl:23: y: its image no.png cannot",
        "rows.jsonl:24: r1: a second row",
        "rows.jsonl:25: z: its image cut.png cannot",
    ):
        assert reason in shown


def test_a_killed_run_ends_as_one_that_was_not(rows: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "a" / "rl.jsonl", tmp_path / "b" / "rl.jsonl"
    call("augment", "--rows", rows, "--output", whole)
    call("augment", "--rows", rows, "--output", cut)
    kept = cut.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(kept[:-3]) + kept[-3][:20])
    call("augment", "--rows", rows, "--output", cut)
    assert cut.read_bytes() == whole.read_bytes()
    assert {p.name for p in (cut.parent / "images").iterdir()} == {p.name for p in (whole.parent / "images").iterdir()}


def test_other_settings_do_not_go_on_with_an_output(rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "rl.jsonl"
    call("augment", "--rows", rows, "--output", output)
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        call("augment", "--rows", rows, "--output", output, "--seed", 1)
    rows.write_text(rows.read_text() + "\n")
    with pytest.raises(ValueError, match=r"other settings \(rows\)"):
        call("augment", "--rows", rows, "--output", output)


def test_held_out_rows_are_never_mixed(rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "rl.jsonl"
    call("augment", "--rows", rows, "--output", output, "--held-out", 0.3)
    validation = {row.id for row in read_rows(tmp_path / "rl.validation.jsonl")}
    assert 0 < len(validation) < 20
    parents = [parent for line in lines(output) for parent in line.get("concatenation", {}).get("parents", [])]
    assert parents
    assert validation.isdisjoint(parents)
    assert validation.isdisjoint(row.id for row in read_rows(output))


@pytest.mark.parametrize("wrong", [("--held-out", 1.5), ("--held-out", -0.1), ("--share", 1), ("--gap", -1)])
def test_settings_that_mean_nothing_are_refused_and_leave_no_file(
    rows: Path, tmp_path: Path, wrong: tuple[str, float]
) -> None:
    with pytest.raises(ValueError, match=r"lies between 0 and 1|0 or more"):
        call("augment", "--rows", rows, "--output", tmp_path / "out" / "rl.jsonl", *wrong)
    assert not (tmp_path / "out").exists()


def test_without_a_usable_row_the_reasons_are_given(rows: Path, tmp_path: Path) -> None:
    rows.write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match=r"no usable row; 1 rows left out:\n  rows\.jsonl:1: not a labelled row"):
        call("augment", "--rows", rows, "--output", tmp_path / "rl.jsonl")
    assert not list(tmp_path.glob("rl*"))
