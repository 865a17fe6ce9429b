"""Images: the one set of bytes that guard and upstream both get.

``canonicalise`` reads the structure of a file itself, so that every bound is checked before a decoder runs, hands
Pillow only the parts that make pixels, and decodes in full. A plain image keeps its bytes; every other is
re-encoded from those pixels, which drops whatever a second decoder might read differently: tails, alpha,
orientation, colour profiles, metadata. The declared MIME type only has to be an allowed one; what is sent on is
named by the bytes.

Plain is: one frame; 8-bit RGB or grey; nothing after the image's end; and
- PNG: only IHDR, IDAT, IEND, pHYs, tIME, sRGB and a gAMA of 1/2.2 (no tRNS, iCCP, text, eXIf);
- JPEG: baseline or progressive Huffman, only JFIF, Adobe and upright Exif segments (no ICC, XMP, comment);
- WEBP: one lossy bitstream and no other chunk (lossless ones carry alpha that decoders treat differently).

Colour profiles are dropped, not applied: littlecms on untrusted profiles is more risk than a shade is worth.

Refuses:
- bytes, pixels, sides and aspect outside ``Limits``, before decoding; files that are not PNG, JPEG or WEBP;
- more than one frame (APNG, animated WEBP), JPEGs of more than ``_MAX_SCANS`` scans (a CPU bomb);
- truncated or broken files: wrong PNG checksums, missing PNG rows, no end marker, whatever Pillow cannot decode.
Not seen: damage inside a JPEG's entropy-coded data, which libjpeg paints over without telling.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

from PIL import Image, ImageOps

from guard_middleware.errors import RejectKind, RequestRejected
from guard_middleware.limits import Limits
from guard_middleware.types import Blob

_PNG_PLAIN = frozenset({b"IHDR", b"IDAT", b"IEND", b"pHYs", b"tIME", b"sRGB", b"gAMA"})
_PNG_KEPT = _PNG_PLAIN | {b"PLTE", b"tRNS", b"eXIf"}
_PNG_CRITICAL = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
_PNG_FRAMES = frozenset({b"acTL", b"fcTL", b"fdAT"})
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PNG_GAMMA = struct.pack(">I", 45455)
_JPEG_APPS = {0xE0: b"JFIF\0", 0xE1: b"Exif\0\0", 0xEE: b"Adobe"}
_JPEG_TABLES = frozenset({0xC4, 0xDB, 0xDD})  # DHT, DQT, DRI
_JPEG_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_MAX_PARTS = 10_000
_MAX_SCANS = 32
_MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


@dataclass(frozen=True, slots=True)
class _Scan:
    """What the structure of a file says. ``data`` is what a decoder gets: only the parts that make pixels."""

    format: Literal["PNG", "JPEG", "WEBP"]
    width: int
    height: int
    plain: bool
    lossy: bool
    data: bytes


def canonicalise(data: bytes, limits: Limits) -> Blob:
    """The one form of an image that guard and upstream both get; at most ``limits.image_bytes`` bytes.

    Raises ``RequestRejected`` (invalid_image, image_too_large, unsupported_content) with fixed words, nothing else.

    Blocks: call it in a thread, and bound how many run at once. Measured at 20 Mpx on one shared core: plain PNG or
    JPEG 0.1 s, a progressive JPEG of 32 scans 0.25 s, the worst that is re-encoded 1.0 s and 330 MB of memory;
    Pillow holds the GIL for less than 30 ms at a stretch.
    """
    if len(data) > limits.image_bytes:
        raise _too_large()
    try:
        scan = _scan(data)
        _check_bounds(scan, limits)
        with Image.open(BytesIO(scan.data), formats=(scan.format,)) as image:
            if image.size != (scan.width, scan.height) or getattr(image, "n_frames", 1) != 1:
                raise _invalid()
            image.load()
            exact = scan.format != "PNG" or _rows_are_exact(scan.data)
            if scan.plain and exact and image.mode in ("RGB", "L") and not image.has_transparency_data:
                return Blob(_MIME[scan.format], data)
            return _encode(_flatten(image), lossy=scan.lossy, limit=limits.image_bytes)
    except RequestRejected:
        raise
    except Exception:  # Pillow raises almost any type on broken files, and its texts hold heap addresses
        raise _invalid() from None


def _check_bounds(scan: _Scan, limits: Limits) -> None:
    short, long = sorted((scan.width, scan.height))
    if short * long > limits.image_pixels:
        raise RequestRejected(RejectKind.IMAGE_TOO_LARGE, "an image has too many pixels")
    if short < limits.image_min_side or long > limits.image_max_side or long > short * limits.image_max_aspect:
        raise _invalid("an image is too small, too long or too narrow")


def _flatten(image: Image.Image) -> Image.Image:
    """Upright RGB or L pixels: alpha over white, 16 bits scaled to 8."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        # convert("L") clips 16-bit values at 255, which turns most of them white. (tRNS is dropped here.)
        return image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        opaque = Image.new("RGB", image.size, "white")
        opaque.paste(rgba, mask=rgba)
        return opaque
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _encode(image: Image.Image, *, lossy: bool, limit: int) -> Blob:
    """The best of PNG (for lossless sources) and JPEG 90, 75, 50 that fits in ``limit`` bytes."""
    image.info = {}  # Pillow would write back comment and profile from there
    tries = [("JPEG", {"quality": 90}), ("JPEG", {"quality": 75}), ("JPEG", {"quality": 50})]
    for format, options in tries if lossy else [("PNG", {"compress_level": 1}), *tries]:
        file = BytesIO()
        image.save(file, format, **options)
        if file.tell() <= limit:
            return Blob(_MIME[format], file.getvalue())
    raise _too_large()


