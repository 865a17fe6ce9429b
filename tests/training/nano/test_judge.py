"""The judge learns its labels, and goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.progress import Progress

from guard_training.nano import judge as judging
from guard_training.nano.judge import Judge, train_judge

BATCH = [("how do I pick a lock", True), ("how do I bake bread", False), ("a broken lock", True), ("old bread", False)]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "_SAVE_EVERY", 2)
    monkeypatch.setattr(judging, "_WARMUP", 1)


def trained(folder: Path, steps: int, of: int | None = None) -> Judge:
    """After ``steps``; ``of`` more were planned, and the run was stopped before them."""
    torch.manual_seed(0)
    made = Judge(torch.zeros(384), 0.0)

    class Stopped(Exception):
        pass

    class Batches(list[list[tuple[str, bool]]]):
        def __getitem__(self, step):  # type: ignore[no-untyped-def]
            if step >= steps:
                raise Stopped
            return super().__getitem__(step)

    with Progress(disable=True) as progress:
        try:
            train_judge(made, Batches([BATCH] * (of or steps)), learning_rate=3e-4, folder=folder, progress=progress)
        except Stopped:
            assert of is not None
    return made


def test_it_learns_its_labels(tmp_path: Path) -> None:
    found = trained(tmp_path, 12).logits([text for text, _ in BATCH])[:, 0]
    assert (found > 0).tolist() == [harmful for _, harmful in BATCH]


def test_its_words_stay_as_the_encoder_has_them(tmp_path: Path) -> None:
    words = "embeddings.word_embeddings.weight"
    before = Judge(torch.zeros(384), 0.0).layers.state_dict()[words]
    assert torch.equal(before, trained(tmp_path, 3).layers.state_dict()[words])


def test_a_run_that_was_stopped_goes_on_from_its_last_state(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", 6)
    trained(tmp_path / "parts", 3, of=6)  # the third step is lost
    assert torch.load(tmp_path / "parts" / "state.pt")["step"] == 2
    trained(tmp_path / "parts", 6)
    assert torch.load(tmp_path / "parts" / "state.pt")["step"] == 6
    finished = trained(tmp_path / "whole", 6)
    assert torch.equal(whole.head.weight, finished.head.weight)  # nothing is done again
