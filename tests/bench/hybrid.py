"""What thinking buys: F1 against tokens per verdict for the modes reason, label and hybrid, source by source.

    python tests/bench/hybrid.py --data DEV.jsonl.gz [--model nano] [--limit 300] [--json FILE] [--plot FILE.svg]

The worker's own service judges every row in every mode, cascade, windows and calibration included. An output is made
once for each prompt and kept (greedy decoding gives the same again), so the curve over many bounds costs no more than
one run with reasoning and one without. Only sources with both classes count; a guard error is wrong, and says nothing
of tokens: their mean is over verdicts. Targets: some
bounds at which every source keeps its F1 to a point and the mean tokens are a quarter of those of reason. Choose bounds
on held-back training rows (--held-back), and read them off on dev once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from guard_middleware.errors import GuardError
from guard_middleware.types import REASON, Judging, Verdict
from guard_middleware.wire import ModerationRequest
from guard_middleware.worker.batching import BatchLimits
from guard_middleware.worker.calibration import Calibration, read
from guard_middleware.worker.engine import Generation, GuardPrompt
from guard_middleware.worker.engine_transformers import TransformersEngine
from guard_middleware.worker.metrics import Metrics
from guard_middleware.worker.service import GuardService, ServiceLimits
from guard_middleware.worker.weights import resolve
from guard_training.corpus.conversation import conversation, usable
from guard_training.corpus.rows import Row, Skipped, held_out, read_good_rows, sample
from guard_training.evaluation.metrics import groups, summarise
from guard_training.evaluation.outcomes import Outcome, blank, outcome
from guard_training.update.lessons import HELD_BACK

#: hybrid thinks from x to 1 - x
LOWS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.41, 0.42, 0.43, 0.44, 0.45, 0.46, 0.47, 0.48, 0.49)
SHOWN = (0.05, 0.1, 0.2, 0.3)
_BATCH = 16
_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Figures:
    """F1 in per cent by (source, side), mean tokens by it and over all verdicts; ``errors`` are rows without one."""

    f1: Mapping[tuple[str, str], float]
    by_source: Mapping[tuple[str, str], float]
    tokens: float
    thought: float
    errors: int


class Remembering:
    """``BatchEngine`` that runs each prompt once."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.facts, self.encoder, self.max_batch = engine.facts, engine.encoder, engine.max_batch
        self.image_tokens = engine.image_tokens
        self._engine = engine
        self._known: dict[GuardPrompt, Generation | GuardError] = {}

    def generate_batch(
        self, prompts: Sequence[GuardPrompt], cancelled: Callable[[int], bool]
    ) -> list[Generation | GuardError]:
        due = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self._known))
        if due:
            made = self._engine.generate_batch(due, lambda row: False)
            self._known.update(zip(due, made, strict=True))
        return [self._known[prompt] for prompt in prompts]


def both_classes(rows: Sequence[Row]) -> list[Row]:
    """The rows of sources that label a side harmful and unharmful; a side with one class loses its label."""
    sides = {
        key
        for key, found in groups([blank(row) for row in rows]).items()
        if len({one.label(key[1]) for one in found}) == 2
    }
    kept = [
        replace(
            row,
            request=row.request if (row.source, "request") in sides else None,
            response_label=row.response_label if (row.source, "response") in sides else None,
        )
        for row in rows
    ]
    return [row for row in kept if row.request or row.response_label]


async def judge(service: GuardService, rows: Sequence[Row], judging: Judging, progress: Progress) -> list[Any]:
    """(outcome, whether it was thought about) of every row, in order."""
    loop = asyncio.get_running_loop()
    task, slots = progress.add_task(_name(judging), total=len(rows)), asyncio.Semaphore(4 * _BATCH)

    async def one(row: Row) -> tuple[Outcome, bool]:
        answered = bool(row.response and row.response_label)
        question = ModerationRequest(
            row.id, conversation(row), "output" if answered else "input", _SECONDS, judging=judging
        )
        async with slots:
            found: Verdict | GuardError
            try:
                found = await service.moderate(question, loop.time() + _SECONDS)
            except GuardError as error:
                found = error
        progress.advance(task)
        said = outcome(row, found, seconds=None, model=service.model, revision=service.revision)
        return said, isinstance(found, Verdict) and found.thought

    return await asyncio.gather(*map(one, rows))


def figures(judged: Sequence[tuple[Outcome, bool]]) -> Figures:
    outcomes = [one for one, _ in judged]
    sources = summarise(outcomes, model="", revision=None)["sources"]
    grouped = groups(outcomes)
    return Figures(
        {(one["source"], one["side"]): 100 * one["f1"]["value"] for one in sources if one["f1"]},
        {key: _tokens(found) for key, found in grouped.items()},
        _tokens(outcomes),
        _mean([thought for _, thought in judged]),
        sum(one.error is not None for one in outcomes),
    )


def _tokens(outcomes: Sequence[Outcome]) -> float:
    """The mean of a verdict, 0 where there is none."""
    spent = [one.completion_tokens or 0 for one in outcomes if one.error is None]
    return _mean(spent) if spent else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _name(judging: Judging) -> str:
    return judging.mode if judging.mode != "hybrid" else f"{judging.low:g} to {judging.high:g}"


