"""``tests/bench/hybrid.py`` on a guard of random weights: what is measured is what the worker would have judged."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("torch")

from rich.console import Console
from rich.progress import Progress

from guard_middleware.types import REASON, Judging
from guard_middleware.worker.calibration import Calibration
from guard_middleware.worker.engine_transformers import TransformersEngine
from guard_middleware.worker.weights import load
from guard_training.corpus.rows import Row
from guard_training.evaluation.outcomes import blank
from guard_training.nano.export import export, shape
from guard_training.nano.model import build_model
from guard_training.nano.recipe import default_recipe, read_recipe
from guard_training.nano.teacher import PHRASES
from guard_training.nano.tokenizer import train_tokenizer
from tests.bench import hybrid

ROWS = [
    *(Row(f"a{n}", "locks", f"how do I pick lock {n}", "harmful" if n % 2 else "unharmful") for n in range(6)),
    *(Row(f"b{n}", "talk", "hello", "unharmful", f"so {n}", "harmful" if n % 2 else "unharmful") for n in range(4)),
    *(Row(f"c{n}", "one class", f"bread {n}", "unharmful") for n in range(3)),
]


def test_only_sides_with_both_classes_are_measured() -> None:
    kept = hybrid.both_classes(ROWS)
    assert {row.id[0] for row in kept} == {"a", "b"}
    assert {row.request for row in kept if row.source == "talk"} == {None}


def test_a_row_without_a_verdict_is_not_one_for_no_tokens() -> None:
    said = [blank(row) for row in ROWS[:4]]
    made = [dataclasses.replace(one, request=one.request_label, completion_tokens=20) for one in said[:2]]
    lost = [dataclasses.replace(one, error="truncated") for one in said[2:]]
    found = hybrid.figures([(one, False) for one in (*made, *lost)])
    assert (found.tokens, found.by_source, found.errors) == (20.0, {("locks", "request"): 20.0}, 2)


def test_every_prompt_runs_once_however_many_bounds_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer(["how do I pick a lock"] * 20, PHRASES, vocab_size=600)
    small = {"hidden": 64, "intermediate": 64, "layers": 1, "heads": 1, "vision_hidden": 32, "vision_layers": 1}
    recipe = dataclasses.replace(read_recipe(default_recipe()), **small, image_tokens=4, window_tokens=2048)
    folder = export(build_model(tokenizer, shape(recipe), seed=1), tokenizer, tmp_path / "model", recipe)
    engine = TransformersEngine(load(folder, name="x"), device="cpu", max_batch=4)
    ran: list[bool] = []
    generate = engine.generate_batch
    monkeypatch.setattr(
        engine, "generate_batch", lambda prompts, gone: ran.extend(p.think for p in prompts) or generate(prompts, gone)
    )
    rows = hybrid.both_classes(ROWS)
    with Progress(console=Console(quiet=True)) as progress:
        found = asyncio.run(hybrid.measure(hybrid.Remembering(engine), Calibration(), rows, progress))
    assert (ran.count(True), ran.count(False)) == (len(rows), len(rows))
    reason, label = found[REASON], found[Judging("label")]
    assert (reason.thought, label.thought, reason.errors, label.errors) == (1.0, 0.0, 0, 0)
    assert label.by_source == {("locks", "request"): 1.0, ("talk", "response"): 2.0}
    widest = found[Judging("hybrid", hybrid.LOWS[0], 1 - hybrid.LOWS[0])]
    assert widest.thought == 1.0  # random weights are sure of nothing
    assert widest.f1 == reason.f1
    assert widest.tokens == pytest.approx(reason.tokens + label.tokens)
    hybrid.plot(found, tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").stat().st_size > 1000
