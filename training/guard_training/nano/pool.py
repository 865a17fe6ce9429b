"""The pool of distillation: texts, what the sentence encoder makes of them, and the odds of harm that follow.

Groups: the labelled prompts, variants of them, stretches of words out of any rows, WordNet's definitions. Beside them
the tokenizer's own words, each embedded as a text, for the start of nano's embeddings.
"""

# ruff: noqa: S311 - the draws must repeat for a seed, not resist guessing
from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from guard_training.nano.encoder import Embeddings, fit_head
from guard_training.nano.lexicon import Lexicon
from guard_training.nano.mixture import snippet

#: characters of a text that the encoder is shown; its limit of 256 word pieces is near that
LONGEST = 1200


@dataclass(frozen=True, slots=True)
class Pool:
    """``texts`` with their ``vectors`` (texts, 384; half precision) and ``chances`` of harm (texts,).

    ``groups`` says which of them are whose; the labelled prompts come first, in their order.
    """

    texts: list[str]
    vectors: Tensor
    chances: Tensor
    groups: Mapping[str, range]

    def draw(self, group: str, rng: random.Random) -> int:
        """The number of a random text of the group."""
        return rng.choice(self.groups[group])


def make_stretches(texts: Sequence[str], count: int, words: int, seed: int) -> list[str]:
    """Stretches of words out of ``texts``, mostly of up to ``words`` words."""
    rng = random.Random(seed)
    return [snippet(texts, rng.choice((words, words, words, 3 * words)), rng)[:LONGEST] for _ in range(count)]


def make_pool(
    prompts: Sequence[str],
    harmful: Sequence[bool],
    weights: Sequence[float],
    others: Mapping[str, Sequence[str]],
    lexicon: Lexicon,
    *,
    penalty: float,
    sharpness: float,
    lexicon_share: float,
    label_share: float,
    kept: Embeddings,
    progress: Progress,
) -> Pool:
    """Embeds everything and judges it; ``harmful`` and ``weights`` are of the prompts, ``others`` the other groups.

    The other arguments are those of ``mixed_chances``.
    """
    texts = [prompt[:LONGEST] for prompt in prompts]
    groups = {"prompts": range(len(texts))}
    for name, more in others.items():
        groups[name] = range(len(texts), len(texts) + len(more))
        texts += [text[:LONGEST] for text in more]
    vectors = kept.of(texts, progress, "embedding texts")
    by_words = [lexicon.score(text) for text in texts]
    chances = mixed_chances(
        vectors,
        by_words,
        harmful,
        weights,
        penalty=penalty,
        sharpness=sharpness,
        lexicon_share=lexicon_share,
        label_share=label_share,
    )
    return Pool(texts, vectors, chances, groups)


def mixed_chances(
    vectors: Tensor,
    by_words: Sequence[float],
    harmful: Sequence[bool],
    weights: Sequence[float],
    *,
    penalty: float,
    sharpness: float,
    lexicon_share: float,
    label_share: float,
) -> Tensor:
    """The chances of harm (texts,) by a head on ``vectors`` (texts, features) and by logits of words.

    ``harmful`` and ``weights`` are of the first texts, which are labelled: the head is fitted to them. The logit of
    harm is the head's times ``sharpness`` and the words', mixed by ``lexicon_share``; of a labelled text,
    ``label_share`` of the chance is its label, which knows what neither meaning nor words tell (who an instruction is
    for, say).
    """
    head, bias = fit_head(vectors[: len(harmful)], harmful, weights, penalty=penalty)
    by_meaning = (vectors.float() @ head + bias) * sharpness
    chances = torch.sigmoid((1 - lexicon_share) * by_meaning + lexicon_share * torch.tensor(by_words))
    labels = torch.tensor(harmful, dtype=chances.dtype)
    chances[: len(labels)].lerp_(labels, label_share)
    return chances


def word_vectors(tokenizer: PreTrainedTokenizerFast, kept: Embeddings, progress: Progress) -> Tensor:
    """The encoder's embedding of every token's text (ids, 384), zero where a token is no text."""
    words = [str(tokenizer.decode([id])).strip() for id in range(len(tokenizer))]
    special = set(tokenizer.all_special_ids)
    vectors = kept.of([word or "." for word in words], progress, "embedding words").float()
    known = torch.tensor([bool(word) and id not in special for id, word in enumerate(words)])
    return vectors * known[:, None]
