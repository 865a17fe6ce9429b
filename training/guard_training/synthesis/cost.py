"""What a run of the teacher will cost, before it starts. Estimates: four characters to a token, one answer per row."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table

from guard_training.corpus.rows import Row
from guard_training.synthesis.prompt import SYSTEM, messages, sent_size

_CHARACTERS, _PATCH = 4, 28


@dataclass(frozen=True, slots=True)
class Price:
    """Dollars (or whatever the prices are in) per million tokens."""

    prompt: float | None = None
    completion: float | None = None

    def of(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """None where a price is not known."""
        if self.prompt is None or self.completion is None:
            return None
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass(frozen=True, slots=True)
class Estimate:
    """``unlabelled``: rows of which the teacher decides every label."""

    rows: int = 0
    unlabelled: int = 0
    images: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


def unlabelled(row: Row) -> bool:
    """Whether a row has no label of what is there."""
    return row.request is None and not (row.response and row.response_label)


def prompt_tokens(row: Row, *, side: int, image_tokens: int | None) -> int:
    """Of one request. An image costs ``image_tokens``, or a token per 28 x 28 pixels as Qwen2.5-VL counts it.

    Raises ``CorpusError`` for an image that cannot be read.
    """
    text = messages(row, None)[1]["content"][0]["text"]
    tokens = math.ceil((len(SYSTEM) + len(text)) / _CHARACTERS)
    if row.image is not None:
        width, height = sent_size(row.image, side)
        tokens += image_tokens or math.ceil(width / _PATCH) * math.ceil(height / _PATCH)
    return tokens


def estimate(rows: Iterable[tuple[Row, int]], expected: int) -> Estimate:
    """Of rows with their ``prompt_tokens``, where an answer has ``expected`` tokens."""
    listed = list(rows)
    return Estimate(
        rows=len(listed),
        unlabelled=sum(unlabelled(row) for row, _ in listed),
        images=sum(row.image is not None for row, _ in listed),
        prompt_tokens=sum(tokens for _, tokens in listed),
        completion_tokens=expected * len(listed),
    )


def table(found: Estimate, price: Price) -> Table:
    """The estimate as it is shown."""
    out = Table(title="What the teacher will cost, about")
    for column in ("rows", "without a label", "images", "prompt tokens", "completion tokens", "cost"):
        out.add_column(column, justify="right")
    cost = price.of(found.prompt_tokens, found.completion_tokens)
    numbers = found.rows, found.unlabelled, found.images, found.prompt_tokens, found.completion_tokens
    out.add_row(*(f"{number:,}" for number in numbers), "unknown" if cost is None else f"{cost:,.2f}")
    if cost is None:
        out.caption = "for the cost, give --price-prompt and --price-completion"
    return out
