"""Prompts with some of their words put in the place of others: the breadth that the labelled prompts lack.

A network that is to reproduce an encoder needs more texts of the kind that it will meet than anybody labels; TinyBERT
(arXiv 1909.10351, section 4) makes them by replacing words with near ones. Here a word of WordNet gives way to one of
those whose embeddings are nearest, or now and then to any of its part of speech; the encoder judges what comes out, so
no label has to survive the change.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.progress import Progress
from torch import Tensor

from guard_training.nano.encoder import Embeddings

_WORD = re.compile(r"[A-Za-z][a-z]{2,}")
#: so many of the prompts' most frequent words stay: they carry the sentence, not its matter
_KEPT = 200
_NEAREST = 12
_REPLACED, _ANY = 0.35, 0.25
_CHUNK = 1024


class Thesaurus:
    """Near words of the same part of speech.

    ``words`` maps a part of speech to its words; ``vectors`` (all words in that order, 384) are their embeddings.
    ``wanted`` are the words that near ones are looked up for.
    """

    def __init__(self, words: Mapping[str, Sequence[str]], vectors: Tensor, wanted: Sequence[str]) -> None:
        self._near: dict[str, list[str]] = {}
        self._all: dict[str, Sequence[str]] = {}
        start = 0
        for group in words.values():
            table = vectors[start : start + len(group)].float()
            start += len(group)
            place = {word: number for number, word in enumerate(group)}
            here = [word for word in wanted if word in place and word not in self._near]
            for at in range(0, len(here), _CHUNK):
                chunk = here[at : at + _CHUNK]
                likeness = table[[place[word] for word in chunk]] @ table.T
                found = likeness.topk(min(_NEAREST + 1, len(group))).indices.tolist()
                for word, near in zip(chunk, found, strict=True):
                    self._near[word] = [group[n] for n in near if group[n] != word][:_NEAREST]
                    self._all[word] = group

    def instead(self, word: str, rng: random.Random) -> str | None:
        """A word for ``word`` (or its plural), written as it is; None where there is none."""
        lower = word.lower()
        known = lower if lower in self._near else lower.removesuffix("s")
        if not self._near.get(known):
            return None
        found = rng.choice(self._all[known]) if rng.random() < _ANY else rng.choice(self._near[known])
        return (found.capitalize() if word[0].isupper() else found) + lower.removeprefix(known)


def make_thesaurus(
    texts: Sequence[str], words: Mapping[str, Sequence[str]], kept: Embeddings, progress: Progress
) -> Thesaurus:
    """The near words of all words of matter in ``texts``, singular forms of plurals among them."""
    counts = Counter(word.lower() for text in texts for word in _WORD.findall(text))
    matter = [word for word, _ in counts.most_common()[_KEPT:]]
    wanted = dict.fromkeys([*matter, *(word[:-1] for word in matter if word.endswith("s"))])
    vectors = kept.of([word for group in words.values() for word in group], progress, "embedding WordNet's words")
    return Thesaurus(words, vectors, list(wanted))


def variant(text: str, thesaurus: Thesaurus, rng: random.Random) -> str:
    """``text`` with about a third of its words of matter replaced."""

    def put(found: re.Match[str]) -> str:
        word = found.group()
        return (rng.random() < _REPLACED and thesaurus.instead(word, rng)) or word

    return _WORD.sub(put, text)
