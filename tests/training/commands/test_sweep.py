from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.support.commands import call
from tests.tiny_model import make_folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = [
        {"id": f"r{n}", "source": "made", "prompt": f"bread {n}", "prompt_label": "harmful" if n % 2 else "unharmful"}
        for n in range(4)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.slow
def test_a_sweep_from_rows_to_the_plot_and_again_without_work(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_folder(tmp_path / "guard")
    (model / "guard.json").write_text('{"max_new_tokens": 8}')
    value = yaml.safe_load(Path("training/recipes/grpo-nano.yaml").read_text())
    value |= dict(model=str(model), reader=False, rollout_prompts=2, update_prompts=1, group=2, batch_per_device=2,
                  max_new_tokens=5, prompt_tokens=700)  # fmt: skip
    value["alarms"] = dict(identical_max=2, distinct_ratio=0, format_min=-1, length_ratio=99, truncated_max=2)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(value))
    bad = rows.with_name("bad.jsonl")
    bad.write_text(rows.read_text() + "no row\n")
    arguments = ("--rows", bad, "--data", rows, "--recipe", recipe, "--output", tmp_path / "out")
    arguments = (*arguments, "--variants", "full", "image only")
    call("sweep", *arguments)
    said = " ".join(capsys.readouterr().out.split())
    assert "not trained: 0 usable rows" in said
    assert "1 rows left out: bad.jsonl:5:" in said
    done = json.loads((tmp_path / "out" / "ablations.json").read_text())["variants"]
    assert [(one["variant"], one["summary"] is None) for one in done] == [
        ("before RL", False), ("full", False), ("image only", True),
    ]  # fmt: skip
    made = (tmp_path / "out" / "full" / "model" / "model.safetensors").stat().st_mtime_ns
    call("sweep", *arguments)
    assert (tmp_path / "out" / "full" / "model" / "model.safetensors").stat().st_mtime_ns == made
    assert json.loads((tmp_path / "out" / "ablations.json").read_text())["variants"] == done


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--variants", "no banana"], "no banana; there are full"),
        (["--rows", "/nowhere"], "no such file"),
        (["--rows", "/dev/null"], "no such file"),
        (["--rows", "{bad}"], "no usable row to train on.*bad.jsonl:1"),
    ],
)
def test_mistakes_are_told_with_their_remedy(arguments: list[str], words: str, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("no row\n")
    arguments = [one.format(bad=tmp_path / "bad.jsonl") for one in arguments]
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){words}"):
        call("sweep", "--rows", rows, "--data", rows, "--output", tmp_path / "out", *arguments)
