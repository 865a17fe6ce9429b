"""Reasoning SFT on lessons: ``tuning.sft`` with conversations of several turns.

A stage of an update, in a process of its own: a GPU's memory does not outlive it, and ``--launch`` can give it many.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from guard_middleware.guard.prompt import Encoded, render
from guard_training.corpus.rows import Row, Skipped
from guard_training.nano.drawn import DrawnText, Read
from guard_training.rowfile import write_json
from guard_training.tuning import sft
from guard_training.tuning.contract import Contract, load_contract
from guard_training.tuning.settings import SftSettings, settings
from guard_training.update.corrections import whole
from guard_training.update.lessons import read_lessons

RECIPE, LESSONS, RUN = "sft.json", "lessons.jsonl", "sft"


@dataclass(frozen=True, slots=True)
class ChatContract(Contract):
    """The guard's contract for rows that may have several turns."""

    def encode(self, row: Row, drawn_text: Sequence[str] = ()) -> Encoded:
        return self.encoder.encode(render(whole(row), drawn_text))


def chat_contract(model: str, *, max_pixels: int | None) -> ChatContract:
    """Raises ``ContractError``."""
    found = load_contract(model, max_pixels=max_pixels)
    return ChatContract(**{field.name: getattr(found, field.name) for field in fields(Contract)})


def write_stage(folder: Path, recipe: SftSettings) -> None:
    """Notes the recipe beside the lessons."""
    write_json(folder / RECIPE, asdict(recipe))


def read_stage(folder: Path) -> SftSettings:
    value: dict[str, Any] = json.loads((folder / RECIPE).read_text("utf-8"))
    return settings(SftSettings, value, RECIPE)


def train_lessons(folder: Path, *, console: Console, read: Read | None = None, cpu: bool = False) -> Path:
    """Trains on ``folder/lessons.jsonl`` by ``folder/sft.json``; goes on from the last checkpoint of a stopped run.

    Returns ``folder/sft/model``. ``read`` reads an image's bytes, for a recipe with ``reader``.
    """
    recipe, lessons, skipped = read_stage(folder), folder / LESSONS, Skipped()
    sft.train(
        recipe,
        lessons,
        read_lessons(lessons, skipped),
        folder / RUN,
        skipped,
        console=console,
        # what was read for the rationales is not read again
        read=DrawnText(folder / "drawn.jsonl", read) if read else None,
        cpu=cpu,
        contract=chat_contract(recipe.model, max_pixels=recipe.max_pixels),
    )
    skipped.tell(console)
    return folder / RUN / "model"
