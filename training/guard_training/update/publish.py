"""What ``guard-train publish`` does with a folder: make a revision of a bare guard, check one, copy it, push it.

What is made or copied already is not done again, so that a stopped command goes on behind it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from guard_middleware.weights import manifest
from guard_middleware.worker.calibration import read
from guard_middleware.worker.weights import ModelFacts
from guard_training.corpus.conversation import usable
from guard_training.corpus.rows import Row, Skipped, read_good_rows, sample
from guard_training.nano.bank import default_bank, read_bank
from guard_training.update import revision
from guard_training.update.calibration import calibration, kinds
from guard_training.update.card import Recipe, count_sources, licence_of, write_card
from guard_training.update.pipeline import Measure


class PublishError(ValueError):
    """A folder that cannot be published as asked; the message says what to give."""


@dataclass(frozen=True, slots=True)
class Making:
    """What a revision is made of beside the weights. ``calibration`` are rows that the guard was not trained on."""

    guard: Path
    results: tuple[Path, ...]
    made: str
    licence: str | None = None
    recipe: Path | None = None
    data: tuple[Path, ...] = ()
    bank: bool = False
    calibration: Path | None = None
    limits: str | None = None


def make(making: Making, target: Path, skipped: Skipped, measure: Measure) -> ModelFacts:
    """Makes the revision ``target`` of a bare guard's folder. Raises ``RevisionError``,
    ``PublishError``, ``CardError``."""
    facts = revision.check_loads(making.guard)
    summaries = {path.stem: _summary(path) for path in making.results}
    if len(summaries) < len(making.results):
        raise PublishError("two files of results have one name; rename one")
    rows = [row for path in making.data for row in read_good_rows(path, skipped)]
    rows += read_bank(default_bank()) if making.bank else []
    constants = _constants(making.recipe)
    fitted = _calibration(making, facts, rows, skipped, measure) if making.calibration else _kept(making.guard, facts)
    card = write_card(
        making.guard,
        licence=making.licence or licence_of(making.guard) or "other",
        sources=count_sources(rows),
        recipe=Recipe(_recipe_text(making.recipe), constants),
        summaries=list(summaries.values()),
        calibration=fitted,
        limits=making.limits,
    )
    files = [revision.data_file("training", path) for path in making.data]
    files += [revision.data_file("results", path) for path in making.results]
    files += [revision.data_file("calibration", making.calibration)] if making.calibration else []
    lineage = revision.lineage(facts=facts, base=None, data=files, recipe=constants or None, made=making.made)
    if not _made_before(target, card, lineage):
        revision.write_revision(making.guard, target, card=card, lineage=lineage, calibration=fitted, results=summaries)
    return facts


def _made_before(target: Path, card: str, lineage: Mapping[str, Any]) -> bool:
    """Whether the folder is a revision of the same weights, data, recipe and card, whenever it was made."""
    try:
        made, said = (
            json.loads((target / manifest.LINEAGE).read_text("utf-8")),
            (target / manifest.CARD).read_text("utf-8"),
        )
    except (OSError, ValueError):
        return False
    same = all(made.get(name) == lineage[name] for name in ("name", "revision", "base", "data", "recipe"))
    return same and said == card


def _summary(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text("utf-8"))
        value["sources"], value["revision"]
    except (ValueError, KeyError, TypeError):
        raise PublishError(f"{path}: no results of `guard-train evaluate --json`") from None
    return value


def _constants(recipe: Path | None) -> dict[str, Any]:
    if recipe is None:
        return {}
    value = yaml.safe_load(recipe.read_text("utf-8"))
    if not isinstance(value, dict):
        raise PublishError(f"{recipe}: a recipe is a mapping of names to constants")
    return value


def _recipe_text(recipe: Path | None) -> str:
    return f"`{recipe.name}`:" if recipe else "Not stated."


def _calibration(
    making: Making, facts: ModelFacts, rows: Sequence[Row], skipped: Skipped, measure: Measure
) -> Mapping[str, Any]:
    assert making.calibration is not None
    trained = {row.id for row in rows}
    found = usable(read_good_rows(making.calibration, skipped), skipped)
    kept = sample([row for row in found if row.id not in trained], limit=200)
    if not kept:
        raise PublishError(f"{making.calibration}: no usable row that is not among --data")
    journal = making.calibration.with_name(f"{making.calibration.name}.{facts.revision}.journal")
    outcomes = {kind: measure(kept, str(making.guard), journal, how) for kind, how in kinds(facts).items()}
    journal.unlink(missing_ok=True)
    return calibration(facts.revision, **outcomes)


def _kept(guard: Path, facts: ModelFacts) -> Mapping[str, Any] | None:
    """The calibration that the guard's folder has already, of these weights."""
    path = guard / manifest.CALIBRATION
    if not path.is_file():
        return None
    read(guard, facts.revision)
    kept: Mapping[str, Any] = json.loads(path.read_text("utf-8"))
    return kept


def copy(folder: Path, target: Path, done: Callable[[], object] = lambda: None) -> None:
    """Copies a revision, whole or not at all, and checks the copy; ``done`` is told of every file."""
    if target.exists():
        sums = target / manifest.SUMS
        if not sums.is_file() or sums.read_bytes() != (folder / manifest.SUMS).read_bytes():
            raise PublishError(f"{target} exists and is another; delete it or give another folder")
        revision.check_sums(target)
        return

    def one(source: str, place: str) -> None:
        shutil.copy2(source, place)
        done()

    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, part, copy_function=one)
    revision.check_sums(part)
    part.rename(target)
