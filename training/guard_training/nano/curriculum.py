"""The training of a tower that reads: from single glyphs to strings, words and lines, measured as it goes.

Every batch is drawn from the seed and its step, so a resumed run sees the same ones and goes on with the same losses.

Refuses: a folder that holds a run, unless it is to go on; a checkpoint of other settings.
"""

# ruff: noqa: S311 - the draws must repeat for a seed, not resist guessing
from __future__ import annotations

import io
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from guard_training.nano.glyphs import SLOTS, Labelled, Texts, draw
from guard_training.nano.reading import (
    Batch,
    ReadingTower,
    TowerShape,
    measure,
    processor,
    reading_loss,
    to_batch,
)
from guard_training.nano.render import HELD_OUT_FONTS, TRAIN_FONTS
from guard_training.rowfile import write_whole


class TowerError(ValueError):
    """A run that cannot go on; the message names the remedy."""


@dataclass(frozen=True, slots=True)
class Stage:
    """``share`` of the steps; ``mix`` draws the kind of each image; ``ctc`` weighs that loss beside the dense one."""

    name: str
    share: float
    mix: Mapping[str, float]
    ctc: float


CURRICULUM = (
    Stage("glyphs", 0.08, {"glyphs": 1.0}, 0.0),
    Stage("strings", 0.32, {"glyphs": 0.1, "strings": 0.9}, 0.3),
    Stage("words", 0.30, {"strings": 0.3, "words": 0.7}, 1.0),
    Stage("lines", 0.30, {"strings": 0.1, "words": 0.4, "lines": 0.5}, 1.0),
)


@dataclass(frozen=True, slots=True)
class TowerSettings:
    """Constants of a run. ``patches`` (14 x 14 pixels) bound one batch."""

    seed: int = 7
    steps: int = 7000
    patches: int = 1024
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.02
    blank_weight: float = 0.3
    save_every: int = 100
    measure_every: int = 350
    measured: int = 24
    shape: TowerShape = field(default_factory=TowerShape)

    def stage(self, step: int) -> Stage:
        """The stage of a step (from 0)."""
        end = 0.0
        for stage in CURRICULUM:
            end += stage.share
            if step < round(end * self.steps):
                return stage
        return CURRICULUM[-1]

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine down to a twentieth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def draw_batch(settings: TowerSettings, step: int, texts: Texts) -> list[Labelled]:
    """The images of a step; the same for the same seed."""
    rng = random.Random(f"{settings.seed}/{step}")
    mix = settings.stage(step).mix
    drawn: list[Labelled] = []
    patches = 0
    while patches < settings.patches:
        drawn.append(draw(rng.choices(list(mix), list(mix.values()))[0], texts, TRAIN_FONTS, rng))
        patches += drawn[-1].labels.size // SLOTS * 4
    return drawn


class Draws(Dataset[Batch]):
    """The batches of the steps from ``first`` on."""

    def __init__(self, settings: TowerSettings, texts: Texts, first: int) -> None:
        self._settings, self._texts, self._first, self._processor = settings, texts, first, processor()

    def __len__(self) -> int:
        return self._settings.steps - self._first

    def __getitem__(self, number: int) -> Batch:
        if number >= len(self):
            raise IndexError(number)
        return to_batch(draw_batch(self._settings, self._first + number, self._texts), self._processor)


@dataclass(slots=True)
class Progressed:
    """What a run has seen so far."""

    step: int = 0
    images: int = 0
    glyphs: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)


def train_tower(
    output: Path,
    settings: TowerSettings,
    texts: Texts,
    unseen: Texts,
    *,
    resume: bool = False,
    minutes: float | None = None,
    workers: int = 0,
    tell: Callable[[Progressed, str], None] = lambda seen, stage: None,
) -> tuple[ReadingTower, Progressed]:
    """Trains and returns the tower; ``output/checkpoint.pt`` goes on with ``resume``.

    ``minutes`` ends this call early, after a checkpoint; ``workers`` processes draw (0: this one). A GPU is used where
    there is one. Measured on ``unseen`` texts in held-out fonts. Raises
    ``TowerError`` for a checkpoint that is in the way or of other settings.
    """
    file = output / "checkpoint.pt"
    output.mkdir(parents=True, exist_ok=True)
    if file.exists() and not resume:
        raise TowerError(f"{file} holds a run; go on with --resume, or give another folder")
    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tower, seen = ReadingTower(settings.shape).to(device), Progressed()
    optimizer = torch.optim.AdamW(tower.parameters(), weight_decay=settings.weight_decay, betas=(0.9, 0.98))
    if file.exists():
        seen = _load(file, settings, tower, optimizer)
    started, before = time.monotonic(), seen.seconds
    for batch in DataLoader(Draws(settings, texts, seen.step), batch_size=None, num_workers=workers):
        if minutes is not None and time.monotonic() - started >= 60 * minutes:
            break
        stage = settings.stage(seen.step)
        seen.losses.append(_step(tower.train(), optimizer, batch.to(device), settings, seen.step))
        seen.step, seen.images = seen.step + 1, seen.images + len(batch.shapes)
        seen.glyphs += int((batch.labels > 0).sum())
        seen.seconds = before + time.monotonic() - started
        if seen.step % settings.measure_every == 0 or seen.step == settings.steps:
            figures = measure(tower, unseen, HELD_OUT_FONTS, settings.measured)
            facts = {"step": seen.step, "stage": stage.name, "images": seen.images, "glyphs": seen.glyphs}
            loss = sum(seen.losses[-50:]) / len(seen.losses[-50:])
            seen.curve.append({**facts, "seconds": round(seen.seconds), "loss": round(loss, 4), "held_out": figures})
        if seen.step % settings.save_every == 0 or seen.step == settings.steps:
            _save(file, settings, tower, optimizer, seen)
        tell(seen, stage.name)
    _save(file, settings, tower, optimizer, seen)
    return tower, seen


def _step(
    tower: ReadingTower, optimizer: torch.optim.Optimizer, batch: Batch, settings: TowerSettings, step: int
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = settings.rate(step)
    loss = reading_loss(
        tower(batch.pixels, batch.grid), batch, ctc=settings.stage(step).ctc, blank_weight=settings.blank_weight
    )
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def _save(
    file: Path, settings: TowerSettings, tower: ReadingTower, optimizer: torch.optim.Optimizer, seen: Progressed
) -> None:
    buffer = io.BytesIO()
    state = {"tower": tower.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "seen": asdict(seen), "settings": asdict(settings)}, buffer)
    write_whole(file, buffer.getvalue())


def _load(file: Path, settings: TowerSettings, tower: ReadingTower, optimizer: torch.optim.Optimizer) -> Progressed:
    state = torch.load(file, weights_only=True, map_location="cpu")
    if state["settings"] != asdict(settings):
        changed = sorted(key for key, value in asdict(settings).items() if state["settings"].get(key) != value)
        raise TowerError(f"{file} was made with other settings ({', '.join(changed)}); give the same ones")
    tower.load_state_dict(state["tower"])
    optimizer.load_state_dict(state["optimizer"])
    return Progressed(**state["seen"])


def load_tower(output: Path) -> ReadingTower:
    """The tower of a run's folder."""
    state = torch.load(output / "checkpoint.pt", weights_only=True, map_location="cpu")
    tower = ReadingTower(TowerShape(**state["settings"]["shape"]))
    tower.load_state_dict(state["tower"])
    return tower.eval()
