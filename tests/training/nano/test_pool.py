"""What the sentence encoder says of texts, and how it is kept."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from torch import Tensor

from guard_training.nano import encoder, variants
from guard_training.nano.encoder import Embeddings, SentenceEncoder, fit_head
from guard_training.nano.lexicon import Lexicon
from guard_training.nano.pool import make_pool, mixed_chances
from guard_training.nano.variants import make_thesaurus, variant

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
            {"stretches": ["large lock"], "definitions": ["axe"]},
            lexicon,
            penalty=1e-2,
            sharpness=1.0,
            lexicon_share=0.5,
            label_share=0.0,
            kept=Embeddings(tmp_path),
            progress=progress,
        )
    assert pool.texts[8:] == ["large lock", "axe"]
    assert pool.chances[0] > 0.5 > pool.chances[1]
    assert pool.chances[8] > 0.5  # begins as "lock" does
    assert pool.chances[9] > 0.9  # for its word


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, [0.5, 0.5, 0.5]), (0.5, [0.75, 0.25, 0.5]), (1.0, [1.0, 0.0, 0.5])]
)
def test_a_labelled_text_is_judged_by_its_label_too(share: float, expected: list[float]) -> None:
    vectors = torch.ones(3, 4)  # what the encoder cannot tell apart
    chances = mixed_chances(
        vectors, [0.0] * 3, [True, False], [0.5, 0.5], penalty=1.0, sharpness=1.0, lexicon_share=0.5, label_share=share
    )
    assert chances.tolist() == pytest.approx(expected, abs=1e-3)


def test_a_pool_knows_whose_its_texts_are(tmp_path: Path) -> None:
    others = {"stretches": ["large lock"], "variants": ["pick a bolt", "bake buns"]}
    with Progress(disable=True) as progress:
        pool = make_pool(
            ["lock", "bread"], [True, False], [0.5, 0.5], others, Lexicon({}, {}), penalty=1e-2, sharpness=1.0,
            lexicon_share=0.5, label_share=0.0, kept=Embeddings(tmp_path), progress=progress,
        )  # fmt: skip
    rng = random.Random(1)
    assert {pool.texts[pool.draw("variants", rng)] for _ in range(40)} == {"pick a bolt", "bake buns"}
    assert {pool.texts[pool.draw("prompts", rng)] for _ in range(40)} == {"lock", "bread"}


WORDS = {"noun": ["bolt", "bread", "bun", "lock"], "verb": ["bake", "break"]}


def test_a_word_gives_way_to_a_near_one_of_its_part_of_speech(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(variants, "_KEPT", 0)
    monkeypatch.setattr(variants, "_NEAREST", 2)
    monkeypatch.setattr(variants, "_ANY", 0.0)
    monkeypatch.setattr(variants, "_REPLACED", 1.0)
    with Progress(disable=True) as progress:
        thesaurus = make_thesaurus(["I bake Breads on zzz"], WORDS, Embeddings(tmp_path), progress)
    rng = random.Random(1)
    made = {variant("I bake Breads on zzz", thesaurus, rng) for _ in range(40)}
    assert made == {"I break Bolts on zzz", "I break Buns on zzz"}  # the encoder of this test goes by the first letter


def test_the_words_that_carry_a_sentence_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(variants, "_KEPT", 1)
    monkeypatch.setattr(variants, "_REPLACED", 1.0)
    with Progress(disable=True) as progress:
        thesaurus = make_thesaurus(["bake bread", "bake buns"], WORDS, Embeddings(tmp_path), progress)
    found = variant("bake bread", thesaurus, random.Random(1)).split()
    assert found[0] == "bake"
    assert found[1] != "bread"
