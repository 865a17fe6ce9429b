"""The bank: prompts written for this project, in ``training/bank/*.yaml``.

Three shapes of file. ``{topic: [prompt, ...]}`` holds unharmful prompts; ``{category: [{harmful, unharmful}, ...]}``
holds pairs of nearly the same words whose labels differ; ``{topic: [{prompt, harmful, unharmful}, ...]}`` holds an
unsafe and a safe answer to a prompt that is not labelled itself. Refuses any other shape.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from guard_training.corpus.rows import CorpusError, Row

_LICENCE = "Apache-2.0"


def default_bank() -> Path:
    """The bank's folder: in the repository, or in the installed package."""
    here = Path(__file__).resolve().parents[1]
    return next((path for path in (here.parent / "bank", here / "bank") if path.is_dir()), here / "bank")


def read_bank(folder: Path) -> list[Row]:
    """All rows of the folder's files; the source of a row is ``bank_`` and its file's kind. Raises ``CorpusError``."""
    rows: list[Row] = []
    for path in sorted(folder.glob("*.yaml")):
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise CorpusError(f"{path.name}: a file of the bank maps topics to lists")
        for topic, entries in value.items():
            for number, entry in enumerate(entries):
                rows += _rows(entry, f"{path.stem}/{topic}/{number}", topic, path)
    return rows


def pair_of(id: str) -> str:
    """What the two rows of a pair have in common, so that both are held out or neither."""
    return id.removesuffix("/harmful").removesuffix("/unharmful")


def _rows(entry: object, id: str, topic: str, path: Path) -> list[Row]:
    match entry:
        case str(text):
            source = "_".join(["bank", *path.stem.split("_")[:2]])
            return [Row(id, source, text, "unharmful", category=topic, licence=_LICENCE)]
        case {"harmful": str(harmful), "unharmful": str(unharmful), **rest} if not rest:
            return [
                Row(f"{id}/harmful", "bank_contrast", harmful, "harmful", category=topic, licence=_LICENCE),
                Row(f"{id}/unharmful", "bank_contrast", unharmful, "unharmful", category=topic, licence=_LICENCE),
            ]
        case {"prompt": str(prompt), "harmful": str(harmful), "unharmful": str(unharmful), **rest} if not rest:
            return [
                Row(f"{id}/harmful", "bank_answers", prompt, None, harmful, "harmful", topic, _LICENCE),
                Row(f"{id}/unharmful", "bank_answers", prompt, None, unharmful, "unharmful", topic, _LICENCE),
            ]
    raise CorpusError(f"{path.name}: {id}: neither a prompt nor a pair of harmful and unharmful")
