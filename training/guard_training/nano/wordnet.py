"""Definitions of WordNet 3 (Debian's package ``wordnet-base``, WordNet licence): English in 118,000 short texts.

nano learns words from them that its labelled texts never use. Refuses a folder without the data files.
"""

from __future__ import annotations

import random
from pathlib import Path

FOLDER = Path("/usr/share/wordnet")
_FILES = ("data.noun", "data.verb", "data.adj", "data.adv")


class WordNetMissing(ValueError):
    """The folder does not hold WordNet's data files."""


def definitions(folder: Path = FOLDER) -> list[str]:
    """``word: definition; "an example"`` of at most 200 characters, every other one without its word, in a fixed
    random order."""
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise WordNetMissing(f"no {missing[0]} in {folder}; apt install wordnet-base, or give its folder")
    entries: list[tuple[str, str]] = []
    for name in _FILES:
        for line in (folder / name).read_text(encoding="latin-1").splitlines():
            head, bar, gloss = line.partition(" | ")
            if bar and not line.startswith(" "):
                entries.append((head.split()[4].replace("_", " ").partition("(")[0], gloss.strip()))
    random.Random(1).shuffle(entries)  # noqa: S311
    return [(f"{word}: {gloss}" if number % 2 else gloss)[:200] for number, (word, gloss) in enumerate(entries)]
