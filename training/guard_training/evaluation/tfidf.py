"""The baseline that every guard has to beat: TF-IDF of words and a logistic regression, one for each side.

Trained on the rows that nano is trained on (the bank and the passages among them), each label weighing one half and
each source the root of its size within its label, as in nano's lexicon. The request's threshold is moved as nano's
is: so that at most ``false_positives`` of the bank's held-out benign prompts are condemned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from guard_training.corpus.rows import Row, Skipped
from guard_training.nano.lexicon import balance
from guard_training.nano.recipe import Recipe
from guard_training.nano.rows import Rows, load_rows

#: Words of a text that are looked at; a long answer adds little.
_CHARACTERS = 8000


class BaselineError(ValueError):
    """A baseline that cannot be trained; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Side:
    """One classifier. A text is called harmful from ``threshold`` (a probability) on."""

    model: Any
    threshold: float = 0.5

    def scores(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """The probability of harm of each text."""
        found: NDArray[np.float64] = self.model.predict_proba([text[:_CHARACTERS] for text in texts])[:, 1]
        return found


@dataclass(frozen=True, slots=True)
class Baseline:
    """``response`` is None where no answer is labelled."""

    request: Side
    response: Side | None


def training_rows(files: Sequence[Path], recipe: Recipe, against: Sequence[Path], skipped: Skipped) -> Rows:
    """nano's rows of these files: bank and passages added, held-out rows and what ``against`` holds taken out."""
    return load_rows(Path(), replace(recipe, files=[str(path.resolve()) for path in files]), skipped, against)


def train(rows: Rows, recipe: Recipe, threshold: float | None = None) -> Baseline:
    """``threshold`` of the request; None is as nano's operating point.

    Raises ``BaselineError`` where a label is missing.
    """
    request = fit([(row.prompt, row.source, row.request == "harmful") for row in rows.prompts])
    pairs = [(row.response or "", row.source, row.response_label == "harmful") for row in rows.pairs]
    response = fit(pairs) if len({harmful for _, _, harmful in pairs}) == 2 else None
    if threshold is None:
        benign = [row.prompt for row in rows.held_out if row.source.startswith("bank_") and row.request == "unharmful"]
        threshold = _threshold(request, benign, recipe.false_positives)
    return Baseline(replace(request, threshold=threshold), response)


def fit(cases: Sequence[tuple[str, str, bool]]) -> Side:
    """One side's classifier from (text, source, harmful). Raises ``BaselineError``."""
    texts = [text[:_CHARACTERS] for text, _, _ in cases]
    harmful = [flag for _, _, flag in cases]
    if len(set(harmful)) < 2:
        raise BaselineError("the training rows have one label only; give harmful and unharmful rows")
    weights = len(cases) * np.asarray(balance([source for _, source, _ in cases], harmful, {}), dtype=np.float64)
    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2, strip_accents="unicode", dtype=np.float32),
        LogisticRegression(max_iter=1000),
    )
    try:
        model.fit(texts, harmful, logisticregression__sample_weight=weights)
    except ValueError as error:
        raise BaselineError(f"the training rows hold too few words ({error})") from None
    return Side(model)


def _threshold(side: Side, benign: Sequence[str], rate: float) -> float:
    """As nano's operating point: never below one half, since a margin is only ever lowered."""
    if not benign:
        return 0.5
    # above it, not from it on: many short prompts can have the same score
    return max(0.5, float(np.nextafter(np.quantile(side.scores(benign), 1 - rate), 1)))


def predict(baseline: Baseline, rows: Sequence[Row], drawn: Mapping[str, str]) -> Iterable[dict[str, Any]]:
    """Lines for ``guard-train evaluate --predictions``. ``drawn`` is what was read in rows' images, by row id."""
    asked = baseline.request.scores([f"{row.prompt}\n{drawn.get(row.id, '')}" for row in rows])
    answered: dict[str, float] = {}
    judged = [row for row in rows if row.response and row.response_label]
    if baseline.response and judged:
        said = baseline.response.scores([row.response or "" for row in judged]).tolist()
        answered = {row.id: score for row, score in zip(judged, said, strict=True)}
    for row, score in zip(rows, asked, strict=True):
        line = {"id": row.id, **_call("request", float(score), baseline.request.threshold)}
        if baseline.response and row.id in answered:
            line |= _call("response", answered[row.id], baseline.response.threshold)
        yield line


def _call(side: str, score: float, threshold: float) -> dict[str, Any]:
    return {f"{side}_score": score, side: "harmful" if score >= threshold else "unharmful"}
