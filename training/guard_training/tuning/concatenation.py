"""Safety-aware data concatenation (GuardReasoner-VL, section 4.2, equations 4 and 5): of two hard rows, a harder one.

Texts are joined, images merged, and the mix is harmful if either row is, for request and response separately. The
mixed labels stand in the new row, so a reward that reads the row's labels reads them (the released code keeps the
first row's). Rows are joined slot by slot, requests with requests and answers with answers: the guard is served one
transcript, and a second header inside it would be marked as an imitation.

Beyond the paper's side by side: other layouts, the order of the two rows, the gap between their images, and unharmful
rows as fillers between them. A text-only mix stays text only; the released code gives it a white pixel.

Refuses: rows without any label, and a mix that would have none; images that cannot be decoded or are too large.
"""

# ruff: noqa: S311 - the draws must repeat for a seed, not resist guessing
from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Literal, get_args

from PIL import Image

from guard_middleware.types import Label
from guard_training.corpus.conversation import image_size
from guard_training.corpus.rows import CorpusError, Row
from guard_training.rowfile import write_whole

Layout = Literal["side_by_side", "stacked", "grid", "inset"]
Order = Literal["drawn", "harmful_first", "harmful_last"]
Pairing = Literal["uniform", "opposed", "same"]
Across = Literal["any", "across", "within"]
LAYOUTS, ORDERS = get_args(Layout), get_args(Order)
PAIRINGS, ACROSS = get_args(Pairing), get_args(Across)

#: four corners take an inset each
_CORNERS = 4
_GRID_FILLERS = 2


@dataclass(frozen=True, slots=True)
class Options:
    """How rows are mixed; of each tuple one value is drawn per mix.

    ``gaps`` are pixels between the images before scaling. ``fillers`` are numbers of unharmful rows put between the
    two; empty means two (with images) for ``grid`` and none for the rest. ``side`` bounds the merged image in pixels
    (1024 in the released code). ``inset`` is the share of the base image's sides that an inset may take.
    """

    layouts: tuple[Layout, ...] = ("side_by_side",)
    orders: tuple[Order, ...] = ("drawn",)
    gaps: tuple[int, ...] = (0,)
    fillers: tuple[int, ...] = ()
    pairing: Pairing = "uniform"
    across: Across = "any"
    side: int = 1024
    inset: float = 0.4

    def __post_init__(self) -> None:
        if min(self.gaps) < 0 or min(self.fillers, default=0) < 0 or self.side < 28:
            raise ValueError("gaps and fillers are 0 or more, and the side of an image at least 28 pixels")
        if not 0 < self.inset < 1:
            raise ValueError("an inset's share of the image lies between 0 and 1")
        if "inset" in self.layouts and max(self.fillers, default=0) >= _CORNERS:
            raise ValueError(f"the inset layout has {_CORNERS} corners: give at most {_CORNERS - 1} fillers")


@dataclass(frozen=True, slots=True)
class Mix:
    """Two rows to be joined, in the order of the text, with what stands between them."""

    parents: tuple[Row, Row]
    fillers: tuple[Row, ...]
    layout: Layout
    order: Order
    gap: int

    @property
    def id(self) -> str:
        return f"mix:{self.parents[0].id}+{self.parents[1].id}"

    @property
    def members(self) -> tuple[Row, ...]:
        """All rows in it, in order."""
        return self.parents[0], *self.fillers, self.parents[1]

    def provenance(self) -> dict[str, object]:
        """What the new row says of its making. The layout is None where there is no image to lay out."""
        laid_out = any(row.image for row in self.members)
        return {
            "parents": [row.id for row in self.parents],
            "sources": [row.source for row in self.parents],
            "fillers": [row.id for row in self.fillers],
            "layout": self.layout if laid_out else None,
            "gap": self.gap if laid_out else None,
            "order": self.order,
        }


def either(first: Label | None, second: Label | None) -> Label | None:
    """Equation 5 with unknown labels: harmful if one is known to be; unharmful only if both are; else unknown."""
    if "harmful" in (first, second):
        return "harmful"
    return "unharmful" if first == second == "unharmful" else None


def request_label(rows: Sequence[Row]) -> Label | None:
    """The label of the rows' joined requests."""
    label: Label | None = "unharmful"
    for row in rows:
        label = either(label, row.request)
    return label