def _scan(data: bytes) -> _Scan:
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _scan_png(data)
        if data.startswith(b"\xff\xd8\xff"):
            return _scan_jpeg(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _scan_webp(data)
    except (struct.error, IndexError):
        raise _invalid() from None
    raise RequestRejected(RejectKind.UNSUPPORTED_CONTENT, "an image is not a PNG, JPEG or WEBP file")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, int]]:
    """(type, body, end offset) to IEND; every checksum is right."""
    end = 8
    for _ in range(_MAX_PARTS):
        start = end
        size, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + size
        (checksum,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(data[start + 4 : end - 4]) != checksum:
            break
        yield kind, data[start + 8 : end - 4], end
        if kind == b"IEND":
            return
    raise _invalid()


def _scan_png(data: bytes) -> _Scan:
    seen, last = set[bytes](), b""
    kept, plain, start = [data[:8]], True, 8
    for kind, body, end in _png_chunks(data):
        if kind in _PNG_FRAMES:
            raise _frames()
        known = kind in _PNG_CRITICAL
        # Critical chunks come once, except that IDAT may go on directly after IDAT.
        if (not known and kind[0] < 0x60) or (known and kind in seen and not kind == last == b"IDAT"):
            raise _invalid()
        if kind in _PNG_KEPT:
            kept.append(data[start:end])
        plain = plain and kind in _PNG_PLAIN and (kind != b"gAMA" or body == _PNG_GAMMA)
        if not seen and kind != b"IHDR":
            raise _invalid()
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack_from(">IIBB", body)
            plain = plain and depth == 8 and colour in (0, 2)
        seen.add(kind)
        last, start = kind, end
    if b"IDAT" not in seen:
        raise _invalid()
    return _Scan("PNG", width, height, plain and start == len(data), False, b"".join(kept))


def _rows_are_exact(data: bytes) -> bool:
    """Whether a PNG inflates to all its rows and nothing more; raises where rows are missing.

    Pillow paints missing rows black without telling, and ignores what follows the last row.
    """
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    expected = 0
    for x, y, dx, dy in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = (width - x + dx - 1) // dx, (height - y + dy - 1) // dy
        expected += rows * (1 + (columns * bits + 7) // 8) if columns else 0
    inflate = zlib.decompressobj()
    rest = b"".join(body for kind, body, _ in _png_chunks(data) if kind == b"IDAT")
    while rest and not inflate.eof and expected >= 0:
        expected -= len(inflate.decompress(rest, 1 << 20))
        rest = inflate.unconsumed_tail
    if expected > 0 or (expected == 0 and not inflate.eof):
        raise _invalid()
    return expected == 0 and not inflate.unused_data


def _scan_jpeg(data: bytes) -> _Scan:
    size: tuple[int, int] | None = None
    kept, scans, plain, apps, position = [data[:2]], 0, True, set[int](), 2
    for _ in range(_MAX_PARTS):
        if data[position] != 0xFF:
            raise _invalid()
        while data[position + 1] == 0xFF:
            position += 1
        marker = data[position + 1]
        if marker == 0xD9:
            kept.append(data[position : position + 2])
            break
        start, position = position, position + 2 + struct.unpack_from(">H", data, position + 2)[0]
        body = data[start + 4 : position]
        if position > len(data) or position < start + 4:
            raise _invalid()
        if marker in (0xC0, 0xC1, 0xC2) and size is None:
            depth, height, width, components = struct.unpack_from(">BHHB", body)
            if depth != 8:
                raise _invalid()
            size, plain = (width, height), plain and components in (1, 3)
        elif marker == 0xDA and size is not None:
            scans += 1
            end = _JPEG_SCAN_END.search(data, position)
            if end is None or scans > _MAX_SCANS:
                raise _invalid()
            position = end.start()
        elif 0xE0 <= marker <= 0xEF or marker == 0xFE:
            prefix = _JPEG_APPS.get(marker)
            if prefix is None or marker in apps or not body.startswith(prefix):
                continue
            apps.add(marker)
            plain = plain and (marker != 0xE1 or _upright(body[6:]))
        elif marker not in _JPEG_TABLES:
            raise _invalid()
        kept.append(data[start:position])
    if size is None or not scans or kept[-1] != b"\xff\xd9":
        raise _invalid()
    essential = b"".join(kept)
    return _Scan("JPEG", *size, plain and len(essential) == len(data), True, essential)


def _upright(exif: bytes) -> bool:
    """Whether well-formed Exif holds no orientation, or orientation 1."""
    try:
        order = {b"II*\0": "<", b"MM\0*": ">"}[exif[:4]]
        (offset,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, offset)
        entries = [struct.unpack_from(order + "HHIH", exif, offset + 2 + 12 * i) for i in range(count)]
    except (KeyError, struct.error):
        return False
    return all(entry[0] != 0x0112 or entry[1:] == (3, 1, 1) for entry in entries)


def _scan_webp(data: bytes) -> _Scan:
    (size,) = struct.unpack_from("<I", data, 4)
    stop = 8 + size
    if stop > len(data):
        raise _invalid()
    chunks: list[bytes] = []
    frames: list[tuple[int, int]] = []
    canvas: tuple[int, int] | None = None
    position = 12
    while position < stop:
        kind, size = struct.unpack_from("<4sI", data, position)
        body = data[position + 8 : position + 8 + size]
        position += 8 + size + size % 2
        chunks.append(kind)
        if kind in (b"ANIM", b"ANMF") or (kind == b"VP8X" and body[0] & 2):
            raise _frames()
        if kind == b"VP8X":
            canvas = (1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little"))
        elif kind == b"VP8 ":
            width, height = struct.unpack_from("<HH", body, 6)
            frames.append((width & 0x3FFF, height & 0x3FFF))
        elif kind == b"VP8L":
            (bits,) = struct.unpack_from("<I", body, 1)
            frames.append((1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)))
        if len(chunks) > _MAX_PARTS:
            raise _invalid()
    if len(frames) != 1 or position != stop or canvas not in (None, frames[0]):
        raise _invalid()
    plain = chunks == [b"VP8 "] and stop == len(data)
    return _Scan("WEBP", *frames[0], plain, b"VP8 " in chunks, data[:stop])


def _too_large() -> RequestRejected:
    return RequestRejected(RejectKind.IMAGE_TOO_LARGE, "an image exceeds the size limit")


def _invalid(message: str = "an image is broken or cannot be decoded") -> RequestRejected:
    return RequestRejected(RejectKind.INVALID_IMAGE, message)


def _frames() -> RequestRejected:
    return RequestRejected(RejectKind.INVALID_IMAGE, "an image has more than one frame")
