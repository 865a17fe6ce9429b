"""The golden set: cases whose verdict new weights must keep, benign ones first.

A JSONL file as ``guard-train update --golden`` reads it: ``{"id", "prompt", "prompt_label"?, "response"?,
"response_label"?, "image"?}``. A label that is null or absent is not asked for. A case is put as every policy would put
it, and is kept where each would act as the label says: harmful from its threshold on. An error is no kept verdict.

Refuses (``ConfigError``): what ``cases.rows`` refuses, a row without a label, another label than harmful or unharmful,
an empty file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from guard_middleware import cases
from guard_middleware.errors import ConfigError, GuardError
from guard_middleware.policy import risk
from guard_middleware.types import REASON, Judging, Source, Verdict
from guard_middleware.weights.state import Golden
from guard_middleware.wire import Guard, ModerationRequest

#: mild cases that ship with the gateway and that nano keeps
BUNDLED = Path(__file__).with_name("golden.jsonl")
#: questions under way: the active worker is on the same machine
_CONCURRENCY = 2
#: for one case; a guard that takes longer has not kept it
_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Asking:
    """How a policy asks about one source, and from which score on it holds the content to be harmful."""

    source: Source
    judging: Judging = REASON
    threshold: float = 0.5
    reader: bool | None = None

    def harmful(self, verdict: Verdict, source: Source) -> bool | None:
        """None where the verdict says nothing usable of ``source``."""
        value = risk(verdict, source)
        return None if value is None else value >= self.threshold


@dataclass(frozen=True, slots=True)
class Case:
    """``asked`` is how policies ask about it; empty where none does."""

    row: dict[str, Any]
    request: str | None
    response: str | None
    base: Path
    asked: tuple[Asking, ...] = ()

    @property
    def source(self) -> Source:
        return "input" if self.row.get("response") is None else "output"

    @property
    def benign(self) -> bool:
        return "harmful" not in (self.request, self.response)


def load(path: Path, askings: Sequence[Asking] = ()) -> list[Case]:
    """The cases of a file, benign ones first, each with those of ``askings`` that are about its source."""
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
        case = Case(row, request, response, path.parent)
        found.append(replace(case, asked=tuple(one for one in askings if one.source == case.source)))
    if not found:
        raise ConfigError("a golden set without rows keeps nothing", path=str(path), remedy=remedy)
    return sorted(found, key=lambda case: not case.benign)


async def run(guard: Guard, found: Sequence[Case]) -> Golden:
    """Asks every case in every way in which policies ask; where none does, with reasoning.

    Never raises for what the guard answers.
    """
    slots = asyncio.Semaphore(_CONCURRENCY)

    async def broken(case: Case, ways: Sequence[Asking], told: str) -> str | None:
        async with slots:
            outcome = await cases.judge(_Asks(guard, ways[0]), case.row, base=case.base, deadline=_SECONDS)
        name = f"{case.row['id']}{told}"
        if isinstance(outcome, GuardError):
            return f"{name}: {outcome.kind.value}"
        lost = [way.threshold for way in ways if not _kept(case, way, outcome)]
        if not lost:
            return None
        return name if len(ways) == 1 else f"{name} at {', '.join(f'{one:g}' for one in lost)}"

    asked = []
    for case in found:
        ways = case.asked or [Asking(case.source)]
        questions: dict[tuple[Judging, bool | None], list[Asking]] = {}
        for way in ways:
            questions.setdefault((way.judging, way.reader), []).append(way)
        for question, same in questions.items():
            asked.append(broken(case, same, _told(*question) if len(questions) > 1 else ""))
    outcomes = await asyncio.gather(*asked)
    return Golden(len(asked), tuple(name for name in outcomes if name is not None))


def _kept(case: Case, way: Asking, verdict: Verdict) -> bool:
    stated: tuple[tuple[Source, str | None], ...] = (("input", case.request), ("output", case.response))
    return all(way.harmful(verdict, source) is (label == "harmful") for source, label in stated if label is not None)


def _told(judging: Judging, reader: bool | None) -> str:
    how = {None: "", True: " with the reader", False: " without the reader"}[reader]
    return f" in mode {judging.mode}{how}"


@dataclass(frozen=True, slots=True)
class _Asks:
    guard: Guard
    way: Asking

    async def moderate(self, request: ModerationRequest) -> Verdict | GuardError:
        return await self.guard.moderate(replace(request, judging=self.way.judging, reader=self.way.reader))
