"""What a guard said about each row, without the row: the record behind every table, audit and comparison.

One JSON object per line, one line per row. It names rows by id and never holds their text, the guard's reasoning or
the text drawn in an image, so it may be kept and passed on where the data may not.

Refuses: another label than harmful, unharmful or null, a score outside 0..1, one id twice in a file.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from guard_middleware.errors import GuardError
from guard_middleware.types import Label, Verdict
from guard_training.corpus.rows import Row, Skipped, read_lines
from guard_training.rowfile import write_whole

Modality = Literal["text", "image", "text_image"]
Side = Literal["request", "response"]
SIDES: tuple[Side, ...] = get_args(Side)


class OutcomeError(ValueError):
    """A file that does not hold outcomes; the message names the line."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row and what one revision of a guard said about it.

    ``request_label`` and ``response_label`` are the data's, None where it labels nothing; ``request`` and
    ``response`` the guard's, both None where it gave no verdict, and then ``error`` says why (a ``GuardErrorKind``).
    Scores are the guard's probability of *harmful*, 0..1, None where it gives none. ``seconds`` is from sending to
    answer, the worker's queue included; None where nobody measured it.
    """

    id: str
    source: str
    modality: Modality
    request_label: Label | None
    response_label: Label | None
    request: Label | None = None
    response: Label | None = None
    request_score: float | None = None
    response_score: float | None = None
    error: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning_tokens: int | None = None
    seconds: float | None = None
    model: str = ""
    revision: str = ""

    def label(self, side: Side) -> Label | None:
        """What the data says."""
        return self.request_label if side == "request" else self.response_label

    def called(self, side: Side) -> Label | None:
        """What the guard said; None for an error, or where no answer was judged."""
        return self.request if side == "request" else self.response

    def score(self, side: Side) -> float | None:
        return self.request_score if side == "request" else self.response_score


def modality(row: Row) -> Modality:
    """The paper's three kinds of content."""
    if row.image is None:
        return "text"
    return "text_image" if row.prompt or row.response else "image"


def blank(row: Row, *, model: str = "", revision: str = "", seconds: float | None = None) -> Outcome:
    """The row alone, nothing said about it yet. An answer nobody gave to judge has no label, whatever the row says."""
    return Outcome(
        id=row.id,
        source=row.source,
        modality=modality(row),
        request_label=row.request,
        response_label=row.response_label if row.response else None,
        seconds=seconds,
        model=model,
        revision=revision,
    )


def outcome(row: Row, answer: Verdict | GuardError, *, seconds: float | None, model: str, revision: str) -> Outcome:
    """The record of one answer."""
    start = blank(row, model=model, revision=revision, seconds=seconds)
    if isinstance(answer, GuardError):
        return dataclasses.replace(start, error=answer.kind.value)
    return dataclasses.replace(
        start,
        request=answer.request,
        response=answer.response,
        request_score=answer.request_score,
        response_score=answer.response_score,
        prompt_tokens=answer.usage.prompt,
        completion_tokens=answer.usage.completion,
        reasoning_tokens=answer.usage.reasoning,
    )


def to_json(value: Outcome) -> dict[str, Any]:
    return dataclasses.asdict(value)


def from_json(value: Mapping[str, Any]) -> Outcome:
    """Raises ``OutcomeError`` for anything that ``to_json`` did not write; keys left out mean their defaults."""
    known = {field.name for field in dataclasses.fields(Outcome)}
    unknown = sorted(set(value) - known)
    if unknown:
        raise OutcomeError(f"unknown key {unknown[0]!r}")
    try:
        return Outcome(
            id=_text(value["id"]),
            source=_text(value["source"]),
            modality=_one_of(value["modality"], get_args(Modality)),
            request_label=_label(value["request_label"]),
            response_label=_label(value["response_label"]),
            request=_label(value.get("request")),
            response=_label(value.get("response")),
            request_score=_score(value.get("request_score")),
            response_score=_score(value.get("response_score")),
            error=None if value.get("error") is None else _text(value["error"]),
            prompt_tokens=_count(value.get("prompt_tokens")),
            completion_tokens=_count(value.get("completion_tokens")),
            reasoning_tokens=_count(value.get("reasoning_tokens")),
            seconds=None if value.get("seconds") is None else float(value["seconds"]),
            model=_text(value.get("model", "")),
            revision=_text(value.get("revision", "")),
        )
    except KeyError as error:
        raise OutcomeError(f"{error.args[0]} is missing") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise OutcomeError(str(error)) from None


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Replaces the file, whole or not at all."""
    write_whole(path, "".join(json.dumps(to_json(one), ensure_ascii=False) + "\n" for one in outcomes).encode())


def read_outcomes(path: Path, skipped: Skipped) -> list[Outcome]:
    """Outcomes of a ``.jsonl`` or ``.jsonl.gz`` file, in order; a bad line goes to ``skipped``.

    Raises ``OutcomeError`` where no line is good.
    """
    found: dict[str, Outcome] = {}

    def new(value: Mapping[str, Any], where: str) -> Outcome:
        one = from_json(value)
        if one.id in found:
            raise OutcomeError(f"id {one.id!r} a second time")
        return one

    for one in read_lines(path, new, skipped, "an outcome"):
        found[one.id] = one
    if not found:
        raise OutcomeError(
            f"{path}: not an outcome in it; `guard-train evaluate --outcomes` writes them; {skipped.summary()}"
        )
    return list(found.values())


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise OutcomeError(f"{value!r} is not a text")
    return value


def _one_of(value: Any, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise OutcomeError(f"{value!r} is none of {', '.join(allowed)}")
    return value


def _label(value: Any) -> Label | None:
    return None if value is None else cast(Label, _one_of(value, get_args(Label)))


def _score(value: Any) -> float | None:
    if value is None:
        return None
    score = float(value)
    if not math.isfinite(score) or not 0.0 <= score <= 1.0:
        raise OutcomeError(f"the score {score} lies outside 0..1")
    return score


def _count(value: Any) -> int | None:
    if value is None:
        return None
    if type(value) is not int or value < 0:
        raise OutcomeError(f"{value!r} is not a count of tokens")
    return value
