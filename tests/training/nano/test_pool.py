"""What the sentence encoder says of texts, and how it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from torch import Tensor

from guard_training.nano import encoder
from guard_training.nano.encoder import Embeddings, SentenceEncoder, fit_head
from guard_training.nano.lexicon import Lexicon
from guard_training.nano.pool import make_pool, make_stretches

asked: list[str] = []


class Recorded(SentenceEncoder):
    """Vectors of length one that depend on the text's first letter alone, and a note of what was asked."""

    def __init__(self) -> None:
        pass

    def embed(self, texts: Sequence[str]) -> Tensor:
        asked.extend(texts)
        return torch.nn.functional.one_hot(torch.tensor([ord(text[0]) % 384 for text in texts]), 384).float()


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked.clear()
    monkeypatch.setattr(encoder, "SentenceEncoder", Recorded)


def of(kept: Embeddings, texts: Sequence[str]) -> Tensor:
    with Progress(disable=True) as progress:
        return kept.of(texts, progress, "embedding")


def test_a_text_is_embedded_once_and_kept_over_a_kill(tmp_path: Path) -> None:
    first = of(Embeddings(tmp_path), ["bread", "lock", "bread"])
    assert sorted(asked) == ["bread", "lock"]
    with (tmp_path / "vectors").open("ab") as file:
        file.write(b"half a vector")
    again = of(Embeddings(tmp_path), ["lock", "salt", "bread"])
    assert sorted(asked) == ["bread", "lock", "salt"]
    assert torch.equal(first[[1, 0]], again[[0, 2]])


def test_the_head_tells_the_labels_apart() -> None:
    vectors = torch.eye(4)[[0, 1, 0, 1, 2]]
    head, bias = fit_head(vectors, [True, False, True, False, False], [0.2] * 5, penalty=1e-3)
    assert ((vectors @ head + bias) > 0).tolist() == [True, False, True, False, False]


def test_the_pool_judges_by_meaning_and_by_words(tmp_path: Path) -> None:
    lexicon = Lexicon({"axe": 5.0}, {"axe": 1.0})
    with Progress(disable=True) as progress:
        pool = make_pool(
            ["lock", "bread"] * 4,
            [True, False] * 4,
            [0.125] * 8,
            ["large lock"],
            ["axe"],
            lexicon,
            penalty=1e-2,
            sharpness=1.0,
            lexicon_share=0.5,
            kept=Embeddings(tmp_path),
            progress=progress,
        )
    assert pool.texts[8:] == ["large lock", "axe"]
    assert pool.chances[0] > 0.5 > pool.chances[1]
    assert pool.chances[8] > 0.5  # begins as "lock" does
    assert pool.chances[9] > 0.9  # for its word


def test_a_run_that_goes_on_keeps_its_stretches(tmp_path: Path) -> None:
    first = make_stretches(["how do I pick a lock", "bake bread"], 20, 3, 1, tmp_path / "s.json")
    assert make_stretches(["other texts"], 20, 3, 1, tmp_path / "s.json") == first
    assert make_stretches([], 5, 3, 1, tmp_path / "s.json") == first[:5]
