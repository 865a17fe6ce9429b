from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from guard_middleware.worker.weights import load
from guard_training.corpus.rows import Row
from guard_training.evaluation.metrics import summarise
from guard_training.evaluation.outcomes import Outcome
from guard_training.update import revision
from guard_training.update.calibration import calibration
from guard_training.update.card import (
    CardError,
    Recipe,
    count_sources,
    licence_of,
    parameters,
    write_card,
)
from guard_training.update.revision import RevisionError
from tests.tiny_model import make_folder


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("guard") / "small")


def summary(guard: Path, **more: Any) -> dict[str, Any]:
    name = load(guard, name="small").facts.revision
    outcomes = [
        Outcome(f"{n}", "locks", "text", "harmful" if n % 2 else "unharmful", None,
                request="harmful" if n % 3 else "unharmful", revision=name)
        for n in range(12)
    ]  # fmt: skip
    return {"data": "dev.jsonl", "limit": None, **summarise(outcomes, model="small", revision=name), **more}


def card(guard: Path, **more: Any) -> str:
    rows = [Row("a", "bread", "x", "unharmful", licence="MIT"), Row("b", "locks", "y", "harmful", licence="CC0-1.0")]
    fields = dict(
        licence="apache-2.0",
        sources=count_sources(rows),
        recipe=Recipe("SFT.", {"epochs": 3}),
        summaries=[summary(guard)],
        calibration={
            "reason": {
                "request": {"temperature": 2.0, "rows": 40, "harmful": 20, "calibration_error": [0.2, 0.1]},
                "response": None,
            },
        },
    )
    return write_card(guard, **(fields | more))  # type: ignore[arg-type]


@pytest.fixture
def made(guard: Path, tmp_path: Path) -> Path:
    facts = load(guard, name="small").facts
    lineage = revision.lineage(facts=facts, base=None, data=[], recipe=None, made="2026-11-21")
    return revision.write_revision(
        guard,
        tmp_path / "revision",
        card=card(guard),
        lineage=lineage,
        calibration=calibration(facts.revision, reason=[]),
        results={"dev": summary(guard)},
    )


def test_a_revision_holds_what_serves_and_proves_itself(made: Path, guard: Path) -> None:
    assert {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()} == {
        *("config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"),
        *("tokenizer_config.json", "README.md", "lineage.json", "calibration.json", "results/dev.json", "SHA256SUMS"),
    }
    assert revision.verify(made).revision == load(guard, name="small").facts.revision
    done = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=made, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(RevisionError, match="exists"):
        revision.write_revision(guard, made, card="", lineage={}, calibration=None, results={})


def test_the_lineage_names_files_by_digest_and_no_place_of_this_machine(made: Path, tmp_path: Path) -> None:
    value = json.loads((made / "lineage.json").read_text())
    assert value["schema"] == "guard_training.lineage/1"
    assert value["made"] == "2026-11-21"
    assert {"torch", "transformers", "trl", "python"} <= set(value["versions"])
    assert {"commit", "changed"} <= set(value)
    assert str(tmp_path) not in json.dumps(value)
    file = tmp_path / "rows.jsonl"
    file.write_text("x\n")
    entry = revision.data_file("replay", file)
    assert entry["file"] == "rows.jsonl"
    assert len(entry["sha256"]) == 64


def test_the_commit_is_that_of_the_checkout_and_none_outside_one(tmp_path: Path) -> None:
    assert revision.git_commit(tmp_path) == {"commit": None, "changed": None}
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "a").write_text("1")
    subprocess.run(["git", "-C", tmp_path, "add", "a"], check=True)
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", tmp_path, *who, "commit", "-qm", "a"], check=True)
    found = revision.git_commit(tmp_path)
    assert len(found["commit"]) == 40
    assert found["changed"] is False
    (tmp_path / "a").write_text("2")
    assert revision.git_commit(tmp_path)["changed"] is True


def _change(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")


def _resum(folder: Path) -> None:
    revision.write_sums(folder)


def _cut_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    values = load_file(folder / "model.safetensors")
    values.pop(next(name for name in values if "layers.1" in name))
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    _resum(folder)


def _empty_card(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace("|", ""))
    _resum(folder)


def _old_results(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace("revision `", "revision `0"))
    _resum(folder)


def _no_lineage(folder: Path) -> None:
    (folder / "lineage.json").write_text("{}")
    _resum(folder)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_change, "config.json: changed since SHA256SUMS"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: missing"),
        (lambda folder: (folder / "more.bin").write_text("x"), "more.bin: not in SHA256SUMS"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "guard-train publish"),
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (_cut_weights, "its weights are not those of its config"),
        (_empty_card, "no measured results"),
        (_old_results, "of other weights"),
        (_no_lineage, "lineage.json: missing, or not of the schema"),
    ],
)
def test_a_spoilt_revision_is_refused_with_its_reason(made: Path, spoil: Any, reason: str) -> None:
    spoil(made)
    with pytest.raises(RevisionError, match=reason):
        revision.verify(made)


def test_a_killed_writing_leaves_no_revision(guard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(revision, "write_sums", killed)
        with pytest.raises(KeyboardInterrupt):
            revision.write_revision(guard, tmp_path / "r", card="c", lineage={}, calibration=None, results={})
    assert not (tmp_path / "r").exists()
    revision.write_revision(guard, tmp_path / "r", card="c", lineage={}, calibration=None, results={})
    revision.check_sums(tmp_path / "r")


def test_the_card_says_what_is_known_and_measured(guard: Path) -> None:
    text = card(guard, base="someone/guard", limits="- Only locks.")
    assert text.startswith("---\nlicense: apache-2.0\n")
    assert "base_model: someone/guard" in text
    assert "2 layers of 64" in text
    assert f"{parameters(guard) / 1e6:.1f} M" in text
    assert "| bread | MIT | 1 | 0 |" in text
    assert "| locks | CC0-1.0 | 1 | 1 |" in text
    assert "| `epochs` | `3` |" in text
    assert "<!-- results:begin -->" in text
    assert "| locks | request | 12 | 6 |" in text
    assert "request, mode reason: temperature 2.00 on 40 held-back rows" in text
    assert "response, mode reason: too few held-back rows" in text
    assert text.rstrip().endswith("- Only locks.")
    assert "adversary" in card(guard)


def test_the_card_counts_the_numbers_of_the_weights(guard: Path) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(guard)
    assert parameters(guard) == sum(one.numel() for one in model.parameters())


@pytest.mark.parametrize("summaries", [[], [{"data": "dev", "revision": "0"}]], ids=["none", "others"])
def test_no_card_without_results_of_these_weights(guard: Path, summaries: list[Any]) -> None:
    with pytest.raises(CardError, match="measure"):
        card(guard, summaries=summaries)


def test_the_licence_is_read_from_a_card(guard: Path, made: Path, tmp_path: Path) -> None:
    assert licence_of(made) == "apache-2.0"
    assert licence_of(guard) is None
    (tmp_path / "README.md").write_text("# no front\n")
    assert licence_of(tmp_path) is None
