"""The run behind ``guard-train synthesize``: which rows need a rationale, asking for them, keeping what is accepted.

Three files: the output (rows with rationales; those that had one and a label of the request are copied),
``<output>.invalid.jsonl`` (rows whose answers were all refused, with the reasons and no content) and the settings.
Rows out of reach stand in neither, and the next run asks for them.

A label that a row lacks is the teacher's to decide: SPA-VL's both, BeaverTails' of the request. The guard's form has no
``Request: None``, so a rationale beside an unlabelled request is written anew, with its verdict.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from guard_training.corpus.rows import CorpusError, Row, Skipped, row_to_json
from guard_training.journal import Journal, done_in
from guard_training.rowfile import bring_image
from guard_training.synthesis.client import Client, OutOfReach, Refused, Teacher, TeacherError, connect
from guard_training.synthesis.cost import prompt_tokens, unlabelled
from guard_training.synthesis.limits import Limiter
from guard_training.synthesis.prompt import data_url, messages
from guard_training.synthesis.validate import Unusable, validate

#: So many rows in a row that fail, without one that succeeds, and the teacher itself is at fault. What the API refuses
#: counts only before its first answer: behind it, it is a filter at work on what harmful sources are full of.
_GIVE_UP = 20


@dataclass(frozen=True, slots=True)
class Asking:
    """How rows are asked for. ``expected`` is the length of an answer in tokens, ``side`` bounds images in pixels."""

    teacher: Teacher
    attempts: int = 3
    concurrency: int = 16
    side: int = 1024
    expected: int = 280
    image_tokens: int | None = None


@dataclass(slots=True)
class Tally:
    """What came of a run. ``decided``: labels that the teacher gave, by side; ``unlabelled``: rows that had none;
    ``why``: what put the last row out of reach."""

    written: int = 0
    unlabelled: int = 0
    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    decided: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    invalid: int = 0
    out_of_reach: int = 0
    why: str = ""
    failed_in_a_row: int = 0


def needed(rows: Sequence[Row], asking: Asking, skipped: Skipped) -> list[tuple[Row, int]]:
    """Rows to ask for, with the tokens that asking costs; what cannot be asked goes to ``skipped``."""
    out = []
    for row in rows:
        if _finished(row):
            continue
        try:
            if not (row.prompt or row.response or row.image):
                raise CorpusError("nothing to judge: no prompt, response or image")
            out.append((row, prompt_tokens(row, side=asking.side, image_tokens=asking.image_tokens)))
        except CorpusError as error:
            skipped(f"{row.name}: {error}")
    return out


def _finished(row: Row) -> bool:
    return row.rationale is not None and row.request is not None


def write(rows: Sequence[tuple[Row, int]], asking: Asking, limiter: Limiter, output: Path, progress: Progress) -> Tally:
    """Asks for every row that neither file holds yet. Raises ``TeacherError``; what was written until then stays."""
    with Journal(output) as journal, Journal(invalid_file(output)) as invalid:
        run = _Run(asking, journal, invalid, output.parent, progress, progress.add_task("asking", total=len(rows)))
        left = [(row, tokens) for row, tokens in rows if row.id not in journal.done | invalid.done]
        progress.advance(run.task, len(rows) - len(left))
        asyncio.run(run.all(left, limiter))
    return run.tally


def left_over(rows: Sequence[tuple[Row, int]], output: Path, *, again: bool) -> list[tuple[Row, int]]:
    """What a run of the same command would still ask for."""
    done = done_in(output) | (set() if again else done_in(invalid_file(output)))
    return [(row, tokens) for row, tokens in rows if row.id not in done]


def copy(rows: Sequence[Row], output: Path) -> None:
    """Takes over the rows that need nothing."""
    with Journal(output) as journal:
        for row in rows:
            if _finished(row) and row.id not in journal.done:
                journal.append(row_to_json(bring_image(row, output.parent), output.parent))


def invalid_file(output: Path) -> Path:
    """Where rows are named whose answers were all refused."""
    return output.with_name(f"{output.stem}.invalid.jsonl")


class _Run:
    def __init__(
        self, asking: Asking, journal: Journal, invalid: Journal, folder: Path, progress: Progress, task: TaskID
    ) -> None:
        self.asking, self.journal, self.invalid, self.folder = asking, journal, invalid, folder
        self.progress, self.task, self.tally = progress, task, Tally()

    async def all(self, rows: Sequence[tuple[Row, int]], limiter: Limiter) -> None:
        waiting = iter(rows)
        try:
            async with connect(self.asking.teacher, limiter) as client, asyncio.TaskGroup() as group:
                for _ in range(min(self.asking.concurrency, len(rows))):
                    group.create_task(self._worker(waiting, client))
        except* TeacherError as errors:
            raise errors.exceptions[0] from None

    async def _worker(self, waiting: Iterator[tuple[Row, int]], client: Client) -> None:
        for row, tokens in waiting:
            try:
                await self._row(row, tokens, client)
            except OutOfReach as error:
                self._failed(error)
                self.tally.out_of_reach, self.tally.why = self.tally.out_of_reach + 1, str(error)
            except Refused as error:
                if not self.tally.answers:
                    self._failed(error)
                self._invalid(row, [str(error)])
            except CorpusError as error:
                self._invalid(row, [f"{row.name}: {error}"])
            self.progress.advance(self.task)

    async def _row(self, row: Row, tokens: int, client: Client) -> None:
        url = await asyncio.to_thread(data_url, row.image, self.asking.side) if row.image else None
        why: list[str] = []
        for attempt in range(1, self.asking.attempts + 1):
            asked = messages(row, url, fault=why[-1] if why else None)
            reply = await client.ask(asked, tokens=tokens + self.asking.expected)
            tally = self.tally
            tally.failed_in_a_row, tally.answers = 0, tally.answers + 1
            tally.prompt_tokens += reply.prompt_tokens
            tally.completion_tokens += reply.completion_tokens
            try:
                found = validate(reply.text, row, finish=reply.finish)
            except Unusable as error:
                tally.faults[error.fault.value] += 1
                why.append(str(error))
                continue
            decided = [
                side
                for side, label, known in (
                    ("request", found.request, row.request),
                    ("response", found.response, row.response_label),
                )
                if label and not known
            ]
            whole = replace(row, request=found.request, response_label=found.response, rationale=found.text)
            made: dict[str, Any] = {"teacher": self.asking.teacher.model, "attempts": attempt, "steps": found.steps}
            line = row_to_json(bring_image(whole, self.folder), self.folder)
            self.journal.append({**line, "synthesis": {**made, "decided": decided}})
            tally.written += 1
            tally.decided.update(decided)
            tally.unlabelled += unlabelled(row)
            return
        self._invalid(row, why)

    def _invalid(self, row: Row, why: Sequence[str]) -> None:
        self.invalid.append({"id": row.id, "reasons": list(why)})
        self.tally.invalid += 1

    def _failed(self, error: Exception) -> None:
        self.tally.failed_in_a_row += 1
        if self.tally.failed_in_a_row >= _GIVE_UP:
            raise TeacherError(
                f"{_GIVE_UP} requests in a row failed, the last with: {error}; check the teacher, "
                "then give the same command again"
            )