def response_label(rows: Sequence[Row]) -> Label | None:
    """The label of the rows' joined answers. A row without an answer adds nothing; without any, None."""
    answered = [row for row in rows if row.response]
    label: Label | None = "unharmful" if answered else None
    for row in answered:
        label = either(label, row.response_label)
    return label


def count_for(rows: int, share: float) -> int:
    """How many mixes make up ``share`` of the whole (the paper: 2,400 beside 9,600 rows are 20 %)."""
    if not 0 <= share < 1:
        raise ValueError("the share of mixed rows lies between 0 and 1, 1 excluded")
    return round(rows * share / (1 - share))


def plan(rows: Sequence[Row], count: int, options: Options, *, seed: int) -> list[Mix]:
    """``count`` different pairs of ``rows``; the same for the same arguments.

    Raises ``ValueError`` where the pairing leaves fewer, and where fillers are wanted and no row can be one.
    """
    rng, mixes, seen = random.Random(seed), list[Mix](), set[frozenset[str]]()
    fillers = [row for row in rows if row.request == "unharmful"]
    for _ in range(50 * count + 1000 if len(rows) > 1 else 0):
        if len(mixes) == count:
            return mixes
        pair = rng.sample(rows, 2)
        key = frozenset(row.id for row in pair)
        if key in seen or not _pairs(pair[0], pair[1], options):
            continue
        seen.add(key)
        mixes.append(_mix(pair, fillers, options, rng))
    if len(mixes) < count:
        raise ValueError(
            f"{len(rows)} rows give {len(mixes)} different {options.pairing} pairs ({options.across} modalities), "
            f"{count} are wanted; lower --share or choose another --pairing"
        )
    return mixes


def _pairs(first: Row, second: Row, options: Options) -> bool:
    if request_label((first, second)) is None and response_label((first, second)) is None:
        return False
    if options.across != "any" and (bool(first.image) != bool(second.image)) != (options.across == "across"):
        return False
    labels = overall(first), overall(second)
    if options.pairing == "uniform":
        return True
    return None not in labels and (labels[0] != labels[1]) == (options.pairing == "opposed")


def overall(row: Row) -> Label | None:
    """One label for a row: harmful if either side is known to be, unharmful if every side it has is known not to be."""
    return either(row.request, response_label((row,)) if row.response else row.request)


def _mix(pair: Sequence[Row], fillers: Sequence[Row], options: Options, rng: random.Random) -> Mix:
    layout, order, gap = rng.choice(options.layouts), rng.choice(options.orders), rng.choice(options.gaps)
    first, second = pair
    harmful = overall(first) == "harmful", overall(second) == "harmful"
    if order != "drawn" and harmful[0] != harmful[1] and harmful[0] != (order == "harmful_first"):
        first, second = second, first
    in_grid = layout == "grid" and bool(first.image or second.image)
    wanted = rng.choice(options.fillers) if options.fillers else _GRID_FILLERS * in_grid
    usable = [row for row in fillers if row.id not in (first.id, second.id) and (row.image or not in_grid)]
    if options.fillers and wanted and not usable:
        raise ValueError("no unharmful row can be a filler; give --fillers 0")
    return Mix((first, second), tuple(rng.sample(usable, min(wanted, len(usable)))), layout, order, gap)


def compose(mix: Mix, folder: Path, options: Options, *, separator: str = " ") -> Row:
    """The new row; its image (if any) is written to ``folder/images/<digest>.png``. Raises ``CorpusError``.

    Requests (and answers) are joined by ``separator``, one space in the released code. Fillers lend their request and
    image, not their answer, so that only the parents' answers are judged.
    """
    members, parents = mix.members, mix.parents
    harmful = [row for row in parents if overall(row) == "harmful"]
    images = [row.image for row in members if row.image]
    return Row(
        id=mix.id,
        source="concatenation",
        prompt=separator.join(row.prompt for row in members if row.prompt),
        request=request_label(members),
        response=separator.join(row.response for row in parents if row.response) or None,
        response_label=response_label(parents),
        category=next((row.category for row in harmful if row.category), None),
        licence="; ".join(sorted({row.licence for row in members if row.licence})),
        image=merge(images, mix.layout, mix.gap, folder, options) if images else None,
    )


