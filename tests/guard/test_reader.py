"""Drawn text is read, within bounds; what cannot be read is an error and never an image without text."""

from __future__ import annotations

import difflib
import io
import logging
import socket
import sys
import time

import pytest
from PIL import Image, ImageDraw, ImageFont

from guard_middleware.errors import ConfigError, GuardError, GuardErrorKind
from guard_middleware.guard import reader as module
from guard_middleware.guard.reader import Reader

WORDS = "Steps to pick a lock with a paper clip"


def picture(lines=(WORDS,), size=(760, 300), font=34, ink="black", paper="white"):
    image = Image.new("RGB", size, paper)
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((20, 20 + number * font * 1.5), line, fill=ink, font=ImageFont.load_default(font))
    return image


def png(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def likeness(found, expected=WORDS):
    return difflib.SequenceMatcher(None, " ".join(found.split()).lower(), expected.lower(), autojunk=False).ratio()


@pytest.fixture(scope="module")
def reader():
    pytest.importorskip("rapidocr")
    return Reader()


@pytest.mark.parametrize(
    "image",
    [
        picture(),
        picture(ink="yellow", paper="navy"),
        picture(size=(4000, 3000), font=120),
        picture(size=(330, 60), font=15),
        picture().rotate(180),
        picture().rotate(90, expand=True),
        picture().rotate(270, expand=True),
        picture().convert("L"),
        picture().convert("P"),
    ],
    ids=["plain", "coloured", "large", "small", "upside-down", "left", "right", "grey", "palette"],
)
def test_a_drawn_line_is_read(reader, image):
    assert likeness(reader.read(png(image))) > 0.9


def test_lines_come_in_reading_order(reader):
    lines = ["First of all", "second comes this", "and third is last"]
    assert [line.lower() for line in reader.read(picture(lines)).splitlines()] == [line.lower() for line in lines]


@pytest.mark.parametrize("size", [(7000, 60), (60, 7000)])
def test_a_long_strip_is_read_to_its_end(reader, size):
    image = Image.new("RGB", (7000, 60), "white")
    ImageDraw.Draw(image).text((6100, 8), WORDS, fill="black", font=ImageFont.load_default(36))
    if size[1] > size[0]:
        image = image.rotate(90, expand=True)
    started = time.monotonic()
    assert likeness(reader.read(image)) > 0.9
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("size", [(4, 4), (300, 300), (4, 800), (800, 4)])
def test_an_image_without_text_has_none(reader, size):
    assert reader.read(Image.new("RGB", size, "teal")) == ""


def test_a_line_that_reads_badly_is_dropped():
    pytest.importorskip("rapidocr")
    assert Reader(min_score=1.01).read(picture()) == ""


@pytest.mark.parametrize("data", [b"", b"not an image", png(picture())[:400]])
def test_what_is_no_image_is_an_error(reader, data):
    with pytest.raises(GuardError) as caught:
        reader.read(data)
    assert caught.value.kind is GuardErrorKind.MEDIA


def test_too_many_pixels_are_refused_before_decoding(reader):
    header = png(Image.new("1", (30_000, 1_000)))
    with pytest.raises(GuardError, match="too many pixels"):
        reader.read(header)


def test_a_failure_inside_is_an_error_and_is_not_remembered(reader, monkeypatch):
    image = picture(["something else"])
    monkeypatch.setattr(reader, "_detect", lambda pixels: 1 / 0)
    with pytest.raises(GuardError) as caught:
        reader.read(image)
    assert caught.value.kind is GuardErrorKind.READER
    monkeypatch.undo()
    assert reader.read(image) == "something else"


def test_running_out_of_time_is_an_error(reader):
    with pytest.raises(GuardError, match="no time left"):
        reader.read(picture([f"line number {n}" for n in range(5)]), timeout=0.0)


def test_waiting_for_another_image_counts(reader):
    with reader._lock, pytest.raises(GuardError, match="no time left"):
        reader.read(picture(["waiting"]), timeout=0.01)


def test_the_same_image_is_read_once(monkeypatch):
    pytest.importorskip("rapidocr")
    reader, calls = Reader(cache=1), []
    detect = reader._detect
    monkeypatch.setattr(reader, "_detect", lambda pixels: (calls.append(1), detect(pixels))[1])
    first, second = png(picture()), png(picture(["another"]))
    assert reader.read(first) == reader.read(first)
    assert len(calls) == 1
    reader.read(second)
    reader.read(first)
    assert len(calls) == 3


def test_nothing_is_logged_printed_or_fetched(monkeypatch, capfd, caplog):
    pytest.importorskip("rapidocr")

    def refuse(*_):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with caplog.at_level(logging.DEBUG):
        Reader().read(picture(["quiet"]))
        Reader().read(Image.new("RGB", (50, 50)))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_missing_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ConfigError, match=r"pip install 'guard-middleware\[ocr\]'"):
        Reader()


def test_tiles_are_bounded_and_overlap():
    tiles = list(module._tiles(Image.new("RGB", (12_000, 60))))
    assert all(tile.width <= module.TILE and tile.height >= module.MARGIN_SIDE for tile in tiles)
    assert sum(tile.width for tile in tiles) == 12_000 + module.OVERLAP * (len(tiles) - 1)
    (photograph,) = module._tiles(Image.new("RGB", (4000, 3000)))
    assert photograph.width * photograph.height <= module.MAX_PIXELS * 1.01


def test_a_shape_is_not_a_word(reader):
    image = Image.new("RGB", (300, 300), "white")
    ImageDraw.Draw(image).ellipse((130, 130, 170, 170), fill="black")
    assert not any(not char.isascii() for char in reader.read(image))
