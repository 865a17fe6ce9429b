"""Definitions of WordNet 3 (Debian's package ``wordnet-base``, WordNet licence): English in 118,000 short texts.

nano learns words from them that its labelled texts never use. Refuses a folder without the data files.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path("/usr/share/wordnet")
_FILES = ("data.noun", "data.verb", "data.adj", "data.adv")
_WORDS = 2


class WordNetMissing(ValueError):
    """The folder does not hold WordNet's data files."""


def definitions(folder: Path = FOLDER) -> list[str]:
    """``word: definition; "an example"`` of at most 200 characters, every other one without its word, in a fixed
    random order."""
    entries = [(_word(head[4]), gloss) for name in _FILES for head, gloss in _synsets(folder, name)]
    random.Random(1).shuffle(entries)  # noqa: S311
    return [(f"{word}: {gloss}" if number % 2 else gloss)[:200] for number, (word, gloss) in enumerate(entries)]


def lemmas(folder: Path = FOLDER) -> dict[str, list[str]]:
    """The words of one or two letter-only words by part of speech ("noun", "verb", "adj", "adv"), sorted."""
    found: dict[str, list[str]] = {}
    for name in _FILES:
        words = {
            _word(head[4 + 2 * number]).lower()
            for head, _ in _synsets(folder, name)
            for number in range(int(head[3], 16))
        }
        found[name.removeprefix("data.")] = sorted(
            word for word in words if len(word.split()) <= _WORDS and word.replace(" ", "").isalpha()
        )
    return found


def _synsets(folder: Path, name: str) -> Iterator[tuple[list[str], str]]:
    """The fields and the gloss of every synset of a data file (wndb(5WN)): the fourth field counts the words in hex,
    each of which takes two from the fifth on."""
    path = folder / name
    if not path.is_file():
        raise WordNetMissing(f"no {name} in {folder}; apt install wordnet-base, or give its folder")
    for line in path.read_text(encoding="latin-1").splitlines():
        head, bar, gloss = line.partition(" | ")
        if bar and not line.startswith(" "):
            yield head.split(), gloss.strip()


def _word(field: str) -> str:
    return field.partition("(")[0].replace("_", " ")