Box = tuple[int, int, int, int]
Size = tuple[int, int]


def merge(images: Sequence[Path], layout: Layout, gap: int, folder: Path, options: Options) -> Path:
    """The images as one picture on white, a PNG named by its digest. Raises ``CorpusError``."""
    sizes = [image_size(image) for image in images]
    size, boxes = place(sizes, layout, gap=gap, side=options.side, inset=options.inset)
    canvas = Image.new("RGB", size, "white")
    # An inset is drawn on top of its base, which `place` gives the largest box.
    for image, box in sorted(zip(images, boxes, strict=True), key=lambda pair: -pair[1][2] * pair[1][3]):
        canvas.paste(_shrunk(image, (box[2], box[3])), box[:2])
    buffer = BytesIO()
    canvas.save(buffer, "PNG")
    data = buffer.getvalue()
    target = folder / "images" / f"{hashlib.sha256(data).hexdigest()[:32]}.png"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, data)
    return target


def place(sizes: Sequence[Size], layout: Layout, *, gap: int, side: int, inset: float) -> tuple[Size, list[Box]]:
    """Where each image goes: the canvas, and per image (left, top, width, height).

    The canvas fits into ``side`` x ``side`` and nothing is ever enlarged. ``side_by_side`` is aligned at the top and
    ``stacked`` at the left; ``grid`` centres each image in cells of one size; ``inset`` keeps the image of the largest
    area whole and puts the others into its corners.
    """
    if layout == "inset" and len(sizes) > 1:
        return _inset(sizes, gap, side, inset)
    corners = _corners(sizes, layout, gap)
    right = max(left + width for (left, _), (width, _) in zip(corners, sizes, strict=True))
    bottom = max(top + height for (_, top), (_, height) in zip(corners, sizes, strict=True))
    scale = min(1.0, side / right, side / bottom)
    canvas = _scaled((right, bottom), scale)
    boxes = []
    for (left, top), size in zip(corners, sizes, strict=True):
        width, height = _scaled(size, scale)
        # Rounding must not push a thin image over the edge.
        x, y = min(int(left * scale), canvas[0] - width), min(int(top * scale), canvas[1] - height)
        boxes.append((x, y, width, height))
    return canvas, boxes


def _corners(sizes: Sequence[Size], layout: Layout, gap: int) -> list[tuple[int, int]]:
    if layout == "grid":
        columns = math.ceil(math.sqrt(len(sizes)))
        wide, high = max(width for width, _ in sizes), max(height for _, height in sizes)
        return [
            (n % columns * (wide + gap) + (wide - width) // 2, n // columns * (high + gap) + (high - height) // 2)
            for n, (width, height) in enumerate(sizes)
        ]
    axis = 1 if layout == "stacked" else 0
    starts = accumulate((size[axis] + gap for size in sizes[:-1]), initial=0)
    return [(0, start) if axis else (start, 0) for start in starts]


def _inset(sizes: Sequence[Size], gap: int, side: int, share: float) -> tuple[Size, list[Box]]:
    base = max(range(len(sizes)), key=lambda number: sizes[number][0] * sizes[number][1])
    canvas = _scaled(sizes[base], min(1.0, side / sizes[base][0], side / sizes[base][1]))
    corners = iter([(1, 1), (0, 0), (1, 0), (0, 1)])
    boxes: list[Box] = []
    for number, size in enumerate(sizes):
        if number == base:
            boxes.append((0, 0, *canvas))
            continue
        width, height = _scaled(size, min(1.0, share * canvas[0] / size[0], share * canvas[1] / size[1]))
        right, bottom = next(corners)
        free = canvas[0] - width, canvas[1] - height
        margin = min(gap, free[0]), min(gap, free[1])
        x, y = free[0] - margin[0] if right else margin[0], free[1] - margin[1] if bottom else margin[1]
        boxes.append((x, y, width, height))
    return canvas, boxes


def _scaled(size: Size, scale: float) -> Size:
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def _shrunk(path: Path, size: Size) -> Image.Image:
    try:
        with Image.open(path) as opened:
            opened.draft("RGB", size)
            picture: Image.Image = opened
            if opened.has_transparency_data:
                picture = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened.convert("RGBA"))
            picture = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise CorpusError(f"{path.name} cannot be decoded") from None
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