async def measure(
    engine: Remembering, calibration: Calibration, rows: Sequence[Row], progress: Progress
) -> dict[Judging, Figures]:
    limits = ServiceLimits(BatchLimits(_BATCH, queue=10**6, queue_tokens=10**9))
    service = GuardService(engine, Metrics(), calibration=calibration, limits=limits)
    modes = [REASON, Judging("label"), *(Judging("hybrid", low, 1 - low) for low in LOWS)]
    try:
        return {judging: figures(await judge(service, rows, judging, progress)) for judging in modes}
    finally:
        await service.aclose()


def table(found: Mapping[Judging, Figures], counts: Mapping[tuple[str, str], tuple[int, int]]) -> Table:
    shown = [one for one in found if one.mode != "hybrid" or one.low in SHOWN]
    made = Table(title="F1 in per cent (mean tokens per verdict)")
    for column in ("source", "side", "rows", "harmful", *map(_name, shown)):
        made.add_column(column, justify="left" if column in ("source", "side") else "right")
    for key, (rows, harmful) in counts.items():
        cells = [f"{found[one].f1[key]:.1f} ({found[one].by_source[key]:.1f})" for one in shown]
        made.add_row(*key, str(rows), str(harmful), *cells)
    reason = found[REASON]
    made.add_section()
    rows = sum(rows for rows, _ in counts.values())
    made.add_row("all", "", str(rows), "", *(f"{found[one].tokens:.2f}" for one in shown))
    made.add_row("share of reason's tokens", "", "", "", *(f"{found[one].tokens / reason.tokens:.3f}" for one in shown))
    made.add_row("thought about", "", "", "", *(f"{100 * found[one].thought:.1f} %" for one in shown))
    made.add_row("rows without a verdict", "", "", "", *(str(found[one].errors) for one in shown))
    made.add_row("most lost, points of F1", "", "", "", *(f"{_lost(reason, found[one]):.1f}" for one in shown))
    return made


def _lost(reason: Figures, other: Figures) -> float:
    return max(reason.f1[key] - other.f1[key] for key in reason.f1)


def plot(found: Mapping[Judging, Figures], path: Path) -> None:
    """Tokens against F1: each source, and the mean over sources."""
    figure = Figure(figsize=(8, 4.5), constrained_layout=True)
    axes = figure.subplots()
    curve = sorted(found.values(), key=lambda one: one.tokens)
    at = [one.tokens for one in curve]
    for source, side in curve[0].f1:
        axes.plot(at, [one.f1[source, side] for one in curve], marker=".", lw=1, label=f"{source} ({side})")
    axes.plot(at, [_mean(list(one.f1.values())) for one in curve], "k", lw=2, label="mean over sources")
    axes.axvline(found[REASON].tokens / 4, color="#999999", ls=":", label="a quarter of reason's tokens")
    axes.set(xlabel="mean tokens per verdict", ylabel="F1, per cent", title="label (left), hybrid, reason (right)")
    axes.legend(fontsize=7)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, nargs="+")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N rows of each source")
    parser.add_argument("--held-back", action="store_true", help="only the rows that training holds back")
    parser.add_argument("--no-calibration", action="store_true", help="the guard's own scores")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="SVG or PNG")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, skipped = Console(width=200), Skipped()
    rows = [row for path in options.data for row in read_good_rows(path, skipped)]
    rows = [row for row in rows if row.image is None and (not options.held_back or held_out(row.id, HELD_BACK))]
    rows = both_classes(sample(usable(rows, skipped), options.limit))
    rows.sort(key=lambda row: len(row.prompt) + len(row.response or ""))  # so that a batch has little padding
    weights = resolve(options.model)
    calibration = Calibration() if options.no_calibration else read(weights.folder, weights.facts.revision)
    began = time.monotonic()
    engine = Remembering(TransformersEngine(weights, device="cpu", max_batch=_BATCH))
    with Progress(console=console) as progress:
        found = asyncio.run(measure(engine, calibration, rows, progress))
    if found[REASON].errors == len(rows):
        parser.error("the guard gave no verdict at all")
    counts = {
        key: (len(kept), sum(one.label(key[1]) == "harmful" for one in kept))
        for key, kept in groups([blank(row) for row in rows]).items()
    }
    console.print(table(found, counts))
    revision = calibration.revision(weights.facts.revision)
    console.print(f"{weights.facts.name} {revision}, {len(rows)} rows, {time.monotonic() - began:.0f} s")
    if options.json:
        lines = [
            {
                "mode": one.mode, "low": one.low, "high": one.high, "tokens": line.tokens, "thought": line.thought,
                "errors": line.errors, "lost": _lost(found[REASON], line),
                "sources": [{"source": key[0], "side": key[1], "f1": line.f1[key], "tokens": line.by_source[key]}
                            for key in line.f1],
            }
            for one, line in found.items()
        ]  # fmt: skip
        options.json.write_text(json.dumps({"revision": revision, "rows": len(rows), "modes": lines}, indent=1) + "\n")
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
