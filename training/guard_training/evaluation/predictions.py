"""Another model's answers to the same rows, from a file: a baseline, a hosted moderation API, a guard run elsewhere.

One JSON object per line, joined to the rows by ``id``, with any of:

- ``request_score``, ``response_score``: probability of harmful, 0..1; at least 0.5 is a call of harmful,
- ``request``, ``response``: the call itself, which then stands whatever the score is,
- ``output``: a reasoning guard's whole text, read by the mode's rules (strict: the product's own parser); what it says
  is the call, and what it does not say no other key says for it,
- ``error``: there is no verdict, whatever else the line says,
- ``prompt_tokens``, ``completion_tokens``, ``reasoning_tokens``, ``seconds``.

A file of outcomes (``evaluate --outcomes``) is such a file. Refuses: a line without an id, one id twice, another label,
a score outside 0..1, an output that is no text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.guard.parse import parse
from guard_training.corpus.rows import Row, Skipped, read_lines, row_id
from guard_training.evaluation.metrics import Mode, paper_label
from guard_training.evaluation.outcomes import SIDES, Outcome, OutcomeError, blank, from_json, to_json

THRESHOLD = 0.5
#: a row that the file says nothing about
MISSING = "missing"
_TAKEN = (
    "request", "response", "request_score", "response_score", "error", "prompt_tokens", "completion_tokens",
    "reasoning_tokens", "seconds", "revision",
)  # fmt: skip


def read_predictions(path: Path, name: str, rows: Sequence[Row], mode: Mode, skipped: Skipped) -> list[Outcome]:
    """One outcome per row, in order; ``error`` is ``missing`` where the file has no line for it, and that is wrong.

    Lines about other rows are passed over. Raises ``OutcomeError`` where no line fits a row.
    """
    lines: dict[str, tuple[str, Mapping[str, Any]]] = {}

    def new(value: Mapping[str, Any], where: str) -> tuple[str, tuple[str, Mapping[str, Any]]]:
        if (id := row_id(value.get("id"))) is None:
            raise OutcomeError("no text id")
        if id in lines:
            raise OutcomeError(f"id {id!r} a second time")
        return id, (where, value)

    for id, line in read_lines(path, new, skipped, "a prediction"):
        lines[id] = line
    outcomes = []
    for row in rows:
        start = blank(row, model=name)
        where, value = lines.get(row.id, ("", None))
        if value is None:
            outcomes.append(dataclasses.replace(start, error=MISSING))
            continue
        try:
            outcomes.append(_outcome(start, value, mode))
        except OutcomeError as error:
            skipped(f"{where}: {row.id}: {error}")
            outcomes.append(dataclasses.replace(start, error=MISSING))
    if not any(row.id in lines for row in rows):
        raise OutcomeError(f"{path}: no line has the id of a row of the data; ids must be those of the data file")
    return outcomes


def _outcome(start: Outcome, value: Mapping[str, Any], mode: Mode) -> Outcome:
    known = {key: value[key] for key in _TAKEN if value.get(key) not in (None, "")}
    output = value.get("output")
    if output is not None:
        known |= _read(output, start.response_label is not None, mode)
    given = from_json({**to_json(start), **known})
    if given.error is not None:
        return _without_verdict(given, given.error)
    for side in SIDES:
        score = given.score(side)
        if given.called(side) is None and score is not None and output is None:
            called = "harmful" if score >= THRESHOLD else "unharmful"
            given = dataclasses.replace(given, **{side: called})  # type: ignore[arg-type]
    silent = all(given.called(side) is None for side in SIDES if given.label(side) is not None)
    return _without_verdict(given, MISSING) if silent else given


def _without_verdict(one: Outcome, error: str) -> Outcome:
    return dataclasses.replace(one, request=None, response=None, request_score=None, response_score=None, error=error)


def _read(output: Any, answered: bool, mode: Mode) -> dict[str, Any]:
    if not isinstance(output, str):
        raise OutcomeError("the output is not a text")
    if mode == "paper":
        found: dict[str, Any] = {side: paper_label(output, side) for side in SIDES}
        return {**found, "error": None if any(found.values()) else GuardErrorKind.UNPARSEABLE.value}
    try:
        parsed = parse(output, answered=answered)
    except GuardError as error:
        return {"error": error.kind.value}
    return {"request": parsed.request, "response": parsed.response}
