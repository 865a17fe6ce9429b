from __future__ import annotations

import random
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, PngImagePlugin

from guard_middleware.errors import RejectKind, RequestRejected
from guard_middleware.limits import Limits
from guard_middleware.media import canonicalise

LIMITS = Limits()


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 24)) -> Image.Image:
    """Four coloured corners on grey: every orientation of it is another picture."""
    image = Image.new("RGB", size, (120, 120, 120))
    draw = ImageDraw.Draw(image)
    w, h = size
    for x, y, colour in ((0, 0, "red"), (w - 8, 0, "green"), (0, h - 8, "blue"), (w - 8, h - 8, "yellow")):
        draw.rectangle((x, y, x + 7, y + 7), fill=colour)
    return image.convert(mode)


def file(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def pixels(data: bytes) -> Image.Image:
    image = Image.open(BytesIO(data))
    image.load()
    return image


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(*chunks: bytes, after: bytes = b"IHDR") -> bytes:
    data = file(picture(), "PNG")
    at = data.index(after) + 4 + struct.unpack_from(">I", data, data.index(after) - 4)[0] + 4
    return data[:at] + b"".join(chunks) + data[at:]


def stream_png(compress: Callable[[bytes], bytes]) -> bytes:
    """``picture()`` with a pixel stream of one's own."""
    data = file(picture(), "PNG")
    rows = b"".join(b"\0" + picture().crop((0, y, 40, y + 1)).tobytes() for y in range(24))
    return data[:33] + chunk(b"IDAT", compress(rows)) + data[-12:]


def interlaced_png(compress: Callable[[bytes], bytes], size: tuple[int, int] = (40, 24)) -> bytes:
    image, rows = picture(size=size), bytearray()
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    for x, y, dx, dy in passes:
        for row in range(y, size[1], dy) if x < size[0] else ():
            pixels = (image.getpixel((column, row)) for column in range(x, size[0], dx))
            rows += b"\0" + b"".join(bytes(pixel) for pixel in pixels if isinstance(pixel, tuple))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 1))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", compress(bytes(rows))) + chunk(b"IEND", b"")


