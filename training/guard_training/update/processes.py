"""How an update trains and asks: ``guard-train`` and workers, each in a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import httpx
import yaml
from rich.console import Console
from rich.progress import Progress

from guard_middleware.types import Judging, Verdict
from guard_training.corpus.rows import Row, Skipped, rows_to_jsonl
from guard_training.evaluation.measure import Asked, ask_all, measure, worker
from guard_training.evaluation.outcomes import Outcome
from guard_training.journal import Journal
from guard_training.process import LAUNCH, run_child
from guard_training.rowfile import bring_image, write_whole
from guard_training.update.lessons import Said, read_lessons
from guard_training.update.pipeline import Measure, Plan, Train, UpdateError
from guard_training.update.train import LESSONS


def trainer(console: Console, skipped: Skipped, launch: Sequence[str] = LAUNCH, *, cpu: bool = False) -> Train:
    """Each stage in a process of its own, whose bar and words go to this terminal. ``launch`` starts guard-train."""

    def start(*arguments: str) -> None:
        status = run_child([*launch, *arguments, *(["--cpu"] if cpu else [])])
        if status:
            raise UpdateError(f"training stopped (exit {status}); see above, the same command goes on")

    def train(plan: Plan) -> Path:
        start("update", "--stage", str(plan.output))
        made = plan.output / "sft" / "model"
        if plan.rl is None:
            return made
        console.print("online RL", highlight=False)
        recipe = plan.output / "rl.yaml"
        write_whole(recipe, yaml.safe_dump(asdict(plan.rl), sort_keys=False).encode())
        rows = ["--rows", str(plan.output / "rl.jsonl"), "--recipe", str(recipe)]
        write_rl_rows(plan.output, skipped)
        start("grpo", *rows, "--model", str(made), "--output", str(plan.output / "rl"))
        return plan.output / "rl" / "model"

    return train


def write_rl_rows(folder: Path, skipped: Skipped) -> None:
    """The lessons of one turn as rows for ``guard-train grpo``, which knows no others."""
    lessons = []
    for row in read_lessons(folder / LESSONS, skipped):
        if getattr(row, "messages", ""):
            skipped(f"{row.name}: a conversation; learnt by SFT, not by RL")
        else:
            lessons.append(row)
    placed = [bring_image(row, folder) for row in lessons]
    write_whole(folder / "rl.jsonl", rows_to_jsonl(placed, folder).encode())


def measurer(console: Console, concurrency: int) -> Measure:
    def ask(rows: Sequence[Row], model: str, journal: Path, judging: Judging) -> list[Outcome]:
        return measure(
            rows, model, concurrency=concurrency, console=console, journal=journal, judging=judging, calibrated=False
        )

    return ask


def asker(console: Console, concurrency: int) -> Callable[[Sequence[Row], str, Path], Mapping[str, Said]]:
    """Verdicts with their reasoning; each is written down as it comes and not asked for again."""

    def ask(rows: Sequence[Row], model: str, journal: Path) -> dict[str, Said]:
        with Journal(journal) as book:
            due = [row for row in rows if row.id not in book.done]
            if due:
                with Progress(console=console) as progress, worker(model) as socket:

                    def done(one: Asked) -> None:
                        answer = one.outcome
                        said = None
                        if isinstance(answer, Verdict):
                            said = asdict(Said(answer.request, answer.response, answer.reasoning))
                        book.append({"id": one.row.id, "verdict": said})

                    try:
                        asyncio.run(ask_all(due, socket, concurrency=concurrency, progress=progress, done=done))
                    except* httpx.TransportError:
                        raise UpdateError(f"the worker went away; the same command goes on from {journal}") from None
            return {line["id"]: Said(**line["verdict"]) for line in book if line["verdict"]}

    return ask
