"""Answers that the sentence encoder judges beside their prompts."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from torch import Tensor

from guard_training.corpus.rows import Row
from guard_training.nano import answers as module
from guard_training.nano import encoder
from guard_training.nano.answers import make_answers, make_pairs
from guard_training.nano.encoder import Embeddings, SentenceEncoder
from guard_training.nano.recipe import default_recipe, read_recipe
from guard_training.nano.variants import Thesaurus

RECIPE = dataclasses.replace(read_recipe(default_recipe()), head_penalty=1e-2)
#: harmful is only to agree with one of the prompts
PAIRS = [("live", "yes"), ("live", "no"), ("die", "yes"), ("die", "never")] * 3
ROWS = [
    Row(f"r{n}", "chat", pair[0], None, pair[1], "harmful" if pair == ("die", "yes") else "unharmful")
    for n, pair in enumerate(PAIRS)
]
THESAURUS = Thesaurus({"noun": ["yes", "aye"]}, torch.eye(2, 384), ["yes"])


class Letters(SentenceEncoder):
    """Vectors of length one that depend on the text's first letter alone."""

    def __init__(self) -> None:
        pass

    def embed(self, texts: Sequence[str]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor([ord(text[:1] or " ") % 384 for text in texts]), 384).float()


@pytest.fixture(autouse=True)
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "SentenceEncoder", Letters)


def test_an_answer_is_judged_beside_its_prompt_and_made_pairs_with_it(tmp_path: Path) -> None:
    with Progress(disable=True) as progress:
        made = make_answers(ROWS, [("die", "yonder"), ("live", "yonder")], {}, RECIPE, Embeddings(tmp_path), progress)
    assert made.made == range(12, 14)
    assert made.vectors.shape == (14, 384)
    assert torch.equal(made.vectors[12], made.vectors[0])  # of the answer, not of its prompt
    assert made.chances[2] > 0.5 > made.chances[3]
    assert made.chances[12] > made.chances[13]  # the same words after another prompt


def test_pairs_are_made_by_another_prompt_by_a_stretch_and_by_other_words() -> None:
    long = Row("r", "s", "ask", None, " ".join(["yes", *map(str, range(99))]), "harmful")
    pairs = make_pairs([long] * 60, ["elsewhere"], THESAURUS, RECIPE)
    assert len(pairs) == 60
    assert {prompt for prompt, _ in pairs} == {"ask", "elsewhere"}
    assert any(answer.startswith("aye ") for _, answer in pairs)
    assert any(len(answer.split()) == 8 for _, answer in pairs)
    assert pairs == make_pairs([long] * 60, ["elsewhere"], THESAURUS, RECIPE)


def test_long_prompts_and_answers_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PROMPT", 5)
    monkeypatch.setattr(module, "_ANSWER", 7)
    row = Row("r", "s", "a long prompt", None, "unbreakably long", "harmful")
    assert all(
        len(prompt) <= 5 and len(answer) <= 7 for prompt, answer in make_pairs([row] * 9, ["x" * 9], THESAURUS, RECIPE)
    )


def test_nothing_is_drawn_but_from_the_seed() -> None:
    before = random.getstate()
    make_pairs(ROWS, ["p"], THESAURUS, RECIPE)
    assert random.getstate() == before
