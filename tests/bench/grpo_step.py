"""Seconds per update of ``guard-train grpo`` against plain TRL's GRPOTrainer, same guard, sizes and rows, in one run.

    python tests/bench/grpo_step.py --rounds 6

Plain TRL gets what its own documentation asks for: a tokenizer, the prompts as text made by the chat template, our
reward function's arithmetic. It is given text rows, because it cannot train a batch of both modalities; ours is also
measured on one (every third row with an image). Both are built once and take turns, a rollout of two updates each,
so that a busy machine slows both, and both draw the same samples. Prints medians, the ratio (target: at most 1.1; on
a CPU also of the process's own CPU seconds, which other processes do not disturb) and the peak memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback
from transformers.utils import logging
from trl import GRPOTrainer

from guard_training.corpus.rows import Row
from guard_training.tuning.contract import Contract, load_contract, load_model
from guard_training.tuning.grpo import Chosen, GrpoSettings, arguments, build
from guard_training.tuning.reward import Truth, score
from guard_training.tuning.run import peak_memory
from guard_training.tuning.settings import read_settings, recipe_path

TARGET = 1.1
WORDS = "how do I bake bread pick flowers read maps draw a horse mend my bicycle write to a friend about rain".split()


class Rollouts(TrainerCallback):
    """Seconds per update over each rollout of ``after`` updates."""

    def __init__(self, after: int) -> None:
        self._after = after
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._after == 0:
            self._start = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._after == 0:
            self.seconds.append((time.perf_counter() - self._start[0]) / self._after)
            self.cpu_seconds.append((time.process_time() - self._start[1]) / self._after)


def rows_of(count: int, folder: Path, every: int | None) -> list[Row]:
    """Made rows of 12 to 40 words; every ``every``-th with an image."""
    out = []
    for number in range(count):
        image = None
        if every and number % every == 0:
            image = folder / f"{number}.png"
            Image.effect_noise((112, 112), 20 + number % 50).convert("RGB").save(image)
        words = [WORDS[(number + place * (1 + number % 5)) % len(WORDS)] for place in range(12 + number % 29)]
        label = "harmful" if number % 2 else "unharmful"
        out.append(Row(f"made-{number}", "made", " ".join(words), label, image=image))  # type: ignore[arg-type]
    return out


def plain(recipe: GrpoSettings, contract: Contract, rows: Sequence[Row], folder: Path) -> GRPOTrainer:
    """TRL as its documentation shows it, on text."""
    from datasets import Dataset

    from guard_middleware.guard.prompt import HUMAN, SYSTEM

    args = arguments(recipe, folder, len(rows), cpu=not torch.cuda.is_available())
    args.log_completions = False
    prompts = [
        [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"{HUMAN}{row.prompt}\n\nAI assistant:\nNone\n"},
        ]
        for row in rows
    ]

    def safety(completions: Any, completion_ids: Any, label: Any, **_: Any) -> list[float]:
        return [
            score(text[0]["content"], len(ids), Truth(wanted, None, False), recipe.reward)[0]
            for text, ids, wanted in zip(completions, completion_ids, label, strict=True)
        ]

    return GRPOTrainer(
        model=load_model(contract.folder),
        reward_funcs=[safety],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts, "label": [row.request for row in rows]}),
        processing_class=contract.tokenizer,
    )


def ours(recipe: GrpoSettings, contract: Contract, rows: list[Row], folder: Path) -> GRPOTrainer:
    args = arguments(recipe, folder, len(rows), cpu=not torch.cuda.is_available())
    return build(recipe, contract, Chosen(rows, {}), args, model=load_model(contract.folder))[0]


def measure(
    makers: dict[str, Callable[[Path], GRPOTrainer]], updates: int, rounds: int, folder: Path
) -> dict[str, Rollouts]:
    """Both clocks of each, by turns; the first round warms up and is to be left out."""
    trainers, clocks = {}, {name: Rollouts(updates) for name in makers}
    for name, make in makers.items():
        trainers[name] = make(folder / name)
        trainers[name].args.save_strategy = "no"
        trainers[name].args.disable_tqdm = True
        trainers[name].args.report_to = []
        trainers[name].add_callback(clocks[name])
    for number in range(rounds + 1):
        order = list(trainers) if number % 2 else list(reversed(trainers))
        for name in order:
            trainers[name]._step, trainers[name]._buffered_inputs = 0, None
            trainers[name].args.max_steps = updates
            torch.manual_seed(number)
            trainers[name].train()
    return clocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, metavar="N")
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="of a rollout, two updates (default 8)")
    parser.add_argument("--group", type=int, default=8, metavar="N")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    contract = load_contract("nano")
    half = given.prompts // 2
    recipe = replace(
        read_settings(GrpoSettings, recipe_path("grpo-nano")),
        rollout_prompts=given.prompts,
        update_prompts=half,
        group=given.group,
        batch_per_device=half * given.group,
        reader=False,
    )
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = rows_of(given.prompts * 4, folder, None)
        mixed = rows_of(given.prompts * 4, folder, 3)
        clocks = measure(
            {
                "plain TRL, text": lambda place: plain(recipe, contract, text, place),
                "ours, text": lambda place: ours(recipe, contract, text, place),
                "ours, text and images": lambda place: ours(recipe, contract, mixed, place),
            },
            recipe.updates_per_rollout,
            given.rounds,
            folder,
        )
    table = Table(title=f"{given.prompts} prompts x {given.group} completions per rollout of two updates, nano")
    for column in ("trainer", "median s/update", "least", "most", "median CPU s/update"):
        table.add_column(column, justify="right" if column != "trainer" else "left")
    for name, clock in clocks.items():
        wall, cpu = clock.seconds[1:], clock.cpu_seconds[1:]
        figures = (statistics.median(wall), min(wall), max(wall), statistics.median(cpu))
        table.add_row(name, *(f"{value:.2f}" for value in figures))
    console.print(table)
    theirs, mine = clocks["plain TRL, text"], clocks["ours, text"]
    for what, a, b in (("wall", mine.seconds, theirs.seconds), ("CPU", mine.cpu_seconds, theirs.cpu_seconds)):
        ratio = statistics.median(x / y for x, y in zip(a[1:], b[1:], strict=True))
        console.print(f"ours / plain TRL on text, {what} seconds: {ratio:.3f} (median of rounds; target {TARGET})")
    console.print(f"peak memory of the process {peak_memory() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
