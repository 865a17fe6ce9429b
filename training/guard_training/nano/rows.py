"""The rows that nano is trained on: the recipe's files and the bank, without what is held out or measured on."""

# ruff: noqa: S311 - the draws must repeat for a seed, not resist guessing
from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from guard_middleware.types import Label
from guard_training.corpus.conversation import judgeable
from guard_training.corpus.leakage import Fingerprints, find_leaks, readable
from guard_training.corpus.rows import Row, Skipped, held_out, passages, read_good_rows, unique_prompts
from guard_training.evaluation.against import evaluation_sets
from guard_training.nano.bank import default_bank, pair_of, read_bank
from guard_training.nano.lexicon import balance
from guard_training.nano.mixture import draw
from guard_training.nano.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Rows:
    """Training rows by what they are good for, and what is held out."""

    prompts: list[Row]
    pairs: list[Row]
    pictures: list[Row]
    held_out: list[Row]

    @property
    def harmful(self) -> list[bool]:
        """Of each prompt."""
        return [row.request == "harmful" for row in self.prompts]

    def weights(self, shares: Mapping[str, float]) -> list[float]:
        """Of each prompt in the fits to the labels, see ``lexicon.balance``."""
        return balance([row.source for row in self.prompts], self.harmful, shares)

    def by_label(self) -> dict[Label, list[Row]]:
        """The prompts of each label."""
        by_label: dict[Label, list[Row]] = {"harmful": [], "unharmful": []}
        for row in self.prompts:
            if row.request:
                by_label[row.request].append(row)
        return by_label


def load_rows(data: Path, recipe: Recipe, skipped: Skipped, against: Sequence[Path] = ()) -> Rows:
    """Rows of the recipe's files and of the bank, passages added; without those that a file of ``against`` holds.

    Bad lines, and rows whose image cannot be judged, go to ``skipped``. Raises ``CorpusError`` for a file of
    ``against`` without any row.
    """
    prints = Fingerprints()
    labelled = [row for name in recipe.files for row in read_good_rows(data / name, skipped)]
    seen = judgeable(readable(labelled, prints, skipped), skipped)
    rows = unique_prompts([*seen, *read_bank(default_bank())])
    leaked = {leak.id for leak in find_leaks(rows, evaluation_sets(against, prints, skipped), fingerprints=prints)}
    rows = [row for row in rows if row.source not in recipe.exclude and row.id not in leaked]

    def left_out(row: Row) -> bool:
        if row.source.startswith("bank_"):
            return held_out(pair_of(row.id), recipe.held_out_bank)
        return held_out(row.id, recipe.held_out)

    kept = [row for row in rows if not left_out(row)]
    rest = [row for row in rows if left_out(row)]
    rng = random.Random(recipe.seed)
    kept += passages(kept, rng)
    rest += passages(rest, rng)
    return Rows(
        prompts=[row for row in kept if row.request and row.prompt and not row.image],
        pairs=[row for row in kept if row.response and row.response_label],
        pictures=[row for row in kept if row.image],
        held_out=rest,
    )


def draw_prompts(rows: Rows, recipe: Recipe, count: int, rng: random.Random) -> list[Row]:
    """Rows of both labels in the recipe's shares, the harmful ones first."""
    by_label, harmful = rows.by_label(), int(count * recipe.harmful_share)
    return draw(by_label["harmful"], recipe.source_shares, recipe.power, harmful, rng) + draw(
        by_label["unharmful"], recipe.source_shares, recipe.power, count - harmful, rng
    )


def draw_pairs(rows: Rows, recipe: Recipe, count: int, rng: random.Random) -> list[Row]:
    """Pairs of prompt and answer, as many with a harmful answer as without, the harmful ones first."""
    harmful = [row for row in rows.pairs if row.response_label == "harmful"]
    unharmful = [row for row in rows.pairs if row.response_label == "unharmful"]
    return draw(harmful, recipe.source_shares, recipe.power, count // 2, rng) + draw(
        unharmful, recipe.source_shares, recipe.power, count - count // 2, rng
    )
