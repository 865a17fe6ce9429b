"""Drawn text whose every glyph is known: images for a tower that learns to read, with dense labels per image token.

An image token covers 28 x 28 pixels and owns ``SLOTS`` upright strips of 3.5 pixels. A glyph belongs to the token row
that holds the middle of its line's small letters, and to the strip that holds the middle of its advance. The labels
are the only truth: what is cut off at an edge is no label, and the text of a row is its labels from left to right.

Four kinds, the rungs of a curriculum: ``glyphs`` (single ones anywhere in a token), ``strings`` (random characters),
``words``, ``lines`` (running text on larger images, decorated like the typographic test images).
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from guard_training.corpus.rows import held_out
from guard_training.nano.bank import read_bank
from guard_training.nano.render import Style, _decorate, _font, draw_style

#: Pixels of an image token's side, and the strips that it owns.
TOKEN, SLOTS = 28, 8
#: What can be read; label 0 is "nothing here", label n is ``ALPHABET[n - 1]``.
ALPHABET = "".join(map(chr, range(32, 127)))
KINDS = ("glyphs", "strings", "words", "lines")

_CODES: Mapping[str, int] = {char: number for number, char in enumerate(ALPHABET, 1)}
#: The middle of small letters above the base line, in font sizes.
_MIDDLE = 0.25
_SIZES = (20, 28)
_RANDOM = string.ascii_lowercase * 5 + string.ascii_uppercase * 2 + string.digits * 2 + string.punctuation
_ONSETS = "b bl br c ch cl d dr f fl g gr h j k l m n p pl pr qu r s sh sk sl st t th tr v w y z".split()
_RIMES = "a ab ack ad ain al am an ar ate e ead ear ed ell en er est i ick ide ill in ing ip o ock oll on or u um un us"
_VOWELS = _RIMES.split()

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, slots=True)
class Labelled:
    """An image whose sides are multiples of ``TOKEN``, and its labels (token rows, token columns x ``SLOTS``)."""

    image: Image.Image
    labels: NDArray[np.int64]

    @property
    def glyphs(self) -> int:
        return int((self.labels > 0).sum())

    def texts(self) -> list[str]:
        """The text of each token row."""
        return ["".join(ALPHABET[code - 1] for code in row if code) for row in self.labels]


@dataclass(frozen=True, slots=True)
class Texts:
    """What is drawn: whole texts and their words."""

    lines: tuple[str, ...]
    words: tuple[str, ...]


def bank_texts(folder: Path, *, held: bool) -> Texts:
    """Benign prompts of the bank (printable ASCII): those held out, or the rest. Raises ``CorpusError``."""
    lines = [
        " ".join(row.prompt.split())
        for row in read_bank(folder)
        if row.source.startswith("bank_benign") and held_out(row.id, 0.1) == held
    ]
    lines = [line for line in lines if all(char in _CODES for char in line)]
    return Texts(tuple(lines), tuple(sorted({word for line in lines for word in line.split() if len(word) < 16})))


def blank(width: int, height: int, paper: tuple[int, int, int] = (255, 255, 255)) -> Labelled:
    """An empty sheet, in pixels (multiples of ``TOKEN``)."""
    labels = np.zeros((height // TOKEN, width // TOKEN * SLOTS), dtype=np.int64)
    return Labelled(Image.new("RGB", (width, height), paper), labels)


def write(sheet: Labelled, text: str, left: float, middle: float, font: Font, size: int, ink: tuple[int, ...]) -> None:
    """Draws ``text`` on the sheet, its small letters' middle at height ``middle``, and labels every glyph of it."""
    ImageDraw.Draw(sheet.image).text((left, middle + _MIDDLE * size), text, fill=ink, font=font, anchor="ls")
    rows, columns = sheet.labels.shape
    row = int(middle // TOKEN)
    if not 0 <= row < rows:
        return
    ends = [0.0, *(font.getlength(text[: n + 1]) for n in range(len(text)))]
    labels = sheet.labels[row]
    for char, start, end in zip(text, ends, ends[1:], strict=False):
        slot = int((left + (start + end) / 2) // (TOKEN / SLOTS))
        if not 0 <= slot < columns:
            continue
        # Two narrow letters may share a strip, and equal neighbours need an empty one between them to be told apart.
        while slot < columns and (labels[slot] or (slot and labels[slot - 1] == _CODES[char])):
            slot += 1
        if slot < columns:
            labels[slot] = _CODES[char]


def draw(kind: str, texts: Texts, fonts: tuple[str, ...], rng: random.Random) -> Labelled:
    """One image of a kind."""
    style = replace(draw_style(rng, fonts), size=rng.randint(*_SIZES))
    return _DRAWINGS[kind](style, texts, rng)


def _glyphs(style: Style, texts: Texts, rng: random.Random) -> Labelled:
    sheet = blank(4 * TOKEN, 4 * TOKEN, style.paper)
    for place in range(16):
        if rng.random() < 0.8:
            size = rng.randint(*_SIZES)
            font, char = _font(style.font, size), rng.choice(_RANDOM)
            x = (place % 4 + rng.uniform(0.15, 0.85)) * TOKEN - font.getlength(char) / 2
            write(sheet, char, x, (place // 4 + rng.uniform(0.15, 0.85)) * TOKEN, font, size, style.ink)
    return sheet


def _strings(style: Style, texts: Texts, rng: random.Random) -> Labelled:
    return _sheet(style, lambda: "".join(rng.choices(_RANDOM, k=rng.randint(3, 9))), rng)


def _words(style: Style, texts: Texts, rng: random.Random) -> Labelled:
    return _sheet(style, lambda: " ".join(_word(texts, rng) for _ in range(3)), rng)


def _sheet(style: Style, text: Callable[[], str], rng: random.Random) -> Labelled:
    """Text from edge to edge, so that no pixel of the sheet is idle; what does not fit is cut off."""
    sheet = blank(4 * TOKEN, 4 * TOKEN, style.paper)
    font, step = _font(style.font, style.size), _step(style, rng)
    middle = rng.uniform(0, step)
    while middle < 4 * TOKEN:
        write(sheet, text(), rng.uniform(-12, 24), middle, font, style.size, style.ink)
        middle += step
    return sheet


def _lines(style: Style, texts: Texts, rng: random.Random) -> Labelled:
    width, height = rng.choice(((224, 112), (224, 224), (336, 168), (336, 224), (448, 168)))
    sheet, font, step = blank(width, height, style.paper), _font(style.font, style.size), _step(style, rng)
    _decorate(ImageDraw.Draw(sheet.image), style, sheet.image.size, rng)
    words = rng.choice(texts.lines).split()
    words = words[rng.randrange(len(words)) :] + [_word(texts, rng) for _ in range(30)]
    left, middle = rng.uniform(8, 36), style.size + rng.uniform(0, 1.5 * step)
    while words and middle < height - style.size / 2 and rng.random() < 0.95:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") < width - left - 10:
            line = f"{line} {words.pop(0)}"
        start = (width - font.getlength(line)) / 2 if style.layout in ("sign", "meme") else left
        write(sheet, line, start, middle, font, style.size, style.ink)
        middle += step
    return sheet


def _step(style: Style, rng: random.Random) -> float:
    """From line to line: never two lines in one row of tokens."""
    return max(TOKEN, style.size * rng.uniform(1.2, 1.5))


def _word(texts: Texts, rng: random.Random) -> str:
    chance = rng.random()
    if chance < 0.6:
        word = rng.choice(texts.words)
    elif chance < 0.9:
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, 3)))
    else:
        word = str(rng.randint(0, 9999))
    chance = rng.random()
    return word.upper() if chance < 0.1 else word.capitalize() if chance < 0.3 else word


_DRAWINGS: Mapping[str, Callable[[Style, Texts, random.Random], Labelled]] = {
    "glyphs": _glyphs,
    "strings": _strings,
    "words": _words,
    "lines": _lines,
}


def decode(codes: Sequence[int]) -> str:
    """Greedy CTC: the text of a row from its strips' labels; repeats are one glyph unless an empty strip parts them."""
    return "".join(
        ALPHABET[code - 1] for before, code in zip([0, *codes], codes, strict=False) if code and code != before
    )
