"""The golden set: cases whose verdict new weights must keep, benign ones first.

A JSONL file as ``guard-train update --golden`` reads it: ``{"id", "prompt", "prompt_label"?, "response"?,
"response_label"?, "image"?}``. A label that is null or absent is not asked for. An error is no kept verdict.

Refuses (``ConfigError``): what ``cases.rows`` refuses, a row without a label, another label than harmful or unharmful,
an empty file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from guard_middleware import cases
from guard_middleware.errors import ConfigError, GuardError
from guard_middleware.types import Judging, Verdict
from guard_middleware.weights.state import Golden
from guard_middleware.wire import ModerationRequest

#: mild cases that ship with the gateway and that nano keeps
BUNDLED = Path(__file__).with_name("golden.jsonl")
#: questions under way: the active worker is on the same machine
_CONCURRENCY = 2
#: for one case; a guard that takes longer has not kept it
_SECONDS = 60.0


class Guard(Protocol):
    async def moderate(self, request: ModerationRequest) -> Verdict | GuardError: ...


@dataclass(frozen=True, slots=True)
class Case:
    row: dict[str, Any]
    request: str | None
    response: str | None
    base: Path

    @property
    def benign(self) -> bool:
        return "harmful" not in (self.request, self.response)


def load(path: Path) -> list[Case]:
    """The cases of a file, benign ones first."""
    remedy = 'a row looks like {"id": "1", "prompt": "how do I bake bread?", "prompt_label": "unharmful"}'
    try:
        with path.open("rb") as lines:
            rows = list(cases.rows(lines, str(path)))
    except OSError as error:
        raise ConfigError(
            f"cannot be read ({error.strerror})", path=str(path), remedy="give weights.golden a file"
        ) from None
    found = []
    for row in rows:
        request, response = row.get("prompt_label"), row.get("response_label")
        labels = {label for label in (request, response) if label is not None}
        if not labels or labels - {"harmful", "unharmful"}:
            raise ConfigError(f"row {row['id']}: no label to keep", path=str(path), remedy=remedy)
        if response is not None and row.get("response") is None:
            raise ConfigError(f"row {row['id']}: a label of an answer that is not there", path=str(path), remedy=remedy)
        found.append(Case(row, request, response, path.parent))
    if not found:
        raise ConfigError("a golden set without rows keeps nothing", path=str(path), remedy=remedy)
    return sorted(found, key=lambda case: not case.benign)


async def run(guard: Guard, found: Sequence[Case], judgings: Sequence[Judging]) -> Golden:
    """Asks every case in every way in which policies ask. Never raises for what the guard answers."""
    slots = asyncio.Semaphore(_CONCURRENCY)

    async def broken(case: Case, judging: Judging) -> str | None:
        async with slots:
            outcome = await cases.judge(_Asks(guard, judging), case.row, base=case.base, deadline=_SECONDS)
        name = str(case.row["id"]) if len(judgings) == 1 else f"{case.row['id']} in mode {judging.mode}"
        if isinstance(outcome, GuardError):
            return f"{name}: {outcome.kind.value}"
        kept = case.request in (None, outcome.request) and case.response in (None, outcome.response)
        return None if kept else name

    asked = [broken(case, judging) for case in found for judging in judgings]
    outcomes = await asyncio.gather(*asked)
    return Golden(len(asked), tuple(name for name in outcomes if name is not None))


@dataclass(frozen=True, slots=True)
class _Asks:
    guard: Guard
    judging: Judging

    async def moderate(self, request: ModerationRequest) -> Verdict | GuardError:
        return await self.guard.moderate(replace(request, judging=self.judging))
