"""How much each word (or token) speaks for harm in the training texts: a logistic regression on word presence.

Two uses: the teacher quotes the words that weigh most, and the model's embeddings start from the weights. Sources
are weighed by the square root of their size within each label, so that a large one does not decide alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from guard_middleware.types import Label

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")

#: What another word must add to a quote to be worth its place.
_PER_WORD = 0.05


def balance(sources: Sequence[str], harmful: Sequence[bool], shares: Mapping[str, float]) -> list[float]:
    """A weight per text: each label sums to one half, each source to the square root of its size within its label,
    times its share (1 where none is given)."""
    keys = list(zip(sources, harmful, strict=True))
    sizes = Counter(keys)
    raw = [sizes[key] ** -0.5 * shares.get(key[0], 1.0) for key in keys]
    totals = {flag: sum(w for w, (_, f) in zip(raw, keys, strict=True) if f == flag) for flag in (True, False)}
    return [0.5 * w / totals[flag] for w, (_, flag) in zip(raw, keys, strict=True)]


def fit_log_odds(
    texts: Sequence[Sequence[int]],
    harmful: Sequence[bool],
    weights: Sequence[float],
    size: int,
    *,
    steps: int,
    penalty: float,
) -> tuple[Tensor, Tensor, float]:
    """A ridge logistic regression on which ids (below ``size``) a text holds, rare ids weighing more (TF-IDF).

    Returns the log-odds and the rarity (inverse document frequency) of every id, both (``size``,), and the bias. A
    text's logit is the sum of odds times rarity over its distinct ids, divided by the norm of their rarities, plus
    the bias. Full-batch Adam, so deterministic.
    """
    unique = [sorted(set(ids)) for ids in texts]
    columns = torch.tensor([id for ids in unique for id in ids])
    rows = torch.repeat_interleave(torch.arange(len(unique)), torch.tensor([len(ids) for ids in unique]))
    rarity = torch.log((1 + len(unique)) / (1 + torch.bincount(columns, minlength=size))) + 1
    norms = torch.zeros(len(unique)).index_add_(0, rows, rarity[columns].square()).sqrt().clamp(min=1e-6)
    values = rarity[columns] / norms[rows]
    seen = torch.sparse_coo_tensor(torch.stack((rows, columns)), values, (len(unique), size), check_invariants=True)
    seen = seen.coalesce()
    transposed = seen.t().coalesce()
    target, weight = torch.tensor(harmful, dtype=torch.float32), torch.tensor(weights)
    odds, bias = torch.zeros(size), torch.zeros(1)
    optimizer = torch.optim.Adam([odds, bias], lr=0.1)
    for _ in range(steps):
        error = weight * (torch.sigmoid((seen @ odds[:, None])[:, 0] + bias) - target)
        odds.grad = (transposed @ error[:, None])[:, 0] + 2 * penalty * odds
        bias.grad = error.sum()[None]
        optimizer.step()
    return odds, rarity, float(bias)


@dataclass(frozen=True, slots=True)
class Lexicon:
    """Log-odds of harm and rarity by lower-cased word; positive odds speak for harm."""

    weights: dict[str, float]
    rarity: dict[str, float]
    bias: float = 0.0

    def score(self, text: str) -> float:
        """The logit of harm."""
        known = {word for word in (found.lower() for found in WORD.findall(text)) if word in self.weights}
        norm = sum(self.rarity[word] ** 2 for word in known) ** 0.5
        return sum(self.weights[word] * self.rarity[word] for word in known) / max(norm, 1.0) + self.bias

    def weight(self, word: str) -> float:
        """What a lower-cased word adds to a logit, before the length of the text is taken into account."""
        return self.weights.get(word, 0.0) * self.rarity.get(word, 0.0)

    def quote(self, text: str, label: Label) -> str:
        """The stretch of at most four words of ``text`` that speaks most for ``label``, lower-cased.

        Empty where the text holds no word. White space inside is one blank, so that a quote stays in its line.
        """
        sign = 1.0 if label == "harmful" else -1.0
        found = list(WORD.finditer(text))
        values = [sign * self.weight(match.group().lower()) - _PER_WORD for match in found]
        best, span = float("-inf"), (0, 0)
        for start in range(len(found)):
            total = 0.0
            for stop in range(start, min(start + 4, len(found))):
                total += values[stop]
                if found[stop].end() - found[start].start() > 40 and stop > start:
                    break
                if total > best:
                    best, span = total, (start, stop)
        if not found:
            return ""
        quoted = text[found[span[0]].start() : found[span[1]].end()]
        return " ".join(quoted.lower().split())[:48].replace("<", "").replace(">", "")


def word_lexicon(
    texts: Sequence[str],
    harmful: Sequence[bool],
    weights: Sequence[float],
    *,
    least: int,
    steps: int,
    penalty: float,
) -> Lexicon:
    """The lexicon of words that occur in at least ``least`` of the texts; ``weights`` is one number per text."""
    split = [[word.lower() for word in WORD.findall(text)] for text in texts]
    counts = Counter(word for words in split for word in set(words))
    ids = {word: number for number, (word, n) in enumerate(sorted(counts.items()), 1) if n >= least}
    ids = {word: number for number, word in enumerate(sorted(ids), 1)}
    odds, rarity, bias = fit_log_odds(
        [[ids[word] for word in words if word in ids] for words in split],
        harmful,
        weights,
        len(ids) + 1,
        steps=steps,
        penalty=penalty,
    )
    return Lexicon(
        {word: float(odds[number]) for word, number in ids.items()},
        {word: float(rarity[number]) for word, number in ids.items()},
        bias,
    )