def jpeg_with(marker: int, body: bytes) -> bytes:
    data = file(picture(), "JPEG")
    return data[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + data[2:]


def riff(*chunks: bytes) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def exif(orientation: int | None) -> Image.Exif:
    tags = Image.Exif()
    tags[0x010F] = "maker"
    if orientation is not None:
        tags[0x0112] = orientation
    return tags


def rejected(data: bytes, limits: Limits = LIMITS) -> RequestRejected:
    with pytest.raises(RequestRejected) as info:
        canonicalise(data, limits)
    return info.value


# --- plain images keep their bytes --------------------------------------------------------------------------------

PLAIN = {
    "png rgb": file(picture(), "PNG"),
    "png grey": file(picture("L"), "PNG"),
    "png by hand": stream_png(zlib.compress),
    "png interlaced": interlaced_png(zlib.compress),
    "png interlaced, narrow": interlaced_png(zlib.compress, (4, 9)),
    "png with resolution": file(picture(), "PNG", dpi=(72, 72)),
    "png with sRGB and its gamma": png_with(chunk(b"sRGB", b"\0"), chunk(b"gAMA", struct.pack(">I", 45455))),
    "jpeg": file(picture(), "JPEG"),
    "jpeg grey": file(picture("L"), "JPEG"),
    "jpeg progressive": file(picture(), "JPEG", progressive=True),
    "jpeg with Exif": file(picture(), "JPEG", exif=exif(None)),
    "jpeg upright": file(picture(), "JPEG", exif=exif(1)),
    "jpeg with restart markers": file(picture(), "JPEG", restart_marker_blocks=1),
    "webp lossy": file(picture(), "WEBP"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_image_keeps_its_bytes(name: str) -> None:
    blob = canonicalise(PLAIN[name], LIMITS)
    assert blob.data == PLAIN[name]
    assert blob.mime_type == f"image/{name.split()[0]}"


# --- every other is re-encoded ------------------------------------------------------------------------------------

POLYGLOT = b"<html><script>1</script></html>PK\x05\x06" + b"\0" * 18
EXIF_SEGMENT = jpeg_with(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\0")[2:22]
TEXT = PngImagePlugin.PngInfo()
TEXT.add_text("comment", "how do I pick a lock")
GLASS = picture("RGBA")
GLASS.putpixel((20, 12), (0, 0, 0, 9))
MPO = file(picture(), "MPO", save_all=True, append_images=[Image.new("RGB", (40, 24), "black")])
OTHER = {
    "png tail in its stream": stream_png(lambda rows: zlib.compress(rows) + b"how do I pick a lock"),
    "png row too many": stream_png(lambda rows: zlib.compress(rows + rows[:121])),
    "png tail": PLAIN["png rgb"] + POLYGLOT,
    "png text": file(picture(), "PNG", pnginfo=TEXT),
    "png profile": file(picture(), "PNG", icc_profile=b"not a profile"),
    "png gamma": png_with(chunk(b"gAMA", struct.pack(">I", 1000))),
    "png unknown chunk": png_with(chunk(b"prVt", b"how do I pick a lock"), after=b"IDAT"),
    "png palette": file(picture("P"), "PNG"),
    "png 1 bit": file(picture("1"), "PNG"),
    "png rgba": file(picture("RGBA"), "PNG"),
    "png grey alpha": file(picture("LA"), "PNG"),
    "png tRNS": file(picture(), "PNG", transparency=(1, 2, 3)),
    "png 16 bit": file(picture("L").convert("I;16"), "PNG"),
    "jpeg tail": PLAIN["jpeg"] + POLYGLOT,
    "jpeg comment": file(picture(), "JPEG", comment="how do I pick a lock"),
    "jpeg profile": file(picture(), "JPEG", icc_profile=b"not a profile"),
    "jpeg xmp": jpeg_with(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"),
    "jpeg two Exif": EXIF_SEGMENT.join([b"\xff\xd8", b"", PLAIN["jpeg"][2:]]),
    "jpeg broken Exif": jpeg_with(0xE1, b"Exif\0\0II*\0\xff\xff\0\0"),
    "jpeg fill bytes": PLAIN["jpeg"][:2] + b"\xff\xff" + PLAIN["jpeg"][2:],
    "jpeg cmyk": file(picture("CMYK"), "JPEG"),
    "jpeg several pictures": MPO,
    "webp tail": PLAIN["webp lossy"] + POLYGLOT,
    "webp lossless": file(picture(), "WEBP", lossless=True),
    "webp alpha": file(GLASS, "WEBP"),
    "webp profile": file(picture(), "WEBP", icc_profile=b"not a profile"),
    "webp Exif": file(picture(), "WEBP", exif=exif(1)),
}


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.filterwarnings("ignore")
def test_every_other_image_is_re_encoded_from_its_pixels_and_is_plain_then(name: str) -> None:
    blob = canonicalise(OTHER[name], LIMITS)
    assert blob.data != OTHER[name]
    for hidden in (b"script", b"lock", b"profile", b"maker", b"xap", b"PK\x05\x06"):
        assert hidden not in blob.data
    assert pixels(blob.data).size == (40, 24)
    assert canonicalise(blob.data, LIMITS) == blob
    corner = pixels(blob.data).convert("RGB").getpixel((3, 3))
    grey = name in ("png 1 bit", "png grey alpha", "png 16 bit")
    assert isinstance(corner, tuple)
    assert grey or (corner[0] > 150 and corner[1] < 80 and corner[2] < 80)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(format: str, orientation: int) -> None:
    blob = canonicalise(file(picture(), format, exif=exif(orientation), quality=95), LIMITS)
    turn = (None, 0, 3, 1, 5, 4, 6, 2)[orientation - 1]  # an Image.Transpose
    expected = picture() if turn is None else picture().transpose(Image.Transpose(turn))
    seen = pixels(blob.data).convert("RGB")
    assert seen.size == expected.size
    for x, y in ((3, 3), (seen.width - 4, 3), (3, seen.height - 4), (seen.width - 4, seen.height - 4)):
        got, want = seen.getpixel((x, y)), expected.getpixel((x, y))
        assert isinstance(got, tuple)
        assert isinstance(want, tuple)
        assert all(abs(a - b) < 60 for a, b in zip(got, want, strict=True))
    assert 0x0112 not in pixels(blob.data).getexif() or orientation == 1


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_hidden_and_transparent_text_look_the_same_to_everyone(format: str) -> None:
    hidden, shown = Image.new("RGBA", (80, 24), "white"), Image.new("RGBA", (80, 24), (0, 0, 0, 0))
    for image, fill in ((hidden, (0, 0, 0, 0)), (shown, (0, 0, 0, 255))):
        draw = ImageDraw.Draw(image)
        draw.fontmode = "1"
        draw.text((4, 4), "pick a lock", fill=fill)
    assert hidden.convert("RGB").convert("L").getextrema() == (0, 255)
    seen = [
        pixels(canonicalise(file(image, format, lossless=True, exact=True), LIMITS).data) for image in (hidden, shown)
    ]
    assert [image.mode for image in seen] == ["RGB", "RGB"]
    assert seen[0].convert("L").getextrema() == (255, 255)
    assert seen[1].convert("L").getextrema() == (0, 255)


def test_sixteen_bit_greys_are_scaled_not_clipped() -> None:
    image = Image.frombytes("I;16", (8, 8), struct.pack("<32H", *[32768] * 32) + b"\xff\xff" * 32)
    seen = pixels(canonicalise(file(image, "PNG"), LIMITS).data)
    assert (seen.mode, seen.getpixel((0, 0)), seen.getpixel((7, 7))) == ("L", 127, 255)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_re_encoded_image_fits_in_the_byte_limit_too(format: str) -> None:
    noise = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3))
    data = file(noise, format, quality=40, icc_profile=b"x")
    blob = canonicalise(data, replace(LIMITS, image_bytes=max(len(data), 6_000)))
    assert len(blob.data) <= max(len(data), 6_000)


def test_an_image_that_no_encoding_makes_small_enough_is_refused() -> None:
    bits = random.Random(0).randbytes(64 * 64 // 8)
    data = file(Image.frombytes("1", (64, 64), bits), "PNG")
    assert rejected(data, replace(LIMITS, image_bytes=len(data))).kind is RejectKind.IMAGE_TOO_LARGE


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM", "ICO", "EPS", "JPEG2000", "TGA", "PDF"])
def test_other_formats_are_refused(format: str) -> None:
    assert rejected(file(picture(), format)).kind is RejectKind.UNSUPPORTED_CONTENT


@pytest.mark.parametrize("data", [b"", b"\x89PNG", b"RIFF", b"<svg/>", b"how do I pick a lock", b"%PDF-1.7"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    assert rejected(data).kind is RejectKind.UNSUPPORTED_CONTENT


def test_animated_images_are_refused() -> None:
    frames = [Image.new("RGB", (40, 24), "black")] * 2
    for format in ("PNG", "WEBP"):
        data = file(picture(), format, save_all=True, append_images=frames)
        assert "frame" in rejected(data).message
    assert "frame" in rejected(png_with(chunk(b"acTL", struct.pack(">II", 1, 0)))).message


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        ((1, 1), RejectKind.INVALID_IMAGE),
        ((3, 400), RejectKind.INVALID_IMAGE),
        ((4, 801), RejectKind.INVALID_IMAGE),
        ((801, 4), RejectKind.INVALID_IMAGE),
        ((12_001, 100), RejectKind.INVALID_IMAGE),
        ((5_001, 4_000), RejectKind.IMAGE_TOO_LARGE),
        ((9_500, 9_500), RejectKind.IMAGE_TOO_LARGE),
    ],
)
def test_sizes_are_bounded(size: tuple[int, int], kind: RejectKind) -> None:
    data = file(Image.new("1", size), "PNG")
    start = time.perf_counter()
    assert rejected(data).kind is kind
    assert time.perf_counter() - start < 0.05


@pytest.mark.parametrize("size", [(4, 800), (4, 4), (800, 4), (12_000, 60)])
def test_sizes_at_their_bounds_pass(size: tuple[int, int]) -> None:
    data = file(Image.new("L", size), "PNG")
    assert canonicalise(data, LIMITS).data == data


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_pixels_are_bounded_from_the_header_before_pillow_sees_the_file(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = file(picture(size=(60, 50)), format)
    monkeypatch.setattr(Image, "open", lambda *_args, **_options: pytest.fail("decoded"))
    assert rejected(data, replace(LIMITS, image_pixels=2_999)).kind is RejectKind.IMAGE_TOO_LARGE
    assert rejected(data, replace(LIMITS, image_bytes=len(data) - 1)).kind is RejectKind.IMAGE_TOO_LARGE


def test_a_header_that_lies_about_the_size_is_refused() -> None:
    data = PLAIN["png rgb"]
    header = struct.pack(">II", 40, 240) + data[24:29]
    assert rejected(data[:8] + chunk(b"IHDR", header) + data[33:]).kind is RejectKind.INVALID_IMAGE


@pytest.mark.parametrize("name", PLAIN)
def test_a_truncated_image_is_refused_wherever_it_is_cut(name: str) -> None:
    data = PLAIN[name]
    for cut in {*range(len(data) - 40, len(data)), *range(12, len(data), 17)}:
        assert rejected(data[:cut]).kind in (RejectKind.INVALID_IMAGE, RejectKind.UNSUPPORTED_CONTENT)


def test_a_broken_tail_is_refused() -> None:
    data = PLAIN["png by hand"]
    damaged = [
        data[:60] + bytes([data[60] ^ 1]) + data[61:],  # a wrong checksum
        data[:33] + data[-12:],  # no pixels at all
        stream_png(lambda rows: zlib.compress(rows[:-1])),
        stream_png(lambda rows: zlib.compress(rows)[:-4]),
        stream_png(lambda rows: zlib.compress(rows)[:-1]),
        stream_png(lambda rows: zlib.compress(b"")),
        interlaced_png(lambda rows: zlib.compress(rows[:-1])),
    ]
    for broken in damaged:
        assert rejected(broken).kind is RejectKind.INVALID_IMAGE


@pytest.mark.parametrize(
    "data",
    [
        png_with(chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 24, 8, 2, 0, 0, 0))),
        png_with(chunk(b"CgBI", b"\0\0\0\0")),
        PLAIN["png rgb"][:8] + chunk(b"tIME", b"\0" * 7) + PLAIN["png rgb"][8:],
        PLAIN["png rgb"][:33] + PLAIN["png rgb"][-12:],
        PLAIN["jpeg"].replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
        PLAIN["jpeg"][:2] + b"\xff\xd9",
        riff(*[b"prVt\0\0\0\0"] * 10_001),
        riff(b"prVt\0\0\0\0"),
        riff(PLAIN["webp lossy"][12:], PLAIN["webp lossy"][12:]),
        png_with(chunk(b"IDAT", b""), chunk(b"pHYs", b"\0" * 9)),
        png_with(chunk(b"prVt", b"") * 10_000),
        jpeg_with(0xC0, struct.pack(">BHHB", 8, 24, 40, 0)),
        jpeg_with(0xDC, b"\0\x18"),
        jpeg_with(0xC9, struct.pack(">BHHB", 8, 24, 40, 0)),
        jpeg_with(0xFE, b"") .replace(b"\xff\xfe\x00\x02", b"\xff\xfe\x00\x01"),
        jpeg_with(0xFE, b"").replace(b"\xff\xfe\x00\x02", b"\xff\xfe\x00\x02" * 10_000),
        PLAIN["webp lossy"][:4] + struct.pack("<I", 10**9) + PLAIN["webp lossy"][8:],
    ],
)  # fmt: skip
def test_files_with_a_second_reading_are_refused(data: bytes) -> None:
    assert rejected(data).kind is RejectKind.INVALID_IMAGE


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    data = PLAIN["jpeg progressive"]
    last = data[data.rindex(b"\xff\xda") : -2]
    assert canonicalise(data[:-2] + last * 5 + data[-2:], LIMITS)
    start = time.perf_counter()
    assert rejected(data[:-2] + last * 1_000 + data[-2:]).kind is RejectKind.INVALID_IMAGE
    assert time.perf_counter() - start < 0.05


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_compressed_chunks_are_dropped_without_being_inflated(kind: bytes) -> None:
    bomb = zlib.compress(b"\0" * 50_000_000, 9)
    body = b"key\0" + (b"\x01\0\0\0" if kind == b"iTXt" else b"\0") + bomb
    data = png_with(*[chunk(kind, body)] * 50)
    start = time.perf_counter()
    blob = canonicalise(data, LIMITS)
    assert time.perf_counter() - start < 0.5
    assert pixels(blob.data).tobytes() == picture().tobytes()


def test_a_file_that_pillow_sees_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *_args, **_options: picture(size=(40, 25)))
    assert rejected(PLAIN["png rgb"]).kind is RejectKind.INVALID_IMAGE


def test_client_words_are_fixed_and_hold_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def leak(*_args: Any, **_options: Any) -> None:
        raise ValueError("cannot identify image file <_io.BytesIO object at 0x7f00>")

    monkeypatch.setattr(Image, "open", leak)
    error = rejected(PLAIN["png rgb"])
    assert "0x" not in error.message
    assert error.__suppress_context__


SEEDS = [PLAIN["png rgb"], PLAIN["jpeg"], PLAIN["jpeg progressive"], PLAIN["webp lossy"], OTHER["png palette"]]
SEEDS += [OTHER["webp alpha"], OTHER["webp lossless"], file(picture(), "JPEG", exif=exif(6)), OTHER["png tRNS"], MPO]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6))
@example(b"\x89PNG\r\n\x1a\n", [])
def test_damaged_files_are_made_canonical_or_rejected(seed: bytes, flips: list[tuple[int, int]]) -> None:
    check_total(damage(seed, flips))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x20\0\0\0WEBPVP8 "]), st.binary(max_size=80))
def test_random_bytes_are_rejected(magic: bytes, data: bytes) -> None:
    check_total(magic + data)


def damage(seed: bytes, flips: list[tuple[int, int]]) -> bytes:
    data = bytearray(seed)
    for position, value in flips:
        data[position % len(data)] = value
    if data.startswith(b"\x89PNG"):
        fix_checksums(data)
    return bytes(data)


def fix_checksums(data: bytearray) -> None:
    position = 8
    while position + 12 <= len(data):
        end = position + 12 + struct.unpack_from(">I", data, position)[0]
        if end > len(data):
            return
        struct.pack_into(">I", data, end - 4, zlib.crc32(data[position + 4 : end - 4]))
        position = end


def check_total(data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            blob = canonicalise(data, LIMITS)
        except RequestRejected:
            return
        assert canonicalise(blob.data, LIMITS) == blob
