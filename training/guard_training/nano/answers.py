"""What the sentence encoder makes of answers: texts beside a prompt, and the odds of harm that follow from both.

As the pool does for prompts. A labelled pair is too rare a thing to learn meaning from, so pairs are made of them: the
answer after another prompt, a stretch of it (what a window over a long answer holds), or with words put in the place
of others. A logistic regression on the embeddings of answer and prompt, mixed with a word count of answers, judges all.
"""

# ruff: noqa: S311 - the draws must repeat for a seed, not resist guessing
from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor

from guard_training.corpus.rows import Row
from guard_training.nano.encoder import Embeddings
from guard_training.nano.lexicon import balance, word_lexicon
from guard_training.nano.mixture import cut
from guard_training.nano.pool import mixed_chances
from guard_training.nano.recipe import Recipe
from guard_training.nano.variants import Thesaurus, variant

#: characters of a prompt and of its answer: long ones are cut by the worker's windows too
_PROMPT, _ANSWER = 400, 700
_STRETCH = (8, 16, 32, 64)

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Answers:
    """Pairs of prompt and answer, with the answers' ``vectors`` (pairs, 384; half precision) and ``chances`` of harm
    (pairs,). The labelled pairs come first, in their order; ``made`` are the others."""

    pairs: list[Pair]
    vectors: Tensor
    chances: Tensor
    made: range


def make_pairs(rows: Sequence[Row], prompts: Sequence[str], thesaurus: Thesaurus, recipe: Recipe) -> list[Pair]:
    """A pair made of each of the drawn ``rows``, of the three kinds in equal parts; ``prompts`` are the other ones."""
    rng = random.Random(recipe.seed)
    out = []
    for row in rows:
        prompt, answer, kind = row.prompt, row.response or "", rng.randrange(3)
        if kind == 0:
            prompt = rng.choice(prompts)
        elif kind == 1:
            answer = variant(cut(answer, recipe.variant_words, rng), thesaurus, rng)
        else:
            words, size = answer.split(), rng.choice(_STRETCH)
            start = rng.randint(0, max(0, len(words) - size))
            answer = " ".join(words[start : start + size])
        out.append((prompt[:_PROMPT], answer[:_ANSWER]))
    return out


def make_answers(
    rows: Sequence[Row],
    made: Sequence[Pair],
    shares: Mapping[str, float],
    recipe: Recipe,
    kept: Embeddings,
    progress: Progress,
) -> Answers:
    """Embeds all pairs and judges them; ``rows`` are the labelled ones, whose sources weigh by ``shares``."""
    pairs = [(row.prompt[:_PROMPT], (row.response or "")[:_ANSWER]) for row in rows]
    pairs += made
    answers = kept.of([answer for _, answer in pairs], progress, "embedding answers")
    seen = torch.cat((answers, kept.of([prompt for prompt, _ in pairs], progress, "embedding their prompts")), 1)
    harmful = [row.response_label == "harmful" for row in rows]
    weights = balance([row.source for row in rows], harmful, shares)
    words = word_lexicon(
        [answer for _, answer in pairs[: len(rows)]],
        harmful,
        weights,
        least=2,
        steps=recipe.odds_steps,
        penalty=recipe.odds_penalty,
    )
    chances = mixed_chances(
        seen,
        [words.score(answer) for _, answer in pairs],
        harmful,
        weights,
        penalty=recipe.head_penalty,
        sharpness=recipe.head_sharpness,
        lexicon_share=recipe.lexicon_share,
        label_share=recipe.label_share,
    )
    return Answers(pairs, answers, chances, range(len(rows), len(pairs)))
