"""Typographic images: text drawn the way that people and attackers draw it, from a seed.

Fonts come from PyPI packages (they register the entry points ``fonts_ttf`` / ``fonts_otf``) and Pillow's own
default; the held-out fonts never appear in training. Layouts: a paragraph, a title over an empty numbered list (the
FigStep attack), a sign, a meme caption, a chat bubble, a slide, a terminal. The drawing is the same for harmful
and for benign text, so that only the words tell them apart.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

TRAIN_FONTS = ("roboto", "sourcesansttf", "sourceserifttf", "caladea", "pillow-default")
HELD_OUT_FONTS = ("manrope", "hanken-grotesk", "fredoka-one")

Layout = Literal["paragraph", "list", "sign", "meme", "bubble", "slide", "terminal"]
LAYOUTS: tuple[Layout, ...] = ("paragraph", "list", "list", "list", "sign", "meme", "bubble", "slide", "terminal")

_HOW_TO = re.compile(
    r"\b(?:how to|how (?:can|do|could|would|should|might) (?:i|you|we|one|someone|a person|people)"
    r"|ways to|steps to|instructions (?:on how )?(?:to|for)|guide (?:on how )?to|methods to) (.+)",
    re.IGNORECASE,
)
_TITLES = (
    "Steps to",
    "Ways to",
    "Methods to",
    "How to",
    "Tips to",
    "Guide: how to",
    "List of ways to",
    "Things needed to",
)
_FILLER = re.compile(
    r"^(?:please |can you |could you )*"
    r"(?:write|give|create|provide|tell|explain|describe|list|make|develop|generate)\b(?: me| us)? ",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Style:
    """Everything about one drawing but its words."""

    font: str
    size: int
    layout: Layout
    ink: tuple[int, int, int]
    paper: tuple[int, int, int]
    width: int


@cache
def _files(package: str) -> tuple[str, ...]:
    files: list[str] = []
    for group in ("fonts_ttf", "fonts_otf"):
        for entry in entry_points(group=group, name=package):
            files += [path for name, path in sorted(entry.load().items()) if "variable" not in name.lower()]
    if not files:
        raise RuntimeError(
            f"no font of {package!r} is installed; install the extra: pip install 'guard-middleware[training]'"
        )
    return tuple(files)


def draw_style(rng: random.Random, fonts: tuple[str, ...]) -> Style:
    """A random style in one of ``fonts``."""
    package = rng.choice(fonts)
    font = package if package == "pillow-default" else rng.choice(_files(package))
    ink, paper = _colours(rng)
    return Style(font, rng.randint(20, 40), rng.choice(LAYOUTS), ink, paper, rng.choice((384, 448, 512, 640)))


def _colours(rng: random.Random) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    light = tuple(rng.randint(205, 255) for _ in range(3))
    dark = tuple(rng.randint(0, 90) for _ in range(3))
    if rng.random() < 0.5:
        light, dark = (255, 255, 255), (0, 0, 0)
    ink, paper = (dark, light) if rng.random() < 0.75 else (light, dark)
    return ink, paper  # type: ignore[return-value]


def deed(text: str) -> str | None:
    """What a question asks how to do (``how do I pick a lock?`` is ``pick a lock``); None for other texts."""
    found = _HOW_TO.search(text)
    return found.group(1).rstrip(" ?.!") if found else None


def list_title(text: str, rng: random.Random) -> str:
    """A request as the title of a list, as FigStep draws it: ``how do I pick a lock`` is ``Steps to pick a lock.``"""
    asked = deed(text)
    if asked:
        return f"{rng.choice(_TITLES)} {asked}."
    return _FILLER.sub("", text).rstrip(" ?.!")[:200].capitalize() + "."


def render(text: str, style: Style, rng: random.Random) -> Image.Image:
    """The text as an image; its height follows from the text."""
    if style.layout == "list":
        text = f"{list_title(text, rng)}"
    font = _font(style.font, style.size)
    margin = style.size
    lines = _wrap(text, font, style.width - 2 * margin - (30 if style.layout == "bubble" else 0))
    if style.layout == "list":
        lines += [f"{n}. " for n in range(1, rng.choice((3, 3, 4, 5)) + 1)]
    step = int(style.size * 1.35)
    height = max(len(lines) * step + 2 * margin, style.width // 2 if style.layout in ("meme", "slide") else 0)
    image = Image.new("RGB", (style.width, height), style.paper)
    draw = ImageDraw.Draw(image)
    _decorate(draw, style, image.size, rng)
    top = margin
    if style.layout == "meme":
        top = rng.choice((margin // 2, max(margin // 2, height - len(lines) * step - margin)))
    for number, line in enumerate(lines):
        left = margin + (15 if style.layout == "bubble" else 0)
        if style.layout in ("sign", "meme"):
            left = int((style.width - draw.textlength(line, font=font)) / 2)
        draw.text((left, top + number * step), line, fill=style.ink, font=font)
    return image


def _decorate(draw: ImageDraw.ImageDraw, style: Style, size: tuple[int, int], rng: random.Random) -> None:
    width, height = size
    if style.layout == "sign":
        draw.rectangle((4, 4, width - 5, height - 5), outline=style.ink, width=rng.randint(2, 6))
    elif style.layout == "bubble":
        shade = tuple((3 * p + i) // 4 for p, i in zip(style.paper, style.ink, strict=True))
        light = tuple((9 * p + i) // 10 for p, i in zip(style.paper, style.ink, strict=True))
        draw.rounded_rectangle((8, 8, width - 9, height - 9), radius=18, fill=light, outline=shade, width=2)
    elif style.layout == "slide":
        draw.rectangle((0, 0, width, 8), fill=style.ink)
        draw.rectangle((0, height - 8, width, height), fill=style.ink)
    elif style.layout == "meme":
        for y in range(height):
            tint = tuple(int(p * (1 - 0.25 * y / height)) for p in style.paper)
            draw.line((0, y, width, y), fill=tint)
    elif style.layout == "terminal":
        draw.rectangle((0, 0, width, style.size // 2), fill=style.ink)


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size) if name == "pillow-default" else ImageFont.truetype(name, size)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    return lines
